"""Re-reading replicas to find damage. Reads and compares; what to do about damage is the caller's business."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import structlog

from tinker_sync.errors import TinkerSyncError
from tinker_sync.integrity import judge_read_back

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Executor

    from tinker_sync.model.evidence import Defect
    from tinker_sync.model.paths import TinkerPath
    from tinker_sync.model.work import Replica
    from tinker_sync.ports import Catalog, Clock, Destination

log = structlog.get_logger()


class _Stopped(Exception):
    """Nobody waits for the rest."""


@dataclass(slots=True)
class ScrubResult:
    """`checked` and what was damaged, with every defect."""

    checked: int = 0
    damaged: dict[str, tuple[Replica, tuple[Defect, ...]]] = field(default_factory=dict)
    """Directory below the root to replica and defects."""
    vanished: list[Replica] = field(default_factory=list)
    """Moved away while they were read, by a writer that had the right to: no damage."""


class Scrubber:
    """Reads replicas back, several at a time.

    `still_there` says whether the catalog still has a replica in a directory; a reader without the lock needs it.
    `record` is off for a reader without the lock.
    """

    def __init__(
        self,
        *,
        destination: Destination,
        catalog: Catalog,
        clock: Clock,
        readers: Executor,
        at_a_time: int,
        still_there: Callable[[str], bool],
        record: bool,
    ) -> None:
        self._destination = destination
        self._catalog = catalog
        self._clock = clock
        self._readers = readers
        self._at_a_time = at_a_time
        self._still_there = still_there
        self._record = record

    async def scrub(
        self,
        replicas: Sequence[Replica],
        advanced: Callable[[int], None] = lambda _: None,
    ) -> ScrubResult:
        """Read all of them. `advanced` hears the bytes, from reader threads."""
        result = ScrubResult()
        turn = asyncio.Semaphore(self._at_a_time)
        stopped = threading.Event()

        def count(received: int) -> None:
            if stopped.is_set():
                raise _Stopped
            advanced(received)

        async def one(replica: Replica) -> None:
            async with turn:
                await self._check(replica, result, count)

        try:
            async with asyncio.TaskGroup() as group:
                for replica in replicas:
                    group.create_task(one(replica))
        finally:
            stopped.set()  # a thread cannot be cancelled: it ends at its next piece
        return result

    async def _check(self, replica: Replica, result: ScrubResult, advanced: Callable[[int], None]) -> None:
        loop = asyncio.get_running_loop()
        defects = await loop.run_in_executor(self._readers, partial(self._look, replica, advanced))
        if defects and not await loop.run_in_executor(self._readers, self._still_there, replica.directory):
            result.vanished.append(replica)
            return
        result.checked += 1
        if defects:
            result.damaged[replica.directory] = (replica, defects)
            log.error("replica.damaged", checkpoint=str(replica.path), defects=[str(defect) for defect in defects[:5]])
        if self._record:
            words = [str(defect) for defect in defects]
            await loop.run_in_executor(
                self._readers, self._catalog.mark_verified, replica.directory, self._clock.now(), words
            )

    def _look(self, replica: Replica, advanced: Callable[[int], None]) -> tuple[Defect, ...]:
        return judge_read_back(replica, self._destination.read(replica.directory, advanced))


def choose(replicas: Sequence[Replica], paths: Sequence[TinkerPath]) -> Sequence[Replica]:
    """Those that are named, or all of them. Raises TinkerSyncError for what is not here."""
    if not paths:
        return replicas
    wanted, here = set(paths), {replica.path for replica in replicas}
    missing = [str(path) for path in paths if path not in here]
    if missing:
        message = f"not here: {', '.join(missing)}; see `tinker-sync ls`"
        raise TinkerSyncError(message)
    return [replica for replica in replicas if replica.path in wanted]
