"""What was promised about the bytes, what was seen, and what is wrong.

**claim**: what the source promised. **defect**: how the stage differs from it. A defect of transport is worth another
attempt; one of safety or structure comes again and is refused; one of content arrived whole and goes to quarantine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tinker_sync.model.paths import PayloadPath


class Kind(Enum):
    """What follows from a defect."""

    TRANSPORT = "transport"
    """Cut, wrong length, wrong digest: refused, and tried again within the pass."""
    STRUCTURE = "structure"
    """Not an archive, unsafe names, sizes that lie: refused, one attempt."""
    CONTENT = "content"
    """Whole, but not a checkpoint as we know it: kept in quarantine."""


@dataclass(frozen=True, slots=True)
class Defect:
    """One way in which bytes differ from what they should be."""

    kind: Kind
    what: str
    """A sentence in words, without a secret."""
    where: str = ""
    """The payload path, the member or the header that it is about."""

    @property
    def again_now(self) -> bool:
        """Whether another attempt in the same pass can help."""
        return self.kind is Kind.TRANSPORT

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" if self.where else self.what


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes `first` up to, without, `end` of an object."""

    first: int
    end: int


@dataclass(frozen=True, slots=True)
class Claim:
    """What the storage promised about one body."""

    length: int | None = None
    """Content-Length in bytes."""
    digests: Mapping[str, bytes] = field(default_factory=dict)
    """Algorithm (`md5`, `sha1`, `sha256`, `crc32`, `crc32c`) to the raw digest, big-endian for CRCs."""

    def as_json(self) -> dict[str, object]:
        """For the manifest: lengths as numbers, digests in hex."""
        return {
            **({"length": self.length} if self.length is not None else {}),
            **({"digests": {name: value.hex() for name, value in self.digests.items()}} if self.digests else {}),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Claim:
        """The reverse. Raises ValueError, TypeError, AttributeError."""
        digests = {str(name): bytes.fromhex(value) for name, value in document.get("digests", {}).items()}
        length = document.get("length")
        return cls(None if length is None else int(length), digests)


@dataclass(frozen=True, slots=True)
class SeenFile:
    """One file as it went by while it was written: never read back, so a `Path` has no place here."""

    path: PayloadPath
    size: int
    sha256: str
    findings: tuple[Defect, ...] = ()
    """What `integrity.judge_file` found in its first bytes, which are not kept."""


@dataclass(frozen=True, slots=True)
class SeenBody:
    """One response body as it went by."""

    length: int
    digests: Mapping[str, bytes]
    """The same algorithms as the claim's, computed."""
