"""`tinker-sync run`: polls, transfers and retention side by side, until SIGTERM.

Each of them can wait for long without holding up the others. What a loop waits for has a deadline, and a loop that is
before its deadline counts as progress: that, and not a timer, feeds the watchdog.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog
import watchfiles

from tinker_sync.config import find_config, load_settings, reload_difference, reloaded
from tinker_sync.daemon.schedule import Backoff
from tinker_sync.errors import ConfigInvalid, ServiceTrouble, TinkerSyncError
from tinker_sync.passes import first_of
from tinker_sync.wiring import (
    Silent,
    enforcement_settings,
    engine_settings,
    make_scrubber,
    open_mirror,
    open_root,
    open_service,
    retention_rules,
)

if TYPE_CHECKING:
    from pathlib import Path

    from tinker_sync.config import Settings
    from tinker_sync.daemon.supervisor import Supervisor
    from tinker_sync.passes import Mirror
    from tinker_sync.wiring import OpenRoot

log = structlog.get_logger()

STILL: Final = 2.0
"""Seconds for which a changed configuration file must be still before it is read."""
SCRUB_IDLE: Final = 600.0
"""Seconds until it is looked again whether a replica is due to be read."""
Scrub = Callable[[timedelta], Awaitable[float | None]]
"""Reads the replica that is due the longest; returns how long that took in seconds, None when none is due."""
POLL_MOST: Final = 600.0
"""Seconds that one poll may take, with all its retries and pages, before the loop counts as hung."""
RETAIN_MOST: Final = 6 * 3600.0
"""The same for retention, which reads replicas back from the disk."""


@dataclass(slots=True)
class Beats:
    """Until when each loop may be silent."""

    now: Callable[[], float]
    deadlines: dict[str, float] = field(default_factory=dict)

    def expect(self, loop: str, seconds: float) -> None:
        """The loop says something again within so many seconds."""
        self.deadlines[loop] = self.now() + seconds

    def late(self) -> list[str]:
        """The loops that should have said something."""
        return [loop for loop, deadline in self.deadlines.items() if self.now() > deadline]


class Service:
    """The loops of one account and one root."""

    def __init__(
        self, mirror: Mirror, scrub: Scrub, settings: Settings, config: Path | None, supervisor: Supervisor
    ) -> None:
        self._mirror = mirror
        self._scrub = scrub
        self._settings = settings
        self._config = config
        self._supervisor = supervisor
        self._loop = asyncio.get_running_loop()
        self._beats = Beats(self._loop.time)
        self._backoff = Backoff(settings.poll.interval.total_seconds())
        self._wake = asyncio.Event()
        self._retaining: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Until it is cancelled. Raises TinkerSyncError for what a person must fix."""
        self._loop.add_signal_handler(signal.SIGHUP, self._on_hup)
        self._supervisor.ready()
        self._supervisor.status("starting: listing the account")
        log.info("service.started", root=str(self._settings.root), interval=self._backoff.interval)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._mirror.serve())
                group.create_task(self._poll_on(group))
                group.create_task(self._feed())
                group.create_task(self._scrub_on())
                if self._config is not None:
                    group.create_task(self._watch_config(self._config))
        except BaseExceptionGroup as several:
            raise first_of(several) from None
        finally:
            self._loop.remove_signal_handler(signal.SIGHUP)
            self._supervisor.stopping()
            log.info("service.stopped")

    async def _poll_on(self, group: asyncio.TaskGroup) -> None:
        while True:
            self._beats.expect("poll", POLL_MOST)
            try:
                result = await self._mirror.poll()
            except ServiceTrouble as error:
                delay = self._backoff.after(error, random.random())  # noqa: S311 - jitter
                log.warning("poll.failed", error=str(error), again_in=round(delay, 1))
                self._supervisor.status(f"the service is in trouble, asked again in {delay:.0f} s: {error}")
            else:
                delay = self._backoff.after_success()
                self._supervisor.status(
                    f"{result.listed} listed{'' if result.complete else ' (unproven)'}, {self._mirror.waiting} waiting, "
                    f"{len(result.failed)} failing"
                )
                if self._mirror.retention_due and (self._retaining is None or self._retaining.done()):
                    self._retaining = group.create_task(self._retain())
            self._beats.expect("poll", delay + POLL_MOST)
            self._wake.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), delay)

    async def _retain(self) -> None:
        """Beside the polls: reading replicas back takes its time."""
        self._beats.expect("retention", RETAIN_MOST)
        try:
            await self._mirror.retain()
        except TinkerSyncError as error:
            log.error("retention.failed", error=str(error))  # noqa: TRY400 - told in words
        finally:
            self._beats.deadlines.pop("retention", None)

    async def _scrub_on(self) -> None:
        """Read replicas back, one after another, a quarter of the time at most; damage is copied again by a poll."""
        while True:
            read_one = await self._scrub(self._settings.mirror.verify_every)
            if read_one is None:
                await asyncio.sleep(min(SCRUB_IDLE, self._settings.mirror.verify_every.total_seconds()))
            else:
                await asyncio.sleep(3 * read_one + 0.05)

    async def _feed(self) -> None:
        """Tell the watchdog of progress, as long as there is any."""
        if self._supervisor.watchdog is None:
            return
        while True:
            late = self._beats.late()
            if late:
                log.critical("service.hung", loops=late)
            else:
                self._supervisor.alive()
            await asyncio.sleep(self._supervisor.watchdog / 3)

    # Reloading

    def _on_hup(self) -> None:
        self._reload(retention_too=True)
        self._wake.set()

    async def _watch_config(self, config: Path) -> None:
        """The directory, not the file: editors replace it. Where inotify fails, watchfiles polls."""
        resolved = await asyncio.to_thread(config.resolve)
        names = {config.name, resolved.name}
        directories = {config.parent, resolved.parent}
        async for changes in watchfiles.awatch(
            *directories, recursive=False, step=int(STILL * 1000), debounce=int(STILL * 2000), rust_timeout=3000
        ):
            if any(path.rpartition("/")[2] in names for _, path in changes):
                self._reload(retention_too=False)

    def _reload(self, *, retention_too: bool) -> None:
        """Read the configuration again; a bad one is refused with its reason, and the old one stays."""
        self._supervisor.reloading()
        try:
            wanted = load_settings(self._config, root=self._settings.root)
            retention_rules(wanted)
        except ConfigInvalid as error:
            log.error("config.refused", error=str(error))  # noqa: TRY400 - told in words
            self._supervisor.status(f"a bad configuration was refused, the old one stays: {error}")
            self._supervisor.ready()
            return
        changes, fixed = reload_difference(self._settings, wanted)
        if fixed:
            log.warning("config.needs_restart", keys=fixed)
        if not retention_too and any(key.startswith("[retention]") for key in changes):
            log.warning("config.retention_waits", keys=changes, hint="takes effect on SIGHUP or restart")
        self._settings = reloaded(self._settings, wanted, retention=retention_too)
        self._backoff.interval = self._settings.poll.interval.total_seconds()
        self._mirror.configure(engine_settings(self._settings), enforcement_settings(self._settings, "run"))
        log.info("config.reloaded", keys=changes)
        self._supervisor.ready()


async def run(settings: Settings, config: Path | None, supervisor: Supervisor) -> int:
    """Open everything, and serve until cancelled; returns 0."""
    async with open_service(settings) as service:
        try:
            await service.credentials.headers()
        except ServiceTrouble as error:
            log.warning("credential.trouble", error=str(error))  # the loop tries again, and says so
        with open_root(settings, command="run", account=service.credentials.account) as root:
            async with open_mirror(settings, service, root, Silent(), command="run") as mirror:
                with ThreadPoolExecutor(1, thread_name_prefix="scrub") as readers, suppress(asyncio.CancelledError):
                    scrub = partial(_scrub_one, root, readers)
                    await Service(mirror, scrub, settings, find_config(config), supervisor).run()
    return 0


async def _scrub_one(root: OpenRoot, readers: ThreadPoolExecutor, verify_every: timedelta) -> float | None:
    loop = asyncio.get_running_loop()
    begun = loop.time()
    before = datetime.now(UTC) - verify_every
    due = await loop.run_in_executor(readers, root.catalog.verified_before, before, 1)
    if not due:
        return None
    await make_scrubber(root.tree, root.catalog, readers, record=True).scrub(due)
    return loop.time() - begun
