"""Progress of transfers: bars on a terminal, plain lines elsewhere. A `ports.Reporter`."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING, Final, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from tinker_sync.cli.render import printable, size

if TYPE_CHECKING:
    from tinker_sync.model.events import Event
    from tinker_sync.model.paths import TinkerPath
    from tinker_sync.model.work import Transfer

_ROWS: Final = 8
_EVERY: Final = 10.0


class Bars:
    """One bar for everything and one per transfer, the first few; redrawn four times a second."""

    log_level = "warning"
    """The bars tell what goes well."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            auto_refresh=True,
            refresh_per_second=4,
            transient=True,
        )
        self._overall: TaskID | None = None
        self._total = 0
        self._done = 0
        self._received = 0
        self._rows: dict[TinkerPath, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def planned(self, transfers: int, total_bytes: int) -> None:
        """What is still to come."""
        self._total = self._done + transfers
        if self._overall is None:
            self._overall = self._progress.add_task("", total=None)
        self._progress.update(self._overall, total=self._received + total_bytes or None, description=self._headline())

    def started(self, transfer: Transfer, expected_bytes: int | None) -> None:
        """A transfer begins to receive."""
        if len(self._rows) < _ROWS:
            label = printable(f"{transfer.path.run_id[:12]}…/{transfer.path.segment}/{transfer.path.name}")[:60]
            self._rows[transfer.path] = self._progress.add_task(label, total=expected_bytes)

    def advanced(self, transfer: Transfer, received: int) -> None:
        """More bytes came."""
        self._received += received
        if self._overall is not None:
            self._progress.advance(self._overall, received)
        row = self._rows.get(transfer.path)
        if row is not None:
            self._progress.advance(row, received)

    def ended(self, transfer: Transfer, error: str | None) -> None:
        """It is done, or failed."""
        if error is None:
            self._done += 1
        row = self._rows.pop(transfer.path, None)
        if row is not None:
            self._progress.remove_task(row)
        if self._overall is not None:
            self._progress.update(self._overall, description=self._headline())

    def happened(self, event: Event) -> None:
        """The log tells."""

    def _headline(self) -> str:
        return f"{self._done}/{self._total} checkpoints"


class Lines:
    """A line every ten seconds while bytes come; the log has the rest."""

    log_level = "info"

    def __init__(self) -> None:
        self._total = 0
        self._done = 0
        self._received = 0
        self._begun = time.monotonic()
        self._said = self._begun
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def planned(self, transfers: int, total_bytes: int) -> None:
        """What is still to come."""
        del total_bytes
        self._total = self._done + transfers

    def started(self, transfer: Transfer, expected_bytes: int | None) -> None:
        """Nothing to say yet."""

    def advanced(self, transfer: Transfer, received: int) -> None:
        """More bytes came."""
        del transfer
        self._received += received
        now = time.monotonic()
        if now - self._said >= _EVERY:
            self._said = now
            rate = self._received / (now - self._begun)
            line = f"{self._done}/{self._total} checkpoints, {size(self._received)}, {size(rate)}/s"
            sys.stderr.write(line + "\n")

    def ended(self, transfer: Transfer, error: str | None) -> None:
        """Count it."""
        del transfer
        if error is None:
            self._done += 1

    def happened(self, event: Event) -> None:
        """The log tells."""


def reporter(*, quiet: bool) -> Bars | Lines:
    """Bars on a terminal, lines elsewhere; `quiet` (for `--json`) never draws."""
    return Bars() if sys.stderr.isatty() and not quiet else Lines()
