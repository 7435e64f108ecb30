"""The manifest: what a replica says about itself, and its commit marker.

Format 1, the contract of `docs/ARCHITECTURE.md`. Readers ignore keys that they do not know.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tinker_sync.model.checkpoint import Identity
from tinker_sync.model.documents import json_bytes
from tinker_sync.model.moments import parse_time, rfc3339
from tinker_sync.model.paths import PathInvalid, PayloadPath, TinkerPath

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

FORMAT = 1


class ManifestInvalid(ValueError):
    """The bytes are no manifest that this version can read."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One payload file: path below the replica, size in bytes, SHA-256 in hex."""

    path: PayloadPath
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """Paths, sizes and digests of a replica's files, with the facts of its source."""

    tinker_path: TinkerPath
    checkpoint_type: str
    time: datetime
    files: tuple[FileEntry, ...]
    source: str
    """`archive`, `files`, `directory` or `export`."""
    fidelity: str
    """`exact` or `adapter`."""
    committed_at: datetime
    tool_version: str
    size_bytes: int | None = None
    """As listed; not the sum of the files."""
    expires_at: datetime | None = None
    first_expires_at: datetime | None = None
    """The first one that was seen; it tells a rolling save when its original is long gone."""
    public: bool = False
    user_metadata: Mapping[str, str] | None = None
    training_run: Mapping[str, object] | None = None
    weights_info: Mapping[str, object] | None = None
    claims: Mapping[str, object] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """The sum of the payload's files."""
        return sum(entry.size for entry in self.files)

    @property
    def identity(self) -> Identity:
        """Which object upstream this is a copy of."""
        return Identity(self.tinker_path, self.time.replace(microsecond=0), self.size_bytes)

    def same_payload(self, other: Manifest) -> bool:
        """Whether both describe the same bytes under the same names."""
        return sorted(self.files, key=_by_path) == sorted(other.files, key=_by_path)

    def to_bytes(self) -> bytes:
        """The file's content: JSON, stable key order, one trailing newline."""
        document = {
            "format": FORMAT,
            "tinker_path": str(self.tinker_path),
            "checkpoint_type": self.checkpoint_type,
            "time": rfc3339(self.time),
            "size_bytes": self.size_bytes,
            "expires_at": None if self.expires_at is None else rfc3339(self.expires_at),
            "first_expires_at": None if self.first_expires_at is None else rfc3339(self.first_expires_at),
            "public": self.public,
            "user_metadata": None if self.user_metadata is None else dict(self.user_metadata),
            "training_run": None if self.training_run is None else dict(self.training_run),
            "weights_info": None if self.weights_info is None else dict(self.weights_info),
            "fidelity": self.fidelity,
            "source": self.source,
            "claims": dict(self.claims),
            "files": [{"path": str(entry.path), "size": entry.size, "sha256": entry.sha256} for entry in self.files],
            "total_bytes": self.total_bytes,
            "committed_at": rfc3339(self.committed_at),
            "tool_version": self.tool_version,
        }
        return json_bytes(document)

    @classmethod
    def from_bytes(cls, content: bytes) -> Manifest:
        """Read a manifest file.

        Raises ManifestInvalid, also for a format that is newer than ours.
        """
        try:
            document = json.loads(content)
            return cls._from_json(document)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, PathInvalid) as error:
            message = f"not a readable manifest: {type(error).__name__}: {error}"
            raise ManifestInvalid(message) from error

    @classmethod
    def _from_json(cls, document: dict[str, Any]) -> Manifest:
        if document["format"] != FORMAT:
            message = f"manifest format {document['format']!r}; this version reads {FORMAT}"
            raise ValueError(message)
        files = tuple(
            FileEntry(PayloadPath.parse(entry["path"]), int(entry["size"]), str(entry["sha256"]))
            for entry in document["files"]
        )
        expires = document.get("expires_at")
        first = document.get("first_expires_at", expires)
        size = document.get("size_bytes")
        return cls(
            tinker_path=TinkerPath.parse(document["tinker_path"]),
            checkpoint_type=str(document["checkpoint_type"]),
            time=parse_time(document["time"]),
            files=files,
            source=str(document["source"]),
            fidelity=str(document["fidelity"]),
            committed_at=parse_time(document["committed_at"]),
            tool_version=str(document.get("tool_version", "")),
            size_bytes=None if size is None else int(size),
            expires_at=None if expires is None else parse_time(expires),
            first_expires_at=None if first is None else parse_time(first),
            public=bool(document.get("public", False)),
            user_metadata=document.get("user_metadata"),
            training_run=document.get("training_run"),
            weights_info=document.get("weights_info"),
            claims=document.get("claims") or {},
        )


def _by_path(entry: FileEntry) -> tuple[str, ...]:
    return entry.path.parts
