"""The one place where everything is put together; settings end here as plain arguments."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import structlog

from tinker_sync import __version__
from tinker_sync.acquire.archive import ArchiveSource
from tinker_sync.acquire.directory import DirectorySource
from tinker_sync.acquire.download import Downloader
from tinker_sync.acquire.files import FilesSource
from tinker_sync.acquire.lanes import Lanes
from tinker_sync.api.account import TinkerAccount, TinkerRemover, TinkerSigner
from tinker_sync.api.client import SDK_VERSION, RestClient, access_headers
from tinker_sync.api.credentials import Credentials, CredentialSources
from tinker_sync.api.listing import AccountLister
from tinker_sync.catalog.store import CatalogDamaged, CatalogUnusable, SqlCatalog, remove_catalog
from tinker_sync.destination.files import make_directories
from tinker_sync.destination.local import Custody, LocalTree, TreeOptions
from tinker_sync.destination.lock import RootLock, control_of
from tinker_sync.destination.mounts import is_mount_point, is_network
from tinker_sync.destination.root import STATE_DIRECTORY, RootFacts, prepare_root, read_facts
from tinker_sync.destination.safeguards import FileSafeguards, read_pins
from tinker_sync.destination.space import SpaceLedger
from tinker_sync.destination.surroundings import look_around
from tinker_sync.enforcement import EnforcementSettings, Enforcer
from tinker_sync.errors import ConfigInvalid, DiskTrouble, RootLost, TinkerSyncError, WrongRoot
from tinker_sync.inventory import Holdings, pin_matcher
from tinker_sync.journal import Journal, end_of, last_events, read_events
from tinker_sync.model.events import EVENT_KINDS
from tinker_sync.model.moments import rfc3339
from tinker_sync.model.work import Damage, Replica
from tinker_sync.notify.hooks import Hooks
from tinker_sync.notify.messages import Messenger, open_channels
from tinker_sync.notify.telling import Telling
from tinker_sync.overview import Surroundings, alarms, overview, take_stock
from tinker_sync.passes import EngineSettings, Mirror
from tinker_sync.planning import Selection
from tinker_sync.queue import MemoryQueue
from tinker_sync.retention import KeepBest, Policy, RetentionRules
from tinker_sync.scrub import Scrubber
from tinker_sync.transfer import Transferrer
from tinker_sync.transport import ApiTransport, StorageTransport, Throttle
from tinker_sync.web.views import ViewSettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from tinker_sync.config import LocalPolicy, RemotePolicy, Settings
    from tinker_sync.model.deeds import Deed
    from tinker_sync.model.work import Trashed
    from tinker_sync.ports import Clock, Reporter

log = structlog.get_logger()
USER_AGENT: Final = f"tinker-sync/{__version__}"
CATALOG_FILE: Final = "catalog.db"
LOCK_FILE: Final = "lock"
_RATE_OF_ONE: Final = 4_000_000
"""Bytes per second that one connection to a storage brings nearly everywhere."""
LEAST_TOKEN: Final = 16
"""Characters of `[status] token_file`."""


class SystemClock:
    """A `ports.Clock`: the real one."""

    def now(self) -> datetime:
        """Aware UTC."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """Seconds that never go back."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await asyncio.sleep(seconds)


SYSTEM_CLOCK: Final = SystemClock()


class Silent:
    """A `ports.Reporter` that tells nobody."""

    def planned(self, transfers: int, total_bytes: int) -> None:
        """Nothing."""

    def started(self, transfer: object, expected_bytes: int | None) -> None:
        """Nothing."""

    def advanced(self, transfer: object, received: int) -> None:
        """Nothing."""

    def ended(self, transfer: object, error: str | None) -> None:
        """Nothing."""

    def happened(self, event: object) -> None:
        """Nothing."""


@dataclass(frozen=True, slots=True)
class Service:
    """The API, opened."""

    transport: ApiTransport
    client: RestClient
    credentials: Credentials
    throttle: Throttle
    """Of all bytes of checkpoints, whichever way they come."""


