"""The queue of transfers, in memory: most urgent first, with some that wait for their time."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tinker_sync.model.paths import TinkerPath
    from tinker_sync.model.work import Transfer


class MemoryQueue:
    """A `Queue`. Not thread-safe: it belongs to the event loop."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._ready: list[Transfer] = []
        self._deferred: dict[TinkerPath, tuple[float, Transfer]] = {}
        self._claimed: dict[TinkerPath, Transfer] = {}
        self._successors: dict[TinkerPath, Transfer] = {}

    def offer(self, transfers: Sequence[Transfer]) -> None:
        """What is to be done now; replaces what waited, leaves what was claimed or deferred.

        Another object under a path that was deferred takes its place; under one that was claimed, it comes next.
        """
        ready: list[Transfer] = []
        for transfer in transfers:
            path = transfer.path
            if path in self._claimed:
                if self._claimed[path].identity.matches(transfer.identity):
                    self._successors.pop(path, None)
                else:
                    self._successors[path] = transfer
            elif path not in self._deferred:
                ready.append(transfer)
            elif not self._deferred[path][1].identity.matches(transfer.identity):
                del self._deferred[path]
                ready.append(transfer)
        self._ready = sorted(ready, key=_urgency, reverse=True)

    def claim(self, accept: Callable[[Transfer], bool]) -> Transfer | None:
        """The most urgent one that is ready and accepted."""
        self._wake()
        for index in range(len(self._ready) - 1, -1, -1):
            transfer = self._ready[index]
            if accept(transfer):
                del self._ready[index]
                self._claimed[transfer.path] = transfer
                return transfer
        return None

    def defer(self, transfer: Transfer, seconds: float) -> None:
        """A claimed one goes back, ready after so many seconds."""
        self._claimed.pop(transfer.path, None)
        successor = self._successors.pop(transfer.path, None)
        if successor is not None:
            self._add(successor)
        else:
            self._deferred[transfer.path] = (self._monotonic() + seconds, transfer)

    def done(self, transfer: Transfer) -> None:
        """A claimed one is over, whatever became of it."""
        self._claimed.pop(transfer.path, None)
        successor = self._successors.pop(transfer.path, None)
        if successor is not None:
            self._add(successor)

    def clear(self) -> None:
        """Forget everything that waits."""
        self._ready.clear()
        self._deferred.clear()
        self._successors.clear()

    def pending(self) -> tuple[Transfer, ...]:
        """Everything that waits, deferred ones too."""
        return (*reversed(self._ready), *(transfer for _, transfer in self._deferred.values()))

    def next_ready_in(self) -> float | None:
        """Seconds until the next deferred one is ready; None when there is none."""
        if not self._deferred:
            return None
        return max(0.0, min(at for at, _ in self._deferred.values()) - self._monotonic())

    def _add(self, transfer: Transfer) -> None:
        self._ready.append(transfer)
        self._ready.sort(key=_urgency, reverse=True)

    def _wake(self) -> None:
        now = self._monotonic()
        due = [path for path, (at, _) in self._deferred.items() if at <= now]
        if due:
            self._ready += [self._deferred.pop(path)[1] for path in due]
            self._ready.sort(key=_urgency, reverse=True)


def _urgency(transfer: Transfer) -> tuple[int, TinkerPath]:
    return transfer.priority, transfer.path
