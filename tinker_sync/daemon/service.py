"""`tinker-sync run`: polls, transfers, retention, scrub, page and control socket side by side, until SIGTERM.

Each of them can wait for long without holding up the others. What a loop waits for has a deadline, and a loop that is
before its deadline counts as progress: that, and not a timer, feeds the watchdog.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import structlog
import watchfiles

from tinker_sync import __version__
from tinker_sync.activity import Activity, Reporters, Vitals
from tinker_sync.config import find_config, load_settings, reload_difference, reloaded
from tinker_sync.daemon.control import Control, control_address, controlled
from tinker_sync.daemon.schedule import Backoff
from tinker_sync.errors import (
    ConfigInvalid,
    CredentialMissing,
    CredentialRefused,
    FixFirst,
    ServiceTrouble,
    TinkerSyncError,
)
from tinker_sync.model.events import Event
from tinker_sync.model.moments import parse_time
from tinker_sync.overview import alarms
from tinker_sync.passes import first_of
from tinker_sync.web.server import StatusSite, listening
from tinker_sync.web.views import Views
from tinker_sync.web.words import size, span
from tinker_sync.wiring import (
    SYSTEM_CLOCK,
    check_channels,
    enforcement_settings,
    engine_settings,
    make_scrubber,
    open_mirror,
    open_root,
    open_service,
    open_telling,
    read_recent_events,
    read_token,
    retention_rules,
    surroundings,
    view_settings,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from tinker_sync.api.credentials import Credentials
    from tinker_sync.config import Settings
    from tinker_sync.daemon.supervisor import Supervisor
    from tinker_sync.model.evidence import Defect
    from tinker_sync.model.paths import TinkerPath
    from tinker_sync.model.work import Replica
    from tinker_sync.overview import Alarm
    from tinker_sync.passes import Mirror, PassResult
    from tinker_sync.wiring import OpenRoot, Telling

log = structlog.get_logger()

STILL: Final = 2.0
"""Seconds for which a changed configuration file must be still before it is read."""
SCRUB_IDLE: Final = 600.0
"""Seconds until it is looked again whether a replica is due to be read."""
SCRUB_SHARE: Final = 4.0
"""Reading back takes one part in so many of the time, at most."""
POLL_MOST: Final = 600.0
"""Seconds that one poll may take, with all its retries and pages, before the loop counts as hung."""
RETAIN_MOST: Final = 6 * 3600.0
"""The same for retention, which reads replicas back from the disk."""
DESCRIBE_EVERY: Final = 2.0
"""Seconds between two looks at what is to be said in the status line."""
CREDENTIAL_LOOK: Final = 5.0
"""Seconds between two looks at whether a refused credential was replaced."""
LISTEN_AGAIN: Final = 60.0
"""Seconds until an address that is taken is tried again."""
LAST_WORDS: Final = 3.0
"""Seconds that hooks and notifications have at the end."""
LATE: Final = timedelta(minutes=5)
"""An account that was not asked for so long, and for three intervals, is not `ready`."""


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


@dataclass(frozen=True, slots=True)
class Parts:
    """What the service is made of."""

    mirror: Mirror
    root: OpenRoot
    credentials: Credentials
    activity: Activity
    vitals: Vitals
    reporters: Reporters
    telling: Telling
    views: Views
    readers: ThreadPoolExecutor
    """For the scrub alone, at low priority."""


class Service:
    """The loops of one account and one root."""

    def __init__(
        self, parts: Parts, settings: Settings, config: Path | None, root_option: Path | None, supervisor: Supervisor
    ) -> None:
        self._parts = parts
        self._mirror = parts.mirror
        self._vitals = parts.vitals
        self._settings = settings
        self._config = config
        self._root_option = root_option
        self._supervisor = supervisor
        self._loop = asyncio.get_running_loop()
        self._beats = Beats(self._loop.time)
        self._backoff = Backoff(settings.poll.interval.total_seconds())
        self._wake = asyncio.Event()
        self._reloading = asyncio.Lock()
        self._retaining: asyncio.Task[None] | None = None
        self._group: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Until it is cancelled. Raises TinkerSyncError for what a person must fix."""
        self._loop.add_signal_handler(signal.SIGHUP, self._on_hup)
        self._supervisor.ready()
        self._say("starting: listing the account")
        log.info("service.started", root=str(self._settings.root), interval=self._backoff.interval)
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                group.create_task(self._mirror.serve())
                group.create_task(self._poll_on(group))
                group.create_task(self._feed())
                group.create_task(self._describe_on())
                group.create_task(self._scrub_on())
                group.create_task(self._listen_on())
                group.create_task(self._control_on(group))
                if self._config is not None:
                    group.create_task(self._watch_config(self._config))
        except BaseExceptionGroup as several:
            raise first_of(several) from None
        finally:
            self._loop.remove_signal_handler(signal.SIGHUP)
            self._supervisor.stopping()
            log.info("service.stopped")

    # Polling

    async def _poll_on(self, group: asyncio.TaskGroup) -> None:
        while True:
            self._beats.expect("poll", POLL_MOST)
            error: TinkerSyncError | None = None
            try:
                result = await self._mirror.poll()
            except FixFirst:
                raise
            except TinkerSyncError as trouble:
                error = trouble
                delay = self._backoff.after(trouble, random.random())  # noqa: S311 - jitter
                self._note_trouble(trouble, delay)
            else:
                delay = self._backoff.after_success()
                self._note_success(result)
                if self._mirror.retention_due and (self._retaining is None or self._retaining.done()):
                    self._retaining = group.create_task(self._retain())
            self._vitals.next_poll_at = datetime.now(UTC) + timedelta(seconds=delay)
            await self._tell_alarms()
            self._beats.expect("poll", delay + POLL_MOST)
            await self._wait(delay, for_credential=isinstance(error, CredentialMissing | CredentialRefused))

    async def _wait(self, delay: float, *, for_credential: bool) -> None:
        """Until the next poll is due, or something wakes it: a reload, or another credential."""
        self._wake.clear()
        ends = self._loop.time() + delay
        before = await asyncio.to_thread(self._parts.credentials.stamp) if for_credential else None
        while (left := ends - self._loop.time()) > 0 and not self._wake.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), min(left, CREDENTIAL_LOOK) if for_credential else left)
            if for_credential and await asyncio.to_thread(self._parts.credentials.stamp) != before:
                log.info("credential.changed")
                self._parts.credentials.forget()
                return

    def _note_success(self, result: PassResult) -> None:
        now = datetime.now(UTC)
        if self._vitals.trouble is not None:
            log.info("service.recovered", after=self._vitals.trouble)
        self._vitals.polled_at = now
        self._vitals.credential_works = True
        self._vitals.trouble = None
        if result.complete:
            self._vitals.listed_at = now
            self._parts.telling.proven()

    def _note_trouble(self, error: TinkerSyncError, delay: float) -> None:
        log.warning("poll.failed", error=str(error), again_in=round(delay, 1))
        self._vitals.trouble = str(error)
        if isinstance(error, CredentialMissing | CredentialRefused):
            self._vitals.credential_works = False
        if isinstance(error, ServiceTrouble):
            self._say(f"the service is in trouble, asked again in {span(delay)}: {error}")
        else:
            self._say(f"in trouble, trying again in {span(delay)}: {error}")

    async def _tell_alarms(self) -> None:
        """What people should know of, and what is over. It hurts nobody when that cannot be told."""
        now = datetime.now(UTC)
        try:
            document = await self._parts.views.document()
            found = alarms(document, now=now)
            self._add_alarms(found, document["last_pass"], now)
            await self._loop.run_in_executor(self._parts.readers, self._parts.telling.tell, found, now)
        except TinkerSyncError as error:
            log.warning("alarms.unknown", error=str(error))

    def _add_alarms(self, found: dict[Alarm, str], last: Mapping[str, Any] | None, now: datetime) -> None:
        """What the catalog does not know."""
        worse = []
        if self._vitals.credential_works is False:
            worse.append(f"the credential is not accepted: {self._vitals.trouble}")
        if self._mirror.result.enforced.error is not None:
            worse.append(f"retention cannot run: {self._mirror.result.enforced.error}")
        if worse:
            found["failure"] = "; ".join([*worse, *([found["failure"]] if "failure" in found else [])])
        listed = None if last is None else last.get("listed_at")
        since = parse_time(listed) if listed else self._vitals.started_at
        silence = self._settings.notify.silence
        if now - since > silence:
            why = f"; the last try ended with: {self._vitals.trouble}" if self._vitals.trouble else ""
            found["silence"] = f"the account was last listed completely at {since:%Y-%m-%d %H:%M} UTC{why}"

    async def _retain(self) -> None:
        """Beside the polls: reading replicas back takes its time."""
        self._beats.expect("retention", RETAIN_MOST)
        try:
            await self._mirror.retain()
            self._vitals.retained_at = datetime.now(UTC)
        except TinkerSyncError as error:
            log.error("retention.failed", error=str(error))  # noqa: TRY400 - told in words
        finally:
            self._beats.deadlines.pop("retention", None)

    # Reading back

    async def _scrub_on(self) -> None:
        """Read replicas back, one after another, a quarter of the time at most; damage is copied again by a poll."""
        while True:
            begun = self._loop.time()
            due = await self._due_to_be_read()
            if due:
                await self._read_back(due, self._parts.readers)
                self._vitals.scrubbed_at = datetime.now(UTC)
                await asyncio.sleep((SCRUB_SHARE - 1) * (self._loop.time() - begun) + 0.05)
            else:
                await asyncio.sleep(min(SCRUB_IDLE, self._settings.mirror.verify_every.total_seconds()))

    async def _due_to_be_read(self) -> list[Replica]:
        before = datetime.now(UTC) - self._settings.mirror.verify_every
        catalog = self._parts.root.catalog
        try:
            return await self._loop.run_in_executor(self._parts.readers, catalog.verified_before, before, 1)
        except TinkerSyncError as error:
            log.warning("scrub.failed", error=str(error))
            return []

    async def _read_back(
        self, replicas: Sequence[Replica], readers: ThreadPoolExecutor
    ) -> list[tuple[Replica, tuple[Defect, ...]]]:
        """The damaged ones, and what is wrong with them."""
        scrubber = make_scrubber(self._parts.root.tree, self._parts.root.catalog, readers, record=True)
        try:
            damaged = (await scrubber.scrub(replicas)).damaged
        except BaseExceptionGroup as several:
            error = first_of(several)
            if not isinstance(error, TinkerSyncError):
                raise
            log.warning("scrub.failed", error=str(error))
            return []
        for replica, defects in damaged.values():
            facts = {"side": "local", "error": f"damaged: {defects[0]}"}
            self._parts.reporters.happened(Event("failed", replica.path, facts))
        return list(damaged.values())

    # Telling

    def _say(self, text: str) -> None:
        self._vitals.doing = text
        self._supervisor.status(text)

    async def _describe_on(self) -> None:
        """The status line, kept up with what goes on."""
        while True:
            if self._vitals.trouble is None and self._vitals.polled_at is not None:
                self._say(self._description())
            await asyncio.sleep(DESCRIBE_EVERY)

    def _description(self) -> str:
        result, running = self._mirror.result, self._parts.activity.running
        parts = [f"{result.listed} listed{'' if result.complete else ' (unproven)'}"]
        if running:
            parts.append(f"copying {len(running)} at {size(self._parts.activity.rate)}/s")
        parts.append(f"{max(0, self._mirror.waiting - len(running))} waiting")
        parts.append(f"{len(result.failed)} failing")
        if self._retaining is not None and not self._retaining.done():
            parts.append("enforcing retention")
        return ", ".join(parts)

    async def _listen_on(self) -> None:
        """The page and the metrics. An address that is taken is no reason not to mirror."""
        address = self._settings.status.address
        if address is None:
            return
        site = StatusSite(
            self._parts.views,
            clock=SYSTEM_CLOCK,
            version=__version__,
            token=await asyncio.to_thread(read_token, self._settings),
            recent=lambda: max(LATE, 3 * self._settings.poll.interval),
        )
        while True:
            try:
                async with listening(site, *address) as url:
                    log.info("status.listening", url=url)
                    await asyncio.Event().wait()
            except OSError as error:
                reason = error.strerror or str(error)
                log.error("status.unavailable", listen=self._settings.status.listen, error=reason)  # noqa: TRY400
                await asyncio.sleep(LISTEN_AGAIN)

    async def _control_on(self, group: asyncio.TaskGroup) -> None:
        """Do for other commands what needs the lock."""
        root = self._parts.root
        address = control_address(self._settings.state, root.facts.root_id)
        if address is None:
            log.warning(
                "control.unavailable", error="no runtime directory, and the state's path is too long for a socket"
            )
            return
        try:
            async with controlled(Control(self, self._parts.reporters, group), address):
                root.lock.announce(address)
                await asyncio.Event().wait()
        except OSError as error:
            log.warning("control.unavailable", address=str(address), error=error.strerror or str(error))

    # What the control socket asks for

    async def fetch(self, paths: Sequence[TinkerPath], say: Callable[[Mapping[str, Any]], None]) -> Mapping[str, Any]:
        """Transfer these now. Raises TinkerSyncError."""
        planned = partial(_say_planned, say)
        return (await self._mirror.fetch_beside(paths, planned)).as_json()

    async def verify(self, paths: Sequence[TinkerPath], say: Callable[[Mapping[str, Any]], None]) -> Mapping[str, Any]:
        """Read these back, all when there are none, and repair what is damaged. Raises TinkerSyncError."""
        catalog = self._parts.root.catalog
        replicas = await asyncio.to_thread(catalog.replicas)
        if paths:
            wanted, here = set(paths), {replica.path for replica in replicas}
            missing = [str(path) for path in paths if path not in here]
            if missing:
                message = f"not here: {', '.join(missing)}; see `tinker-sync ls`"
                raise TinkerSyncError(message)
            replicas = [replica for replica in replicas if replica.path in wanted]
        damaged: list[tuple[Replica, tuple[Defect, ...]]] = []
        at_once = os.cpu_count() or 2
        with ThreadPoolExecutor(at_once, thread_name_prefix="verify") as readers:
            for start in range(0, len(replicas), at_once):
                damaged += await self._read_back(replicas[start : start + at_once], readers)
                checked = min(len(replicas), start + at_once)
                say({"event": "checked", "checked": checked, "of": len(replicas)})
        current = [replica for replica, _ in damaged if not replica.superseded]
        for replica in current:
            say({"event": "damaged", "path": str(replica.path)})
        failed = await self._repair(current, say) if current else {}
        return {
            "checked": len(replicas),
            "damaged": [
                {
                    "tinker_path": str(replica.path),
                    "defects": [str(defect) for defect in defects],
                    "superseded": replica.superseded,
                }
                for replica, defects in damaged
            ],
            "repaired": [str(replica.path) for replica in current if replica.path not in failed],
            "failed": {str(path): error for path, error in failed.items()},
        }

    async def _repair(
        self, damaged: Sequence[Replica], say: Callable[[Mapping[str, Any]], None]
    ) -> dict[TinkerPath, str]:
        """Fetch these again; why it did not work, for those where it did not. A poll may have been quicker."""
        outcome = await self._mirror.fetch_beside([replica.path for replica in damaged], partial(_say_planned, say))
        known = await asyncio.to_thread(self._parts.root.catalog.known)
        failed: dict[TinkerPath, str] = {}
        for replica in damaged:
            path, now = replica.path, known.replicas.get(replica.path)
            if path in outcome.failed:
                failed[path] = outcome.failed[path][0]
            elif now is None or now.damaged:
                failed[path] = outcome.skipped.get(path, "it was not served")
            elif not now.identity.matches(replica.identity):
                failed[path] = "upstream is another object now: copied as new, this one kept aside"
        return failed

    # The watchdog

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
        if self._group is not None:
            self._group.create_task(self._reload(retention_too=True))

    async def _watch_config(self, config: Path) -> None:
        """The directory, not the file: editors replace it. Where inotify fails, watchfiles polls."""
        resolved = await asyncio.to_thread(config.resolve)
        names = {config.name, resolved.name}
        directories = {config.parent, resolved.parent}
        async for changes in watchfiles.awatch(
            *directories, recursive=False, step=int(STILL * 1000), debounce=int(STILL * 2000), rust_timeout=3000
        ):
            if any(path.rpartition("/")[2] in names for _, path in changes):
                await self._reload(retention_too=False)

    async def _reload(self, *, retention_too: bool) -> None:
        """Read the configuration again; a bad one is refused with its reason, and the old one stays."""
        async with self._reloading:
            self._supervisor.reloading()
            try:
                wanted = await asyncio.to_thread(self._read_config)
                await self._take_over(wanted, retention_too=retention_too)
            except ConfigInvalid as error:
                log.error("config.refused", error=str(error))  # noqa: TRY400 - told in words
                self._vitals.reload_error = str(error)
                self._say(f"a bad configuration was refused, the old one stays: {error}")
            finally:
                self._supervisor.ready()
        self._wake.set()

    def _read_config(self) -> Settings:
        """Blocking. Raises ConfigInvalid."""
        wanted = load_settings(self._config, root=self._root_option)
        retention_rules(wanted)
        check_channels(wanted)
        return wanted

    async def _take_over(self, wanted: Settings, *, retention_too: bool) -> None:
        changes, fixed = reload_difference(self._settings, wanted)
        waiting = [] if retention_too else [key for key in changes if key.startswith("[retention]")]
        if fixed:
            log.warning("config.needs_restart", keys=fixed)
        if waiting:
            log.warning("config.retention_waits", keys=waiting, hint="takes effect on SIGHUP or restart")
        settings = reloaded(self._settings, wanted, retention=retention_too)
        self._parts.telling.configure(settings)
        self._settings = settings
        self._backoff.interval = settings.poll.interval.total_seconds()
        self._mirror.configure(engine_settings(settings), enforcement_settings(settings, "run"))
        self._parts.views.configure(view_settings(settings))
        self._vitals.reload_error = None
        self._vitals.reloaded_at = datetime.now(UTC)
        self._vitals.waiting_changes = [*fixed, *waiting]
        log.info("config.reloaded", keys=[key for key in changes if key not in waiting])