@dataclass(frozen=True, slots=True)
class OpenRoot:
    """A root that is ours to write: locked, checked, recovered."""

    tree: LocalTree
    catalog: SqlCatalog
    journal: Journal
    safeguards: FileSafeguards
    facts: RootFacts
    lock: RootLock
    catalog_file: Path

    def check(self) -> None:
        """Whether root, lock and catalog are still what was opened. Raises RootLost. Blocking."""
        try:
            self.tree.check()
        except DiskTrouble as error:
            raise RootLost(str(error)) from error
        if not self.lock.is_held:
            message = "the lock file was deleted or replaced: another process could write here too"
            raise RootLost(message)
        if not self.catalog.is_in_place(self.catalog_file):
            message = f"{self.catalog_file} was deleted or replaced: the next start rebuilds it"
            raise RootLost(message)


@asynccontextmanager
async def open_service(
    settings: Settings, *, observed: Callable[[str, str], None] | None = None
) -> AsyncIterator[Service]:
    """The API client with its credential; `observed` hears route and status of every request. Raises ConfigInvalid."""
    throttle = Throttle(float(settings.transfer.bandwidth))
    async with ApiTransport(
        settings.base_url,
        None,
        timeout=settings.tinker.timeout.total_seconds(),
        user_agent=USER_AGENT,
        # Servers that send archives at once do so over these: there must be some left for questions.
        connections=2 * settings.transfer.connections + 8,
        extra_headers=access_headers(),
        deprecated=lambda route, note: log.warning("api.deprecated", route=route, note=note),
        observed=observed,
        throttle=throttle,
    ) as transport:
        sources = CredentialSources.from_environment(
            key_file=settings.api_key_file, command=settings.tinker.credential_cmd
        )
        credentials = Credentials(sources, transport, sdk_version=SDK_VERSION)
        transport.use(credentials)
        yield Service(transport, RestClient(transport), credentials, throttle)


@dataclass(frozen=True, slots=True)
class Listeners:
    """Whoever is told: programs, people, and the heartbeat."""

    hooks: Hooks
    messenger: Messenger
    telling: Telling

    def configure(self, settings: Settings) -> None:
        """Go on by other settings. Raises ConfigInvalid, and then nothing has changed."""
        self.messenger.configure(*_channels(settings))
        self.hooks.configure(_programs(settings), timeout=settings.hooks.timeout.total_seconds())
        self.telling.configure(settings.notify.on)


@asynccontextmanager
async def open_listeners(
    settings: Settings, root: OpenRoot, *, patience: float | None = None
) -> AsyncIterator[Listeners]:
    """Whoever is to be told. At the end what is queued is waited for, at most `patience` seconds where that is given.

    Raises ConfigInvalid.
    """
    timeout = settings.hooks.timeout.total_seconds()
    hooks = Hooks(_programs(settings), timeout=timeout, root=str(settings.root), patience=patience)
    messenger = Messenger(*_channels(settings), user_agent=USER_AGENT, patience=patience)
    who = f"tinker-sync on {socket.gethostname()}"
    async with messenger, hooks:
        yield Listeners(hooks, messenger, Telling(messenger, root.catalog, on=settings.notify.on, who=who))


async def tell_alarms(settings: Settings, root: OpenRoot, telling: Telling) -> None:
    """After a single pass: what people should know of, and what is over. Trouble here is only logged."""
    now = SYSTEM_CLOCK.now()
    try:
        stock = take_stock(root.catalog, selection(settings))
        document = overview(stock, surroundings(settings), now=now)
        await telling.tell(alarms(document, now=now, silence=settings.notify.silence), now)
    except TinkerSyncError as error:
        log.warning("alarms.unknown", error=str(error))


def control_of_holder(settings: Settings) -> Path | None:
    """Where the process that holds the root can be asked; None when nobody holds it, or it cannot be asked."""
    try:
        return control_of(settings.state / LOCK_FILE)
    except OSError:
        return None


def _programs(settings: Settings) -> dict[str, tuple[str, ...]]:
    return {kind: getattr(settings.hooks, kind) for kind in EVENT_KINDS}


