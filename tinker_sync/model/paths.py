"""Paths and URLs that proved something when they were made.

**tinker path**: `tinker://<training_run_id>/<segment>/<name>`, exactly three parts; the segment tells the type.
**payload path**: a file's place below its checkpoint's root; it cannot escape, whatever an archive or server said.
**signed URL**: a secret; it redacts itself in `str` and `repr`.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final, NamedTuple
from urllib.parse import urljoin, urlsplit

TYPE_OF_SEGMENT: Final = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}
SEGMENT_OF_TYPE: Final = {kind: segment for segment, kind in TYPE_OF_SEGMENT.items()}
CHECKPOINT_TYPES: Final = tuple(SEGMENT_OF_TYPE)

MANIFEST_NAME: Final = ".tinker-sync.json"
_SCHEME: Final = "tinker://"
_MAX_COMPONENT_BYTES: Final = 255
_MAX_PATH_BYTES: Final = 4000
_MAX_DEPTH: Final = 64


class PathInvalid(ValueError):
    """The text is not a path of the kind it was parsed as; the message says why."""


class TinkerPath(NamedTuple):
    """One checkpoint's address. `str()` is the `tinker://…` text; components are true names, never encoded.

    A tuple, since it is the key of everything: an account of 100,000 hashes and compares a million of them.
    """

    run_id: str
    segment: str
    name: str

    @classmethod
    def parse(cls, text: str) -> TinkerPath:
        """Parse `tinker://<run>/<segment>/<name>`.

        Raises PathInvalid. A segment that we do not know is no error here: `checkpoint_type` tells.
        """
        if not text.startswith(_SCHEME):
            message = f"{text!r} is not a tinker path: it must look like tinker://<training run>/weights/<name>"
            raise PathInvalid(message)
        parts = text[len(_SCHEME) :].split("/")
        if len(parts) != 3 or "" in parts:
            message = (
                f"{text!r} is not a tinker path: after tinker:// come exactly three parts, "
                "<training run>/<weights|sampler_weights|external_weights>/<name>"
            )
            raise PathInvalid(message)
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                message = f"{text!a} is not a tinker path: it is not valid Unicode"
                raise PathInvalid(message) from error
        return cls(*parts)

    @property
    def checkpoint_type(self) -> str:
        """`training`, `sampler`, `external`; for a segment that we do not know, the segment itself, marked if need be."""
        if self.segment in SEGMENT_OF_TYPE:  # a segment that is called like a type is none of that type
            return f"{self.segment}?"
        return TYPE_OF_SEGMENT.get(self.segment, self.segment)

    @property
    def checkpoint_id(self) -> str:
        """`<segment>/<name>`, as the API calls it."""
        return f"{self.segment}/{self.name}"

    @property
    def tail(self) -> str:
        """`<run>/<segment>/<name>`, what globs in the configuration are matched against."""
        return f"{self.run_id}/{self.segment}/{self.name}"

    def matches(self, glob: str) -> bool:
        """Whether `<run glob>/<segment glob>/<name glob>` matches, each glob against its own component."""
        parts = glob.removeprefix(_SCHEME).split("/")
        if len(parts) != 3:
            return False
        components = (self.run_id, self.segment, self.name)
        return all(fnmatchcase(component, pattern) for component, pattern in zip(components, parts, strict=True))

    def __str__(self) -> str:
        return f"{_SCHEME}{self.run_id}/{self.segment}/{self.name}"


def fold(component: str) -> str:
    """What a case-insensitive, Unicode-normalising filesystem makes of a name: equal folds may collide."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", component).casefold())


@dataclass(frozen=True, slots=True, order=True)
class PayloadPath:
    """A file's path below its checkpoint's root: relative, no `.` or `..`, nothing that a filesystem chokes on."""

    parts: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> PayloadPath:
        """Parse a member's or a key's name; a leading `./` and repeated `/` mean nothing and are dropped.

        Raises PathInvalid for what could escape, collide with our manifest, or not be stored.
        """
        if text.startswith("/"):
            message = f"absolute name {text!r}"
            raise PathInvalid(message)
        if "\\" in text:
            message = f"backslash in the name {text!r}"
            raise PathInvalid(message)
        parts = tuple(part for part in text.split("/") if part not in ("", "."))
        if not parts:
            message = f"empty name {text!r}"
            raise PathInvalid(message)
        if len(parts) > _MAX_DEPTH:
            message = f"name of {len(parts):,} components ({_MAX_DEPTH} is the most): {text[:60]!r}…"
            raise PathInvalid(message)
        for part in parts:
            _check_component(part, text)
        if len(text.encode()) > _MAX_PATH_BYTES:
            message = f"name of {len(text.encode())} bytes: {text[:60]!r}…"
            raise PathInvalid(message)
        return cls(parts)

    @property
    def folded(self) -> tuple[str, ...]:
        """The path as a folding filesystem sees it, part by part."""
        return tuple(fold(part) for part in self.parts)

    @property
    def name(self) -> str:
        """The last component."""
        return self.parts[-1]

    def below(self, directory: str) -> PayloadPath:
        """The same file seen from inside its top-level `directory`."""
        if self.parts[0] != directory or len(self.parts) < 2:
            message = f"{self} is not below {directory!r}"
            raise PathInvalid(message)
        return PayloadPath(self.parts[1:])

    def __str__(self) -> str:
        return "/".join(self.parts)


def _check_component(part: str, whole: str) -> None:
    if part == "..":
        message = f"'..' in the name {whole!r}"
        raise PathInvalid(message)
    if any(ord(character) < 32 or ord(character) == 127 for character in part):
        message = f"control character in the name {whole!r}"
        raise PathInvalid(message)
    try:
        encoded = part.encode()
    except UnicodeEncodeError as error:
        message = f"name that is not UTF-8: {whole!a}"
        raise PathInvalid(message) from error
    if len(encoded) > _MAX_COMPONENT_BYTES:
        message = f"name of {len(encoded)} bytes (255 is the most): {part[:60]!r}…"
        raise PathInvalid(message)
    if fold(part) == MANIFEST_NAME:
        message = f"the name {whole!r} is reserved for the manifest"
        raise PathInvalid(message)


class SignedUrl:
    """A URL that is itself a key to the bytes. Only `reveal()` gives it; everything else shows the host alone."""

    __slots__ = ("_url",)

    def __init__(self, url: str) -> None:
        self._url = url

    @classmethod
    def joined(cls, base: str, location: str) -> SignedUrl:
        """A `Location` or URL of an answer, relative to what was asked; what is no URL keeps no scheme."""
        try:
            return cls(urljoin(base, location))
        except ValueError:
            return cls("")

    def reveal(self) -> str:
        """The URL itself, for the request that uses it."""
        return self._url

    @property
    def scheme(self) -> str:
        """`https`, `http`, `file` … in lower case; empty when the text is no URL."""
        try:
            return urlsplit(self._url).scheme.lower()
        except ValueError:
            return ""

    @property
    def host(self) -> str:
        """The host alone, without user, port or path."""
        try:
            return urlsplit(self._url).hostname or ""
        except ValueError:
            return ""

    def __str__(self) -> str:
        return f"<signed URL at {self.host or 'no host'}>"

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SignedUrl) and other._url == self._url

    def __hash__(self) -> int:
        return hash(self._url)
