"""What the catalog holds, kept in memory by its one writer, so that a poll reads no table.

Changed only in the turn of the transaction that wrote the same, and handed out as copies: who plans on one thread is not
disturbed by a commit on another.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from tinker_sync.planning import Known

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence
    from datetime import datetime

    from tinker_sync.model.paths import TinkerPath
    from tinker_sync.model.work import Failure, Replica


class Memory:
    """Replicas that are not superseded, failures, and each listed object's first expiry."""

    def __init__(
        self,
        replicas: Iterable[Replica],
        failures: Iterable[Failure],
        first_expiry: dict[TinkerPath, tuple[datetime, datetime | None]],
    ) -> None:
        self._replicas = {replica.path: replica for replica in replicas}
        self._paths = {replica.directory: path for path, replica in self._replicas.items()}
        self._failures = {failure.path: failure for failure in failures}
        self._first_expiry = first_expiry
        self._snapshot: Known | None = None

    def snapshot(self) -> Known:
        """All of it, as it is now; the same object until something changes."""
        if self._snapshot is None:
            self._snapshot = Known(dict(self._replicas), dict(self._failures), dict(self._first_expiry))
        return self._snapshot

    def lacks(self, shown: Collection[TinkerPath], fraction: float) -> bool:
        """Whether more than this fraction of what is listed is not among these."""
        return len(self._first_expiry.keys() - shown) > fraction * len(self._first_expiry)

    def add_replica(self, replica: Replica) -> None:
        """A row of `replicas` was written."""
        self.remove_replica(replica.directory)
        if not replica.superseded:
            self._replicas[replica.path] = replica
            self._paths[replica.directory] = replica.path
            self._failures.pop(replica.path, None)

    def remove_replica(self, directory: str) -> None:
        """A row of `replicas` was deleted."""
        self._snapshot = None
        path = self._paths.pop(directory, None)
        held = None if path is None else self._replicas.get(path)
        if held is not None and held.directory == directory:
            del self._replicas[held.path]

    def mark_verified(self, directory: str, verified_at: datetime, damaged: Sequence[str]) -> None:
        """A look at the bytes was written down."""
        self._snapshot = None
        path = self._paths.get(directory)
        replica = None if path is None else self._replicas.get(path)
        if replica is None or replica.directory != directory:
            return
        at = replica.verified_at if damaged else verified_at
        self._replicas[replica.path] = replace(replica, verified_at=at, damaged=tuple(damaged))

    def add_failure(self, failure: Failure) -> None:
        """A row of `failures` was written."""
        self._snapshot = None
        self._failures[failure.path] = failure

    def observe(
        self,
        changed: dict[TinkerPath, tuple[datetime, datetime | None]],
        gone: Iterable[TinkerPath],
        cured: Iterable[TinkerPath],
    ) -> None:
        """A listing was written down: what is new in `upstream`, what is gone from it, and from `failures`."""
        self._snapshot = None
        self._first_expiry |= changed
        for path in gone:
            self._first_expiry.pop(path, None)
        for path in cured:
            self._failures.pop(path, None)