def _channels(settings: Settings) -> tuple[list[str], str | None]:
    heartbeat = settings.notify.heartbeat_url
    urls = [url.get_secret_value() for url in settings.notify.urls]
    return urls, None if heartbeat is None else heartbeat.get_secret_value()


def check_channels(settings: Settings) -> None:
    """Whether the notification URLs can be used at all. Raises ConfigInvalid."""
    open_channels(_channels(settings)[0])


def read_token(settings: Settings) -> str | None:
    """The page's token. Raises ConfigInvalid for a file that has none."""
    path = settings.status.token_file
    if path is None:
        return None
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        message = f"[status] token_file: {path} cannot be read: {reason}"
        raise ConfigInvalid(message) from error
    if len(token) < LEAST_TOKEN:
        message = f"[status] token_file: {path} holds fewer than {LEAST_TOKEN} characters: `openssl rand -hex 32` makes a good one"
        raise ConfigInvalid(message)
    return token


def surroundings(settings: Settings) -> Surroundings:
    """What the catalog does not know. Blocking."""
    return Surroundings(
        root=str(settings.root),
        enforce=settings.retention.enforce,
        min_free=int(settings.mirror.min_free),
        **look_around(settings.root, settings.state),
    )


def read_recent_events(settings: Settings, most: int) -> list[dict[str, Any]]:
    """The journal's last events, newest first. Blocking."""
    return last_events(settings.state, most)


def view_settings(settings: Settings) -> ViewSettings:
    """The page's plain arguments."""
    return ViewSettings(
        selection=selection(settings),
        price_per_gb_month=settings.retention.price_per_gb_month,
    )


@contextmanager
def open_root(
    settings: Settings, *, command: str, account: str | None = None, clock: Clock = SYSTEM_CLOCK
) -> Iterator[OpenRoot]:
    """Lock, check and recover the root for writing. Raises WrongRoot, RootBusy, CatalogUnusable."""
    root, state = settings.root, settings.state
    wanted = settings.mirror.portable_names
    facts = prepare_root(
        root,
        server=settings.base_url,
        account=account,
        state=_state_elsewhere(settings),
        portable_names=None if wanted == "auto" else wanted,
        must_be_mount=settings.mirror.must_be_mount,
        dir_mode=settings.mirror.dir_mode,
    )
    _make_state(state)
    with RootLock(state / LOCK_FILE, command=command) as lock, Journal(state) as journal:
        safeguards = FileSafeguards(state)
        custody = _Custodian(journal, safeguards, clock)
        tree = _tree(settings, facts, clock, Custody(custody.spares, custody.keeps, custody.told))
        with _open_catalog(state, tree) as catalog:
            custody.catalog = catalog
            if not catalog.bind(facts.root_id):
                message = f"{state} holds the catalog of another root: give each root a [mirror] state of its own"
                raise WrongRoot(message)
            if journal.dropped:
                log.warning("journal.repaired", dropped_bytes=journal.dropped)
                journal.append(
                    {"time": rfc3339(clock.now()), "event": "journal.repaired", "dropped_bytes": journal.dropped}
                )
            _take_up(catalog, state)
            _settle_move(tree, catalog, journal, clock)
            for committed in tree.recover():
                catalog.add_replica(committed.replica)
                if committed.superseded is not None:
                    catalog.replace_superseded(committed.replica.path, committed.superseded)
                log.info("stage.recovered", checkpoint=str(committed.replica.path))
            yield OpenRoot(tree, catalog, journal, safeguards, facts, lock, state / CATALOG_FILE)


def _take_up(catalog: SqlCatalog, state: Path) -> None:
    """What the journal tells and the catalog does not know yet."""
    known, end = catalog.journal_position(), end_of(state)
    if known <= end:
        catalog.apply(read_events(state, known))
        return
    # Lines were taken away. What the catalog took up from them stays; what the journal has now is taken up from here.
    log.warning("journal.shortened", known=known, found=end, hint="`tinker-sync history --check` tells more")
    catalog.apply([*read_events(state, (end[0], 0)), (end, {"event": "journal.shortened"})])


