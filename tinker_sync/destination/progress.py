"""What of a stage is durable, noted so that a later attempt goes on with it instead of starting over.

The note, `progress.json` beside the payload, says which objects of the storage were being fetched (ETag, length, digests
promised) and of what their first bytes consist, in order: bytes that are in no file, and files, each with how much of it
is on the device and the SHA-256 of that. **A byte is noted only after it was fsynced**, and what is noted is read and
hashed again before it is believed; the note itself has a SHA-256 too. It is replaced after every 64 MiB, so small
checkpoints never have one.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from tinker_sync.destination.files import FLUSH_EVERY, Durable, disk_errors, read_small
from tinker_sync.errors import DiskTrouble
from tinker_sync.model.checkpoint import Identity
from tinker_sync.model.documents import json_bytes
from tinker_sync.model.evidence import Claim
from tinker_sync.model.moments import parse_time, rfc3339
from tinker_sync.model.paths import PayloadPath, TinkerPath

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime
    from pathlib import Path

    from tinker_sync.destination.files import HashingWriter
    from tinker_sync.destination.local import LocalStage

PROGRESS_FILE: Final = "progress.json"
_FORMAT: Final = 1
_PIECE: Final = 1024 * 1024
_MOST_FRAMING: Final = 1024 * 1024
"""Bytes in no file that a note can hold; an archive of some thousand members has more."""
_MOST_NOTE: Final = 16 * 1024 * 1024
_DIGEST: Final = "note_sha256"


@dataclass(slots=True)
class _Part:
    """A file of an object, or bytes between files."""

    framing: bytearray = field(default_factory=bytearray)
    path: PayloadPath | None = None
    writer: HashingWriter | None = None
    durable: Durable | None = None
    """Of a file, what an earlier attempt left."""
    noted_whole: bool = True
    """Whether that was noted to be all of it."""

    def as_json(self, *, whole: bool) -> dict[str, Any] | None:
        """None where nothing of a file is durable yet."""
        if self.path is None:
            return {"framing": base64.b64encode(bytes(self.framing)).decode()}
        durable = self.writer.durable if self.writer is not None else self.durable
        if durable is None:
            return None
        return {"file": str(self.path), "bytes": durable.size, "sha256": durable.sha256, "whole": whole}

    @property
    def whole(self) -> bool:
        """Whether everything that will be in it is durable."""
        if self.path is None or self.writer is None:
            return self.noted_whole
        return self.writer.is_durable


class StagedObject:
    """A `ports.StagedObject`. Written by one thread at a time; noted by others."""

    def __init__(self, stage: LocalStage, key: str, validator: str | None, claim: Claim) -> None:
        self._stage = stage
        self.key = key
        self.validator = validator
        self.claim = claim
        self.reason = "" if validator is not None else "the storage gives no strong ETag"
        """Why it cannot be gone on with; empty where it can."""
        self._parts: list[_Part] = []
        self._framing = 0
        self._kept: list[_Part] = []

    @property
    def kept(self) -> int:
        """How many of its first bytes an earlier attempt made durable."""
        return sum(len(part.framing) if part.durable is None else part.durable.size for part in self._kept)

    def write(self, path: PayloadPath, size: int | None = None) -> HashingWriter:
        """Start a file; what is kept of it is hashed and not written again. Raises NoSpace, DiskTrouble."""
        kept = next((part.durable for part in self._kept if part.path == path), None)
        writer = self._stage.write(path, size, kept=kept)
        self._parts.append(_Part(path=path, writer=writer))
        return writer

    def make_directory(self, path: PayloadPath) -> None:
        """Make an empty directory. Raises NoSpace, DiskTrouble."""
        self._stage.make_directory(path)

    def framing(self, data: bytes | memoryview) -> None:
        """Bytes of the object that are in no file."""
        if self.reason:
            return
        self._framing += len(data)
        if self._framing > _MOST_FRAMING:
            self.cannot_resume("an archive of so many files cannot be gone on with in the middle")
            return
        if not self._parts or self._parts[-1].path is not None:
            self._parts.append(_Part())
        self._parts[-1].framing += data

    def cannot_resume(self, reason: str) -> None:
        """A later attempt must start over, and say so."""
        self.reason = reason
        self._parts = [part for part in self._parts if part.path is not None]

    def replay(self) -> Iterator[bytes]:
        """What is kept, from its first byte. Blocking. Raises DiskTrouble where it is not what was noted."""
        for part in self._kept:
            if part.path is None or part.durable is None:
                yield bytes(part.framing)
            else:
                yield from self._replay_file(self._stage.payload.joinpath(*part.path.parts), part.durable)

    def _replay_file(self, target: Path, durable: Durable) -> Iterator[bytes]:
        digest, left = hashlib.sha256(), durable.size
        with disk_errors("cannot read again", target):
            descriptor = os.open(target, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # what the page cache holds proves nothing
                while left and (piece := os.read(descriptor, min(_PIECE, left))):
                    left -= len(piece)
                    digest.update(piece)
                    if not left and digest.hexdigest() != durable.sha256:
                        break
                    yield piece
                    if left % FLUSH_EVERY < _PIECE:
                        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
        if left or digest.hexdigest() != durable.sha256:
            message = f"{target.name}: what was kept of it is not what was written"
            raise DiskTrouble(message)

    def files(self) -> list[PayloadPath]:
        """Every file of it."""
        return [part.path for part in (*self._kept, *self._parts) if part.path is not None]

    def drop(self) -> None:
        """It is begun anew: close its files."""
        for part in self._parts:
            if part.writer is not None:
                part.writer.discard()

    def as_json(self) -> dict[str, Any]:
        """What is durable, up to the first part of which something is not."""
        parts = []
        for part in list(self._parts) or self._kept:
            whole = part.whole  # before what is durable: a flush can end between the two
            noted = None if self.reason else part.as_json(whole=whole)
            if noted is None:
                break
            parts.append(noted)
            if not whole:
                break
        return {
            "key": self.key,
            "validator": self.validator,
            "claim": self.claim.as_json(),
            "parts": parts,
            "starts_over": self.reason,
        }

    @classmethod
    def from_json(cls, stage: LocalStage, document: dict[str, Any]) -> StagedObject:
        """The reverse. Raises ValueError, TypeError, KeyError, AttributeError, PathInvalid."""
        made = cls(stage, str(document["key"]), document["validator"], Claim.from_json(document["claim"]))
        made.reason = str(document["starts_over"])
        for part in document["parts"]:
            if made._kept and not made._kept[-1].noted_whole:
                message = "something follows a file that is not whole"
                raise ValueError(message)
            if "framing" in part:
                made._kept.append(_Part(bytearray(base64.b64decode(part["framing"]))))
            else:
                durable = Durable(int(part["bytes"]), str(part["sha256"]))
                if durable.size < 0:
                    message = "a file of negative size"
                    raise ValueError(message)
                path = PayloadPath.parse(part["file"])
                made._kept.append(_Part(path=path, durable=durable, noted_whole=part["whole"] is True))
        return made


@dataclass(frozen=True, slots=True)
class Note:
    """What stands in a note about the whole stage."""

    identity: Identity
    noted_at: datetime
    objects: tuple[dict[str, Any], ...]

    def as_json(self) -> dict[str, Any]:
        """Its members."""
        return {
            "format": _FORMAT,
            "tinker_path": str(self.identity.path),
            "time": rfc3339(self.identity.time),
            "size_bytes": self.identity.size_bytes,
            "noted_at": rfc3339(self.noted_at),
            "objects": list(self.objects),
        }

    def to_bytes(self) -> bytes | None:
        """For the file; None where it is too large for one that is believed."""
        document = self.as_json()
        content = json_bytes({**document, _DIGEST: _digest(document)}, indent=None)
        return content if len(content) <= _MOST_NOTE else None

    @property
    def reason(self) -> str:
        """Why it cannot be gone on with, where one object's start over makes all of it worthless; else empty."""
        reasons = [str(found["starts_over"]) for found in self.objects]
        return reasons[0] if reasons and all(reasons) else ""

    def is_of(self, source: str) -> bool:
        """Whether its objects came by that source."""
        return all(str(found["key"]).partition(":")[0] == source for found in self.objects)

    @property
    def promised(self) -> int:
        """Bytes of the whole objects, as far as the storage said."""
        return sum(int(found["claim"].get("length") or 0) for found in self.objects)

    @property
    def kept(self) -> int:
        """Bytes of files that are durable."""
        return sum(int(part.get("bytes", 0)) for found in self.objects for part in found["parts"])


def _digest(document: dict[str, Any]) -> str:
    """Of a note without it."""
    return hashlib.sha256(json_bytes(document, indent=None)).hexdigest()


def read_note(home: Path) -> Note | None:
    """The note of a stage; None where there is none of use."""
    try:
        if (home / PROGRESS_FILE).stat().st_size > _MOST_NOTE:
            return None
        document = json.loads(read_small(home / PROGRESS_FILE))
        if document["format"] != _FORMAT or document.pop(_DIGEST) != _digest(document):
            return None
        identity = Identity(
            TinkerPath.parse(document["tinker_path"]), parse_time(document["time"]), document["size_bytes"]
        )
        note = Note(identity, parse_time(document["noted_at"]), tuple(document["objects"]))
        read = (note.kept, note.promised, note.reason, note.is_of(""))  # whatever lacks a key raises here
        return note if read[0] >= 0 else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
