"""`tinker-sync run`: polls, transfers, retention, scrub, page and control socket side by side, until SIGTERM.

Each of them can wait for long without holding up the others. What a loop waits for has a deadline, and a loop that is
before its deadline counts as progress: that, and not a timer, feeds the watchdog.
"""

from __future__ import annotations

import asyncio
import os
import random
import resource
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import structlog
import watchfiles

from tinker_sync import __version__
from tinker_sync.activity import Activity, Reporters, Vitals
from tinker_sync.catalog.store import CatalogDamaged
from tinker_sync.config import find_config, load_settings, reload_difference, reloaded, retention_difference
from tinker_sync.daemon.control import Control, control_address, controlled
from tinker_sync.daemon.schedule import Backoff
from tinker_sync.errors import (
    ConfigInvalid,
    CredentialMissing,
    CredentialRefused,
    FixFirst,
    RootLost,
    ServiceTrouble,
    TinkerSyncError,
)
from tinker_sync.model.events import Event
from tinker_sync.model.news import News
from tinker_sync.overview import alarms
from tinker_sync.passes import as_bug, first_of, not_repaired
from tinker_sync.scrub import choose
from tinker_sync.web.server import StatusSite, listening
from tinker_sync.web.views import Views
from tinker_sync.web.words import size, span
from tinker_sync.wiring import (
    SYSTEM_CLOCK,
    check_channels,
    enforcement_settings,
    engine_settings,
    make_scrubber,
    open_listeners,
    open_mirror,
    open_root,
    open_service,
    read_recent_events,
    read_token,
    retention_rules,
    surroundings,
    view_settings,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from tinker_sync.api.credentials import Credentials
    from tinker_sync.config import Settings
    from tinker_sync.daemon.supervisor import Supervisor
    from tinker_sync.model.evidence import Defect
    from tinker_sync.model.paths import TinkerPath
    from tinker_sync.model.work import Replica
    from tinker_sync.passes import Mirror
    from tinker_sync.wiring import Listeners, OpenRoot

log = structlog.get_logger()

STILL: Final = 2.0
"""Seconds for which a changed configuration file must be still before it is read."""
CONFIG_LOOK: Final = 10.0
"""Seconds between two looks at the file when nothing was seen to happen."""
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
ACCOUNT_MOST: Final = 20.0
"""Seconds that the start waits for the service to say whose account it is."""
LISTEN_AGAIN: Final = 60.0
"""Seconds until an address that is taken is tried again."""
LAST_WORDS: Final = 1.5
"""Seconds that hooks, and then notifications, have at the end."""
LATE: Final = timedelta(minutes=5)
"""A proven listing may be so old, and three intervals, and two full intervals; then the service is not `ready`."""
ALARM_LOOK: Final = 60.0
"""Seconds between two looks at the alarms when nothing happened: silence is noticed though a poll hangs."""


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
    listeners: Listeners
    views: Views
    readers: ThreadPoolExecutor
    """For the scrub alone, at low priority."""
    teller: ThreadPoolExecutor
    """For a look at the alarms, which no slow page holds up."""


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
        self._news = asyncio.Event()
        """Set when something came of a poll, of retention or of the scrub: time to look at the alarms."""
        self._reloading = asyncio.Lock()
        self._retaining: asyncio.Task[None] | None = None
        self._polling = False
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
                group.create_task(self._mirror.serve(partial(self._beats.expect, "transfers")))
                group.create_task(self._poll_on(group))
                group.create_task(self._alarm_on())
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
            self._loop.add_signal_handler(signal.SIGHUP, _ignore)  # it must not kill what is being closed
            self._supervisor.stopping()
            log.info("service.stopped")

    # Polling

    async def _poll_on(self, group: asyncio.TaskGroup) -> None:
        while True:
            self._beats.expect("poll", POLL_MOST)
            self._wake.clear()
            self._polling = True
            error: TinkerSyncError | None = None
            try:
                await asyncio.to_thread(self._parts.root.check)
                await self._mirror.poll()
            except (FixFirst, RootLost, CatalogDamaged):
                raise  # the next start puts it right, or says what a person must do
            except TinkerSyncError as trouble:
                error = trouble
            except Exception as bug:  # noqa: BLE001 - a bug that a poll meets ends no transfer
                error = as_bug(bug)
            self._polling = False
            if error is None:
                delay = self._backoff.after_success()
                self._note_success()
                if self._mirror.retention_due and (self._retaining is None or self._retaining.done()):
                    self._retaining = group.create_task(self._retain())
            else:
                delay = self._backoff.after(error, random.random())  # noqa: S311 - jitter
                self._note_trouble(error, delay)
            self._vitals.next_poll_at = datetime.now(UTC) + timedelta(seconds=delay)
            self._news.set()
            self._beats.expect("poll", delay + POLL_MOST)
            await self._wait(delay, for_credential=isinstance(error, CredentialMissing | CredentialRefused))

    async def _wait(self, delay: float, *, for_credential: bool) -> None:
        """Until the next poll is due, or something wakes it: a reload, or another credential."""
        ends = self._loop.time() + delay
        before = await asyncio.to_thread(self._parts.credentials.stamp) if for_credential else None
        while (left := ends - self._loop.time()) > 0 and not self._wake.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(min(left, CREDENTIAL_LOOK) if for_credential else left):
                    await self._wake.wait()
            if for_credential and await asyncio.to_thread(self._parts.credentials.stamp) != before:
                log.info("credential.changed")
                self._parts.credentials.forget()
                return

    def progressed(self) -> None:
        """A request was answered: a poll that goes on is not hung, however long the account's list is."""
        if self._polling:
            self._beats.expect("poll", POLL_MOST)
        if "retention" in self._beats.deadlines:
            self._beats.expect("retention", RETAIN_MOST)

    def _note_success(self) -> None:
        now = datetime.now(UTC)
        if self._vitals.trouble is not None:
            log.info("service.recovered", after=self._vitals.trouble)
        self._vitals.polled_at = now
        self._vitals.credential_works = True
        self._vitals.trouble = None
        self._vitals.listed_at = self._mirror.proven_at
        if self._mirror.proven_at is not None and now - self._mirror.proven_at < self._listings_apart():
            self._parts.listeners.messenger.alive()

    def _listings_apart(self) -> timedelta:
        """How old the last proven listing may be while all is well."""
        return max(LATE, 3 * self._settings.poll.interval, self._full_interval())

    def _full_interval(self) -> timedelta:
        """Two full intervals, where listings come at them."""
        return 2 * self._settings.poll.full_interval if self._mirror.is_large else timedelta(0)

    def _note_trouble(self, error: TinkerSyncError, delay: float) -> None:
        log.warning("poll.failed", error=str(error), again_in=round(delay, 1))
        self._vitals.trouble = str(error)
        if isinstance(error, CredentialMissing | CredentialRefused):
            self._vitals.credential_works = False
        if isinstance(error, ServiceTrouble):
            self._say(f"the service is in trouble, asked again in {span(delay)}: {error}")
        else:
            self._say(f"in trouble, trying again in {span(delay)}: {error}")

    async def _alarm_on(self) -> None:
        """What people should know of, and what is over. It waits for nobody, and hurts nobody when it cannot be told."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(ALARM_LOOK):
                    await self._news.wait()
            self._news.clear()
            now, parts = datetime.now(UTC), self._parts
            try:
                document = await self._loop.run_in_executor(parts.teller, parts.views.read_document)
                silence = max(self._settings.notify.silence, self._full_interval())
                if self._vitals.polled_at is None and self._vitals.trouble is None:
                    silence = timedelta.max  # the first poll is still under way
                found = alarms(document, now=now, silence=silence, begun_at=self._vitals.started_at)
                await parts.listeners.telling.tell(found, now)
            except Exception as error:  # noqa: BLE001 - see above
                text = str(error) if isinstance(error, TinkerSyncError) else str(as_bug(error))
                log.warning("alarms.unknown", error=text)
            await asyncio.sleep(1.0)

    async def _retain(self) -> None:
        """Beside the polls: reading replicas back takes its time."""
        self._beats.expect("retention", RETAIN_MOST)
        try:
            if await self._mirror.retain():
                self._vitals.retained_at = datetime.now(UTC)
        except Exception as error:  # noqa: BLE001 - a bug that retention meets ends no transfer
            log.error("retention.failed", error=str(as_bug(error)))  # noqa: TRY400 - told in words
        finally:
            self._beats.deadlines.pop("retention", None)
            self._news.set()

    # Reading back

    async def _scrub_on(self) -> None:
        """Read replicas back, one after another, a quarter of the time at most; damage is copied again by a poll."""
        while True:
            begun = self._loop.time()
            pause = min(SCRUB_IDLE, self._settings.mirror.verify_every.total_seconds())
            try:
                before = datetime.now(UTC) - self._settings.mirror.verify_every
                catalog, readers = self._parts.root.catalog, self._parts.readers
                due = await self._loop.run_in_executor(readers, catalog.verified_before, before, 1)
                if due:
                    damaged = await self._read_back(due, readers)
                    self._vitals.scrubbed_at = datetime.now(UTC)
                    pause = (SCRUB_SHARE - 1) * (self._loop.time() - begun) + 0.05
                    if damaged:
                        self._news.set()
                        self._mirror.replan()  # the next poll copies it again
            except Exception as error:  # noqa: BLE001 - what cannot be read now is read later
                text = str(error) if isinstance(error, TinkerSyncError) else str(as_bug(error))
                log.warning("scrub.failed", error=text, again_in=pause)
            await asyncio.sleep(pause)

    async def _read_back(
        self, replicas: Sequence[Replica], readers: ThreadPoolExecutor
    ) -> list[tuple[Replica, tuple[Defect, ...]]]:
        """The damaged ones, and what is wrong with them. Raises CatalogUnusable, RootLost."""
        await asyncio.to_thread(self._parts.root.check)  # a root that is not there is no damage of what was in it
        scrubber = make_scrubber(self._parts.root.tree, self._parts.root.catalog, readers, record=True)
        try:
            damaged = (await scrubber.scrub(replicas)).damaged
        except BaseExceptionGroup as several:
            raise first_of(several) from None
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
        result, running = self._mirror.shown, self._parts.activity.running
        parts = [f"{result.listed} listed{'' if result.complete else ' (unproven)'}"]
        if running:
            parts.append(f"copying {len(running)} at {size(self._parts.activity.rate)}/s")
        parts.append(f"{max(0, self._mirror.waiting - len(running))} waiting")
        parts.append(f"{len(result.failed)} failing")
        if self._retaining is not None and not self._retaining.done():
            parts.append("enforcing retention")
        if self._vitals.reload_error is not None:
            parts.append("a changed configuration was refused")
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
            recent=self._listings_apart,
        )
        news = News()
        while True:
            try:
                async with listening(site, *address) as url:
                    log.info("status.listening", url=url)
                    await asyncio.Event().wait()
            except (OSError, UnicodeError) as error:
                reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
                if news.is_new("listen", reason):
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
        replicas = choose(await asyncio.to_thread(catalog.replicas), paths)
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
        return not_repaired(damaged, outcome, await asyncio.to_thread(self._parts.root.catalog.known))

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
        """The directory, not the file: editors replace it. Where inotify fails, its times are looked at instead.

        A look at the file's own times decides, now and then also without an event: links and whole directories can be
        exchanged where nobody watches.
        """
        read = await asyncio.to_thread(_stamp, config)
        while True:
            directories = await asyncio.to_thread(_directories_of, config)
            if not directories:
                await asyncio.sleep(CONFIG_LOOK)
                continue
            try:
                async for _ in watchfiles.awatch(
                    *directories,
                    recursive=False,
                    step=int(STILL * 1000),
                    debounce=int(STILL * 2000),
                    rust_timeout=int(CONFIG_LOOK * 1000),
                    yield_on_timeout=True,
                ):
                    seen = await asyncio.to_thread(_stamp, config)
                    if seen != read:
                        read = seen
                        if seen is not None:
                            await self._reload(retention_too=False)
                        break  # what was watched may have been replaced
            except (OSError, RuntimeError) as error:
                reason = error.strerror if isinstance(error, OSError) else type(error).__name__
                log.warning("config.unwatched", error=reason, hint="its time is looked at instead")
                await self._look_at_config(config, read)

    async def _look_at_config(self, config: Path, read: tuple[int, int] | None) -> None:
        """A stat now and then; what changed since it was `read` is read when it has been still for a while."""
        seen = read
        while True:
            await asyncio.sleep(2 * STILL)
            before, seen = seen, await asyncio.to_thread(_stamp, config)
            if seen is not None and seen == before != read:
                read = seen
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
            except Exception as error:  # noqa: BLE001 - a reload ends nothing
                self._vitals.reload_error = str(as_bug(error))
                log.error("config.refused", error=self._vitals.reload_error)  # noqa: TRY400 - told in words
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
            difference = retention_difference(self._settings, wanted)
            log.warning(
                "config.retention_waits",
                difference=difference,
                hint="takes effect on SIGHUP or restart (systemctl reload)",
            )
            waiting = [f"[retention] {line}" for line in difference]
        settings = reloaded(self._settings, wanted, retention=retention_too)
        self._parts.listeners.configure(settings)
        self._settings = settings
        self._backoff.interval = settings.poll.interval.total_seconds()
        self._mirror.configure(engine_settings(settings), enforcement_settings(settings, "run"))
        self._parts.views.configure(view_settings(settings))
        self._vitals.reload_error = None
        self._vitals.reloaded_at = datetime.now(UTC)
        self._vitals.waiting_changes = [*fixed, *waiting]
        self._mirror.remarks = {"waiting_changes": self._vitals.waiting_changes}
        taken = [key for key in changes if retention_too or not key.startswith("[retention]")]
        log.info("config.reloaded", keys=taken)


async def run(settings: Settings, config: Path | None, root_option: Path | None, supervisor: Supervisor) -> int:
    """Open everything, and serve until cancelled; returns 0."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, _ignore)
    read_token(settings)  # a page that cannot be protected is found out now
    _take_descriptors()
    with suppress(asyncio.CancelledError):
        await _run(settings, config, root_option, supervisor)
    return 0


async def _run(settings: Settings, config: Path | None, root_option: Path | None, supervisor: Supervisor) -> None:
    activity = Activity(SYSTEM_CLOCK.now)
    vitals = Vitals(SYSTEM_CLOCK.now())
    async with open_service(settings, observed=activity.asked) as service:
        try:
            with supervisor.taking_long():
                async with asyncio.timeout(ACCOUNT_MOST):
                    await service.credentials.headers()  # also tells whose account it is
        except FixFirst:
            raise
        except (TinkerSyncError, TimeoutError) as error:  # the loop tries again, and says so
            log.warning("credential.trouble", error=str(error) or f"no answer within {ACCOUNT_MOST:.0f} s")
        with (
            _opened(settings, service.credentials.account, supervisor) as root,
            ThreadPoolExecutor(1, thread_name_prefix="scrub", initializer=_step_back) as readers,
            ThreadPoolExecutor(1, thread_name_prefix="page") as page,
            ThreadPoolExecutor(1, thread_name_prefix="tell") as teller,
        ):
            async with open_listeners(settings, root, patience=LAST_WORDS) as listeners:
                reporters = Reporters([activity, listeners.hooks])
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
                        mirror,
                        root,
                        service.credentials,
                        activity,
                        vitals,
                        reporters,
                        listeners,
                        views,
                        readers,
                        teller,
                    )
                    serving = Service(parts, settings, find_config(config), root_option, supervisor)
                    activity.on_request = serving.progressed
                    with suppress(asyncio.CancelledError):  # what is open is closed in peace
                        await serving.run()


@contextmanager
def _opened(settings: Settings, account: str | None, supervisor: Supervisor) -> Iterator[OpenRoot]:
    """The root. Recovering it, or a catalog that is made anew, can take longer than a start usually may."""
    with ExitStack() as stack:
        with supervisor.taking_long():
            root = stack.enter_context(open_root(settings, command="run", account=account))
        yield root


def _say_planned(say: Callable[[Mapping[str, Any]], None], transfers: int, total_bytes: int) -> None:
    say({"event": "planned", "transfers": transfers, "bytes": total_bytes})


def _ignore() -> None:
    """Nothing to reload yet, or any more."""


def _take_descriptors() -> None:
    """As many as this process may have: who connects to the page must not take them from the mirror."""
    with suppress(OSError, ValueError):
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _directories_of(config: Path) -> set[Path]:
    """Where the file, and what it is a link to, can be replaced; nothing where that cannot be told just now."""
    try:
        return {path.parent for path in (config, config.resolve()) if path.parent.is_dir()}
    except (OSError, RuntimeError):  # a loop of links, a directory that was closed
        return set()


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _step_back() -> None:
    """The thread that reads back lets everything else go first, on the processor and, by that, at the disk."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