class _Custodian:
    """Answers what the tree asks before it lets something go by itself."""

    def __init__(self, journal: Journal, safeguards: FileSafeguards, clock: Clock) -> None:
        self._journal = journal
        self._safeguards = safeguards
        self._clock = clock
        self.catalog: SqlCatalog | None = None

    def spares(self, item: Trashed) -> bool:
        """A superseded version that is pinned, or the last copy of what was deleted by us, stays; so do all when stopped."""
        if item.path is None or item.time is None or self.catalog is None or self.stopped():
            return True
        try:
            pinned = pin_matcher(self._safeguards.pins())(item.path)
            deed = self.catalog.deeds().get((item.path, item.time.replace(microsecond=0)))
        except TinkerSyncError as error:
            log.warning("superseded.kept", checkpoint=str(item.path), error=str(error))
            return True
        return pinned or deed is not None

    def keeps(self, item: Trashed) -> bool:
        """What is pinned stays in the trash too, and everything while stopped."""
        try:
            return self.stopped() or (item.path is not None and pin_matcher(self._safeguards.pins())(item.path))
        except TinkerSyncError:
            return True

    def stopped(self) -> bool:
        """The stop flag."""
        return self._safeguards.stopped() is not None

    def told(self, item: Trashed, why: str) -> None:
        """What went into or out of the trash. The deed is done: a journal that is full does not undo it."""
        event = "local.emptied" if why == "min_free" else "local.trashed"
        facts = {} if item.path is None else {"tinker_path": str(item.path)}
        log.info("trash.emptied" if why == "min_free" else "replica.trashed", entry=item.entry, why=why, **facts)
        with suppress(DiskTrouble):
            line = {"time": rfc3339(self._clock.now()), "event": event, **facts, "entry": item.entry, "why": why}
            self._journal.append(line)


def _settle_move(tree: LocalTree, catalog: SqlCatalog, journal: Journal, clock: Clock) -> None:
    """A process died while a replica went into or out of the trash: the catalog learns where it is."""
    moving = catalog.moving()
    if moving is None:
        return
    path, directory = moving
    found = tree.find(path)
    catalog.remove_replica(directory)
    if found is not None:
        catalog.add_replica(found.replica)
        if found.superseded is not None:
            catalog.replace_superseded(path, found.superseded)
    where = "in its place" if found is not None else "in the trash"
    line = {"time": rfc3339(clock.now()), "event": "local.settled", "tinker_path": str(path), "answer": where}
    catalog.apply([(journal.append(line), line)])


def _state_elsewhere(settings: Settings) -> Path | None:
    """The state directory, when it is not the one below the root."""
    return None if settings.state == settings.root / STATE_DIRECTORY else settings.state


def _make_state(state: Path) -> None:
    try:
        make_directories(state, mode=0o700)
    except OSError as error:
        message = f"cannot make [mirror] state {state}: {error.strerror}"
        raise WrongRoot(message) from error


def _open_catalog(state: Path, tree: LocalTree) -> SqlCatalog:
    """The catalog; one of another version, or a broken one, is rebuilt from the tree."""
    path = state / CATALOG_FILE
    missing = not path.exists() or path.stat().st_size == 0
    try:
        catalog = SqlCatalog.open(path, network=is_network(state))
    except CatalogDamaged as error:
        log.warning("catalog.rebuilt", reason=str(error))
        remove_catalog(path)
        catalog, missing = SqlCatalog.open(path, network=is_network(state)), True
    if missing:
        found = [item for item in tree.list() if isinstance(item, Replica)]
        catalog.rebuild(found, tree.quarantined())
    return catalog