async def run(settings: Settings, config: Path | None, root_option: Path | None, supervisor: Supervisor) -> int:
    """Open everything, and serve until cancelled; returns 0."""
    read_token(settings)  # a page that cannot be protected is found out now
    activity = Activity(SYSTEM_CLOCK.now)
    vitals = Vitals(SYSTEM_CLOCK.now())
    async with open_service(settings, observed=activity.asked) as service:
        try:
            await service.credentials.headers()
        except ServiceTrouble as error:
            log.warning("credential.trouble", error=str(error))  # the loop tries again, and says so
        with (
            open_root(settings, command="run", account=service.credentials.account) as root,
            ThreadPoolExecutor(1, thread_name_prefix="scrub", initializer=_step_back) as readers,
            ThreadPoolExecutor(1, thread_name_prefix="page") as page,
        ):
            async with open_telling(settings, root, patience=LAST_WORDS) as telling:
                reporters = Reporters([activity, telling.hooks])
                async with open_mirror(
                    settings, service, root, reporters, command="run", observed=activity.asked
                ) as mirror:
                    views = Views(
                        catalog=root.catalog,
                        engine=mirror,
                        activity=activity,
                        vitals=vitals,
                        clock=SYSTEM_CLOCK,
                        reader=page,
                        surroundings=partial(surroundings, settings),
                        events=partial(read_recent_events, settings),
                        settings=view_settings(settings),
                    )
                    parts = Parts(
                        mirror, root, service.credentials, activity, vitals, reporters, telling, views, readers
                    )
                    with suppress(asyncio.CancelledError):
                        await Service(parts, settings, find_config(config), root_option, supervisor).run()
    return 0


def _say_planned(say: Callable[[Mapping[str, Any]], None], transfers: int, total_bytes: int) -> None:
    say({"event": "planned", "transfers": transfers, "bytes": total_bytes})


def _step_back() -> None:
    """The thread that reads back lets everything else go first, on the processor and, by that, at the disk."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
