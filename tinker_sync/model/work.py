"""Work and what became of it: plain data, so that it can cross a queue, a process or a network."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from tinker_sync.model.checkpoint import Identity

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from tinker_sync.model.evidence import Defect
    from tinker_sync.model.manifest import Manifest
    from tinker_sync.model.paths import TinkerPath


@dataclass(frozen=True, slots=True)
class Transfer:
    """One checkpoint's way in: which object, and how urgent."""

    path: TinkerPath
    time: datetime
    size_bytes: int | None
    priority: int
    """Absolute, lower first; made from the deadline by `planning.priority`."""
    expires_at: datetime | None = None
    first_expires_at: datetime | None = None
    """The first `expires_at` that was seen for it: its life at birth, whatever TTL it was given since."""

    @property
    def identity(self) -> Identity:
        """The object that is meant."""
        return Identity(self.path, self.time.replace(microsecond=0), self.size_bytes)


@dataclass(frozen=True, slots=True)
class Replica:
    """A committed, verified local copy, as the catalog knows it."""

    path: TinkerPath
    time: datetime
    size_bytes: int | None
    """As the service listed it."""
    directory: str
    """Below the root, `/` between encoded components."""
    total_bytes: int
    files: int
    fidelity: str
    source: str
    committed_at: datetime
    verified_at: datetime
    """When its bytes were last read back, or written."""
    manifest_sha256: str
    expires_at: datetime | None = None
    first_expires_at: datetime | None = None
    superseded: bool = False
    user_metadata: Mapping[str, str] | None = None
    damaged: tuple[str, ...] = ()
    """What the last look at its bytes found wrong; empty when nothing."""

    @property
    def identity(self) -> Identity:
        """Which object upstream this is a copy of."""
        return Identity(self.path, self.time.replace(microsecond=0), self.size_bytes)


@dataclass(frozen=True, slots=True)
class ReadBack:
    """What reading a replica from the disk brought."""

    manifest: Manifest | None
    """None when it is missing or cannot be read; then `defects` says so."""
    manifest_sha256: str
    defects: tuple[Defect, ...]


@dataclass(frozen=True, slots=True)
class Trashed:
    """What local retention let go: still whole, below `trash/`, until its time is over."""

    entry: str
    """The name of its directory in the trash."""
    path: TinkerPath | None
    """None when its manifest cannot be read."""
    time: datetime | None
    trashed_at: datetime
    total_bytes: int


class Trouble(Enum):
    """Why a checkpoint is not here yet."""

    FAILING = "failing"
    NOT_SERVED = "not-served"
    QUARANTINED = "quarantined"


@dataclass(frozen=True, slots=True)
class Failure:
    """What is remembered about a checkpoint that could not be had."""

    path: TinkerPath
    time: datetime
    size_bytes: int | None
    trouble: Trouble
    attempts: int
    error: str
    failed_at: datetime
    retry_at: datetime
    defects: tuple[str, ...] = ()
    quarantine: str = ""
    """Directory below the root that keeps the bytes, for a quarantined one."""

    @property
    def identity(self) -> Identity:
        """The object that is meant."""
        return Identity(self.path, self.time.replace(microsecond=0), self.size_bytes)


@dataclass(frozen=True, slots=True)
class Committed:
    """What a commit left behind."""

    replica: Replica
    superseded: tuple[Replica, ...] | None = None
    """All older versions of the path that are kept, where the commit moved one aside; None where it did not."""
    received: int | None = None
    """Bytes that came for it over the wire; None where nobody counted."""


@dataclass(frozen=True, slots=True)
class Skip:
    """A checkpoint that is not copied, for a stated reason that is no failure."""

    path: TinkerPath
    reason: str


@dataclass(frozen=True, slots=True)
class Damage:
    """A replica whose bytes are not what its manifest says."""

    path: TinkerPath
    directory: str
    defects: tuple[Defect, ...] = field(default=())