def rebuild_catalog(settings: Settings) -> tuple[int, list[Damage]]:
    """Delete the catalog and make it from the tree: number of replicas, and what has no readable manifest."""
    root = settings.root
    facts = read_facts(root)
    if facts is None:
        message = f"{root} is no mirror: it has no .tinker-sync/root.json. Is [mirror] root right?"
        raise WrongRoot(message)
    prepare_root(root, server=facts.server, account=facts.account, state=_state_elsewhere(settings))
    _make_state(settings.state)
    with RootLock(settings.state / LOCK_FILE, command="reindex"):
        # Nothing is let go here: what the journal knows is not read yet. The next start limits again.
        tree = _tree(settings, facts, custody=Custody(spares=lambda _: True, keeps=lambda _: True))
        tree.recover()
        damaged: list[Damage] = []
        replicas: list[Replica] = []
        for item in tree.list():
            (replicas if isinstance(item, Replica) else damaged).append(item)  # type: ignore[arg-type]
        kept, deeds = _kept_facts(settings.state / CATALOG_FILE)
        remove_catalog(settings.state / CATALOG_FILE)
        with SqlCatalog.open(settings.state / CATALOG_FILE, network=is_network(settings.state)) as catalog:
            catalog.rebuild(replicas, tree.quarantined(), kept)
            catalog.apply(read_events(settings.state))
            lost = catalog.keep_deeds(deeds)
            if lost:
                log.warning("journal.lacks", deeds=lost, hint="kept from the catalog before; the journal lost them")
        tree.repoint_latest()
        return len(replicas), damaged


def _kept_facts(path: Path) -> tuple[dict[str, Any], list[Deed]]:
    """What only the catalog knows, where it can still be read: facts, and deeds, should the journal have lost them."""
    try:
        with SqlCatalog.open(path, read_only=True) as catalog:
            return catalog.facts(), list(catalog.deeds().values())
    except CatalogUnusable:
        return {}, []


def open_tree_for_reading(settings: Settings) -> LocalTree:
    """The tree, without lock. Raises WrongRoot where there is none."""
    facts = read_facts(settings.root)
    if facts is None:
        message = f"{settings.root} is no mirror yet: run `tinker-sync sync`, or correct [mirror] root"
        raise WrongRoot(message)
    return _tree(settings, facts)


def open_catalog_for_reading(settings: Settings) -> SqlCatalog:
    """The catalog, without lock. Raises CatalogMissing, CatalogUnusable."""
    return SqlCatalog.open(settings.state / CATALOG_FILE, read_only=True)


def check_owner(settings: Settings) -> None:
    """A small file is to be changed without the lock: the root must be there, mounted and ours. Raises WrongRoot."""
    open_tree_for_reading(settings)
    if settings.mirror.must_be_mount and not is_mount_point(settings.root):
        message = f"{settings.root} is not a mount point, and [mirror] must_be_mount is true: mount it first"
        raise WrongRoot(message)
    if settings.root.stat().st_uid != os.geteuid():
        message = f"{settings.root} belongs to another user: run as its owner (sudo -u …)"
        raise WrongRoot(message)


def read_holdings(settings: Settings) -> Holdings:
    """What this side knows, without lock; nothing where nothing was mirrored yet. Raises CatalogUnusable, FixFirst."""
    pins = read_pins(settings.state)
    if not (settings.state / CATALOG_FILE).exists():
        return Holdings(pins=pins)
    with open_catalog_for_reading(settings) as catalog:
        return Holdings(
            known=catalog.known(),
            deeds=catalog.deeds(),
            standing=catalog.standing(),
            pins=pins,
            base_models=open_tree_for_reading(settings).base_models(),
            other_bytes=catalog.other_bytes(),
            types_apart=catalog.types_apart() is True,
        )


def _tree(
    settings: Settings,
    facts: RootFacts,
    clock: Clock = SYSTEM_CLOCK,
    custody: Custody | None = None,
) -> LocalTree:
    mirror = settings.mirror
    return LocalTree(
        settings.root,
        TreeOptions(
            portable_names=facts.portable_names,
            folds_names=facts.folds_names,
            file_mode=mirror.file_mode,
            dir_mode=mirror.dir_mode,
            keep_superseded=mirror.keep_superseded,
        ),
        SpaceLedger(settings.root, int(mirror.min_free)),
        clock.now,
        custody,
    )


