"""What goes on now, in numbers: transfers with their rates, counters since the start, and how the loops are doing.

Kept in memory for the page, the metrics and the status line; nothing here is needed after a restart. It hears the engine
as a `ports.Reporter`, and it belongs to the event loop.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from tinker_sync.model.events import Event
    from tinker_sync.model.paths import TinkerPath
    from tinker_sync.model.work import Transfer
    from tinker_sync.ports import Reporter

_SMOOTH: Final = 5.0
"""Seconds over which a rate is smoothed."""


@dataclass(slots=True)
class Running:
    """A transfer that receives."""

    path: TinkerPath
    expected: int | None
    """Bytes, as the listing or the server said."""
    begun: float
    received: int = 0
    rate: float = 0.0
    """Bytes per second, smoothed."""
    _counted_at: float = 0.0
    _counted: int = 0

    @property
    def seconds_left(self) -> float | None:
        """None while that cannot be told."""
        if self.expected is None or self.rate <= 0:
            return None
        return max(0.0, (self.expected - self.received) / self.rate)

    def advance(self, received: int, now: float) -> None:
        """More bytes came."""
        self.received += received
        self.rest(now, at_least=0.5)

    def rest(self, now: float, at_least: float = _SMOOTH) -> None:
        """Count anew when so much time has passed: a transfer that stalls has no rate."""
        passed = now - self._counted_at
        if passed >= at_least:
            current = (self.received - self._counted) / passed
            weight = min(1.0, passed / _SMOOTH) if self.rate else 1.0
            self.rate += weight * (current - self.rate)
            self._counted_at, self._counted = now, self.received


def _nothing() -> None:
    """Nobody wants to know."""


class Activity:
    """A `ports.Reporter` that keeps count."""

    def __init__(self, now: Callable[[], datetime], monotonic: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._monotonic = monotonic
        self._running: dict[TinkerPath, Running] = {}
        self.received_bytes = 0
        """All that came, of failed transfers too."""
        self.transfer_seconds = 0.0
        """What all transfers took together."""
        self.transfers: Counter[str] = Counter()
        """By outcome: committed, or failed for this pass."""
        self.deletes: Counter[tuple[str, str]] = Counter()
        """By side and action."""
        self.requests: Counter[tuple[str, str]] = Counter()
        """By route and status."""
        self.on_request: Callable[[], None] = _nothing
        """Called after each."""
        self.committed_at: datetime | None = None
        """When the last copy was whole, since the start; aware UTC."""

    @property
    def running(self) -> tuple[Running, ...]:
        """What receives now, the oldest first."""
        return tuple(self._running.values())

    @property
    def rate(self) -> float:
        """Bytes per second, of all that runs."""
        now = self._monotonic()
        for running in self._running.values():
            running.rest(now)
        return sum(running.rate for running in self._running.values())

    def of(self, path: TinkerPath) -> Running | None:
        """One transfer, while it receives."""
        return self._running.get(path)

    def asked(self, route: str, status: str) -> None:
        """A request was answered, or was not (`status` is `error` then)."""
        self.requests[route, status] += 1
        self.on_request()

    def planned(self, transfers: int, total_bytes: int) -> None:
        """Nothing that is not asked of the queue."""

    def started(self, transfer: Transfer, expected_bytes: int | None) -> None:
        """A transfer begins to receive."""
        now = self._monotonic()
        expected = expected_bytes if expected_bytes is not None else transfer.size_bytes
        self._running[transfer.path] = Running(transfer.path, expected, now, _counted_at=now)

    def advanced(self, transfer: Transfer, received: int) -> None:
        """More bytes came."""
        self.received_bytes += received
        running = self._running.get(transfer.path)
        if running is not None:
            running.advance(received, self._monotonic())

    def ended(self, transfer: Transfer, error: str | None) -> None:
        """It receives no longer; what came of it is told by `happened`."""
        del error
        running = self._running.pop(transfer.path, None)
        if running is not None:
            self.transfer_seconds += self._monotonic() - running.begun

    def happened(self, event: Event) -> None:
        """Count what was let go, and note what came."""
        if event.kind == "committed":
            self.committed_at = self._now()
            self.transfers["committed"] += 1
        elif event.kind == "failed" and "side" not in event.facts:
            self.transfers["failed"] += 1
        elif event.kind == "deleted":
            self.deletes[event.facts.get("side", ""), event.facts.get("action", "")] += 1


@dataclass(slots=True)
class Vitals:
    """How the loops of the service are doing. Times are aware UTC."""

    started_at: datetime
    doing: str = "starting"
    """What the status line says."""
    polled_at: datetime | None = None
    """The last poll that was answered."""
    listed_at: datetime | None = None
    """The last listing that was proven complete."""
    retained_at: datetime | None = None
    scrubbed_at: datetime | None = None
    next_poll_at: datetime | None = None
    credential_works: bool | None = None
    """None until the service was asked."""
    trouble: str | None = None
    """Why the last poll failed."""
    reload_error: str | None = None
    """Why the last reload was refused."""
    reloaded_at: datetime | None = None
    waiting_changes: list[str] = field(default_factory=list)
    """Keys of the file that differ and wait for a SIGHUP or a restart."""


class Reporters:
    """Several reporters as one."""

    def __init__(self, reporters: Sequence[Reporter]) -> None:
        self._reporters = tuple(reporters)

    def add(self, reporter: Reporter) -> None:
        """One more from now on."""
        self._reporters = (*self._reporters, reporter)

    def remove(self, reporter: Reporter) -> None:
        """One less."""
        self._reporters = tuple(one for one in self._reporters if one is not reporter)

    def planned(self, transfers: int, total_bytes: int) -> None:
        """To all."""
        for reporter in self._reporters:
            reporter.planned(transfers, total_bytes)

    def started(self, transfer: Transfer, expected_bytes: int | None) -> None:
        """To all."""
        for reporter in self._reporters:
            reporter.started(transfer, expected_bytes)

    def advanced(self, transfer: Transfer, received: int) -> None:
        """To all."""
        for reporter in self._reporters:
            reporter.advanced(transfer, received)

    def ended(self, transfer: Transfer, error: str | None) -> None:
        """To all."""
        for reporter in self._reporters:
            reporter.ended(transfer, error)

    def happened(self, event: Event) -> None:
        """To all."""
        for reporter in self._reporters:
            reporter.happened(event)