@asynccontextmanager
async def open_mirror(
    settings: Settings,
    service: Service,
    root: OpenRoot,
    reporter: Reporter,
    *,
    command: str = "sync",
    clock: Clock = SYSTEM_CLOCK,
    observed: Callable[[str, str], None] | None = None,
) -> AsyncIterator[Mirror]:
    """The engine, with its executors: one for each purpose, so that none can starve another."""
    connections = settings.transfer.connections
    async with AsyncExitStack() as stack:
        storage = await stack.enter_async_context(
            StorageTransport(
                connections=connections,
                stall_timeout=settings.transfer.stall_timeout.total_seconds(),
                user_agent=USER_AGENT,
                observed=observed,
                throttle=service.throttle,
            )
        )
        downloader = Downloader(storage, Lanes(_lanes(settings)), clock)
        writers = stack.enter_context(ThreadPoolExecutor(connections, thread_name_prefix="write"))
        indexer = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="index"))
        account = make_account(settings, service, clock)
        signer = TinkerSigner(service.client)
        below = settings.tinker.file_urls_below
        directories = DirectorySource(Path(below) if below else None)
        transferrer = Transferrer(
            account=account,
            archive=ArchiveSource(signer, downloader, directories),
            files=FilesSource(signer, downloader, clock),
            destination=root.tree,
            catalog=root.catalog,
            clock=clock,
            reporter=reporter,
            writers=writers,
            indexer=indexer,
            marker_required=marker_required(settings),
            tool_version=__version__,
        )
        yield Mirror(
            account=account,
            transferrer=transferrer,
            enforcer=_enforcer(
                settings, service, root, account, stack, indexer, reporter, command=command, clock=clock
            ),
            destination=root.tree,
            catalog=root.catalog,
            queue=MemoryQueue(clock.monotonic),
            clock=clock,
            reporter=reporter,
            indexer=indexer,
            settings=engine_settings(settings),
        )


def _lanes(settings: Settings) -> int:
    """Connections that are used at a time; under a limit fewer, so that none waits long enough to be dropped."""
    connections, bandwidth = settings.transfer.connections, int(settings.transfer.bandwidth)
    return min(connections, max(2, bandwidth // _RATE_OF_ONE)) if bandwidth else connections


def engine_settings(settings: Settings) -> EngineSettings:
    """The engine's plain arguments."""
    return EngineSettings(
        selection=selection(settings),
        concurrency=settings.transfer.concurrency,
        connections=settings.transfer.connections,
        poll_interval=settings.poll.interval.total_seconds(),
        full_interval=settings.poll.full_interval.total_seconds(),
        small_account=5 * settings.tinker.page_size,
        enforce=settings.retention.enforce,
        rescue=settings.mirror.extend_ttl,
    )


@asynccontextmanager
async def open_enforcer(
    settings: Settings,
    service: Service,
    root: OpenRoot,
    reporter: Reporter,
    *,
    command: str,
    clock: Clock = SYSTEM_CLOCK,
) -> AsyncIterator[Enforcer]:
    """Enforcement without the engine, for single deeds by hand."""
    async with AsyncExitStack() as stack:
        indexer = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="index"))
        account = make_account(settings, service, clock)
        yield _enforcer(settings, service, root, account, stack, indexer, reporter, command=command, clock=clock)


def _enforcer(
    settings: Settings,
    service: Service,
    root: OpenRoot,
    account: TinkerAccount,
    stack: AsyncExitStack,
    indexer: ThreadPoolExecutor,
    reporter: Reporter,
    *,
    command: str,
    clock: Clock,
) -> Enforcer:
    cores = os.cpu_count() or 2
    readers = stack.enter_context(ThreadPoolExecutor(cores, thread_name_prefix="read-back"))
    return Enforcer(
        account=account,
        remover=TinkerRemover(service.client),
        destination=root.tree,
        catalog=root.catalog,
        journal=root.journal,
        safeguards=root.safeguards,
        clock=clock,
        reporter=reporter,
        readers=readers,
        indexer=indexer,
        settings=enforcement_settings(settings, command),
    )


def enforcement_settings(settings: Settings, command: str) -> EnforcementSettings:
    """Enforcement's plain arguments. Raises ConfigInvalid."""
    return EnforcementSettings(
        rules=retention_rules(settings),
        short_ttl=settings.mirror.short_ttl,
        by=command,
        max_shrink_fraction=settings.retention.max_shrink_fraction,
        trash=settings.retention.trash,
        extend_ttl_max=settings.mirror.extend_ttl_max,
        types_known_apart=types_known_apart(settings),
        reads_at_once=os.cpu_count() or 2,
    )


def make_account(settings: Settings, service: Service, clock: Clock) -> TinkerAccount:
    """The account as flow sees it."""
    lister = AccountLister(
        service.client,
        mode=settings.tinker.listing,
        page_size=settings.tinker.page_size,
        now=clock.now,
        service_time=lambda: service.client.service_time,
    )
    return TinkerAccount(service.client, lister, clock.monotonic)


def make_scrubber(tree: LocalTree, catalog: SqlCatalog, readers: ThreadPoolExecutor, *, record: bool) -> Scrubber:
    """A scrubber that reads on all cores."""
    return Scrubber(
        destination=tree,
        catalog=catalog,
        clock=SystemClock(),
        readers=readers,
        at_a_time=os.cpu_count() or 2,
        still_there=catalog.has_directory,
        record=record,
    )


def selection(settings: Settings) -> Selection:
    """Which checkpoints the configuration wants."""
    mirror = settings.mirror
    return Selection(mirror.types, mirror.include, mirror.exclude, mirror.short_ttl, mirror.short_ttl_settle)


def retention_rules(settings: Settings) -> RetentionRules:
    """The policies as values. Raises ConfigInvalid for a timezone that this host does not know."""
    retention = settings.retention
    try:
        zone = ZoneInfo(retention.timezone)
    except (ZoneInfoNotFoundError, ValueError) as error:
        message = f"[retention] timezone: {retention.timezone!r} is not known; write it like Europe/Berlin"
        raise ConfigInvalid(message) from error
    return RetentionRules(
        timezone=zone,
        min_age=retention.min_age,
        remote=tuple(_policy(section) for section in retention.remote),
        local=tuple(_policy(section) for section in retention.local),
        action=retention.action,
        grace=settings.grace,
        max_bytes=int(settings.mirror.max_bytes),
        types_apart=types_known_apart(settings),
        max_deletes=retention.max_deletes,
        max_delete_fraction=retention.max_delete_fraction,
    )


def _policy(section: RemotePolicy | LocalPolicy) -> Policy:
    best = section.keep_best
    slots = {
        "hourly": section.keep_hourly,
        "daily": section.keep_daily,
        "weekly": section.keep_weekly,
        "monthly": section.keep_monthly,
        "yearly": section.keep_yearly,
    }
    return Policy(
        name=section.name,
        types=section.types,
        include=section.include,
        base_model=section.base_model,
        metadata=section.metadata,
        keep_last=section.keep_last,
        keep_within=section.keep_within,
        keep_slots={slot: count for slot, count in slots.items() if count is not None},
        keep_every_steps=section.keep_every_steps,
        keep_names=section.keep_names,
        keep_best=None if best is None else KeepBest(best.metric, best.mode, best.count),
        delete_adapter_only=getattr(section, "delete_adapter_only", False),
        keep_orphans=getattr(section, "keep_orphans", True),
    )


def marker_required(settings: Settings) -> bool:
    """`auto`: where the official service is asked, its archives hold the marker."""
    wanted = settings.mirror.require_marker
    if wanted != "auto":
        return bool(wanted)
    return is_official(settings)


def types_known_apart(settings: Settings) -> bool:
    """Whether the server is known to leave a name's other type alone when one is deleted."""
    said = settings.tinker.types_apart
    return is_official(settings) if said == "auto" else said


def is_official(settings: Settings) -> bool:
    """Whether this is Tinker itself, and not another server that speaks its API."""
    host = urlsplit(settings.base_url).hostname or ""
    return host == "thinkingmachines.dev" or host.endswith(".thinkingmachines.dev")
