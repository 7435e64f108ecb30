"""The engine: list, plan, transfer. `sync` is the service's loop that stops when the queue is empty.

Polling and transferring are decoupled: a poll re-plans the queue while transfers run. A transfer holds its slot only
while bytes come; what is being made upstream, or waits for its next attempt, goes back into the queue.

What a failure leads to is decided here, in `_after`: another attempt in this pass, a back-off, a skip, or a pause of
everything because the whole server is in trouble.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Final, Literal, TypeVar

import structlog

from tinker_sync.enforcement import Allowance, Enforced
from tinker_sync.errors import (
    BeingMade,
    CredentialMissing,
    CredentialRefused,
    Defective,
    DiskTrouble,
    FixFirst,
    NoSpace,
    NotFound,
    NotServed,
    ObjectChanged,
    Overloaded,
    RequestRefused,
    ServiceTrouble,
    TinkerSyncError,
    TransferFailed,
    Unreachable,
    place_of,
)
from tinker_sync.model.checkpoint import Listing, Sighting, same_object
from tinker_sync.model.events import Event
from tinker_sync.model.moments import rfc3339
from tinker_sync.model.news import News
from tinker_sync.model.work import Failure, Skip, Trouble
from tinker_sync.planning import (
    NOT_SERVED_RETRY,
    Known,
    Selection,
    ServedRecord,
    TransferPlan,
    is_short_lived,
    plan_transfers,
    retry_delay,
    to_rescue,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from concurrent.futures import Executor

    from tinker_sync.enforcement import EnforcementSettings, Enforcer
    from tinker_sync.model.checkpoint import Checkpoint
    from tinker_sync.model.paths import TinkerPath
    from tinker_sync.model.work import Committed, Replica, Transfer
    from tinker_sync.ports import Account, Catalog, Clock, Destination, Queue, Reporter
    from tinker_sync.retention import Verdict
    from tinker_sync.transfer import Transferrer

T = TypeVar("T")
Found = TypeVar("Found", bound=Listing | Sighting)
_Outcome = tuple[Literal["committed", "failed", "skipped"], str, int]
"""What became of a transfer that was asked for: how it ended, why, and bytes."""
_NO_ALLOWANCE: Final = (
    "no room below [mirror] max_bytes, and what is here must stay: raise it, or let [[retention.local]] keep less"
)
LISTING_HOLDS: Final = 60.0
"""Seconds; retention lists again when the last listing is older."""
log = structlog.get_logger()

ATTEMPTS: Final = 3
"""Within a pass, for cuts, wrong digests, storage 5xx and expired URLs."""
BUILD_BUDGET: Final = 900.0
"""Seconds that a pass waits for an archive that is being made."""
LARGE: Final = 64_000_000
"""Bytes; larger transfers share `concurrency` slots, smaller ones only the connections."""
SERVER_PAUSES: Final = 3
"""How often `sync` waits for a server in trouble, without any success between, before it gives up."""
LONGEST_PAUSE: Final = 900.0
"""Seconds; how long a service waits at most before it asks a server in trouble again."""
_SUCCESS_NOTED_EVERY: Final = timedelta(hours=1)
_LOOP_MOST: Final = 600.0
"""Seconds within which the loop of transfers comes round."""
_SETTLE_LOOK: Final = 120.0
"""Seconds between two looks, without a listing, at whether rolling saves have settled."""
_ANSWER_HOLDS: Final = 5.0
"""Seconds for which one answer to "does the service work?" is good."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Plain arguments of the engine."""

    selection: Selection = field(default_factory=Selection)
    concurrency: int = 4
    connections: int = 16
    poll_interval: float = 60.0
    full_interval: float = 900.0
    """Seconds after which a large account is listed in full again; until then a poll reads one page."""
    small_account: int = 5000
    """Up to so many checkpoints every poll is a full listing."""
    enforce: bool = False
    """Whether `sync` carries out what retention decides."""
    rescue: bool = False
    """Whether what would expire uncopied is given a longer TTL."""


@dataclass(slots=True)
class PassResult:
    """What one pass did; `as_json` is the contract of `sync --json`."""

    listed: int = 0
    complete: bool = False
    doubts: tuple[str, ...] = ()
    transferred: list[TinkerPath] = field(default_factory=list)
    failed: dict[TinkerPath, tuple[str, str | None]] = field(default_factory=dict)
    """Path to (error, when it is tried again)."""
    skipped: dict[TinkerPath, str] = field(default_factory=dict)
    enforced: Enforced = field(default_factory=Enforced)
    bytes: int = 0
    seconds: float = 0.0
    service_error: str | None = None
    credential_refused: bool = False
    no_room: int = 0
    """Transfers that `[mirror] max_bytes` has no room for."""

    @property
    def exit_code(self) -> int:
        """0; 1 with failures; 3 when the service failed or nothing could be proven; 5 stopped. The highest wins."""
        if self.enforced.breaker is not None or self.enforced.stopped is not None:
            return 5
        if self.service_error is not None or not self.complete:
            return 3
        return 1 if self.failed or self.enforced.failed or self.enforced.error else 0

    def as_json(self) -> dict[str, object]:
        """Stable keys."""
        return {
            "listed": self.listed,
            "complete": self.complete,
            "doubts": list(self.doubts),
            "transferred": [str(path) for path in self.transferred],
            "failed": [
                {"tinker_path": str(path), "error": error, "retry_at": retry_at}
                for path, (error, retry_at) in sorted(self.failed.items())
            ]
            + [
                {"tinker_path": str(path), "error": error, "retry_at": None}
                for path, error in sorted(self.enforced.failed.items())
            ],
            "skipped": [{"tinker_path": str(path), "reason": why} for path, why in sorted(self.skipped.items())],
            "deleted": [str(path) for path in self.enforced.deleted],
            "expired": [str(path) for path in self.enforced.expired],
            "restored": [str(path) for path in self.enforced.restored],
            "extended": [str(path) for path in self.enforced.extended],
            "trashed": [str(path) for path in self.enforced.trashed],
            "withheld": [
                {"tinker_path": str(path), "reason": why} for path, why in sorted(self.enforced.withheld.items())
            ],
            "breaker": None if self.enforced.breaker is None else self.enforced.breaker.as_json(),
            "stopped": self.enforced.stopped,
            "over_bytes": self.enforced.over_bytes,
            "retention_error": self.enforced.error,
            "bytes": self.bytes,
            "seconds": round(self.seconds, 3),
            "service_error": self.service_error,
        }


@dataclass(slots=True)
class _Effort:
    """What a path has cost in this pass so far, whichever object it was of: what is overwritten all the time ends, too."""

    attempts: int = 0
    building_since: float | None = None
    building_waits: int = 0


class Mirror:
    """One engine for one account and one root."""

    def __init__(
        self,
        *,
        account: Account,
        transferrer: Transferrer,
        enforcer: Enforcer,
        destination: Destination,
        catalog: Catalog,
        queue: Queue,
        clock: Clock,
        reporter: Reporter,
        indexer: Executor,
        settings: EngineSettings,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._account = account
        self._transferrer = transferrer
        self._enforcer = enforcer
        self._destination = destination
        self._catalog = catalog
        self._queue = queue
        self._clock = clock
        self._reporter = reporter
        self._indexer = indexer
        self._settings = settings
        self._jitter = jitter
        self._rows: dict[TinkerPath, Checkpoint] = {}
        self._seen: dict[TinkerPath, tuple[datetime, Checkpoint]] = {}
        """By looks at runs, begun then: a listing that was begun before shows what was there before."""
        self._repairs: dict[TinkerPath, Replica] = {}
        self._asked_for: dict[TinkerPath, Transfer] = {}
        """What somebody named: transferred first, whatever selection, back-off and the record of refusals say."""
        self._waiters: dict[TinkerPath, list[asyncio.Future[_Outcome]]] = {}
        self._failures: dict[TinkerPath, Failure] = {}
        self._efforts: dict[TinkerPath, _Effort] = {}
        self._running: dict[TinkerPath, Transfer] = {}
        self._changed = asyncio.Event()
        self._served = ServedRecord()
        self._full = False
        self._pauses = 0
        self._paused_until = 0.0
        self._asking = asyncio.Lock()
        self._asked: tuple[float, bool] | None = None
        self._rate: float | None = None
        self._listed: tuple[float, Listing | Sighting] | None = None
        self._listed_at = float("-inf")
        self._shown = PassResult()
        """The last poll that was finished, for those who look meanwhile."""
        self._replan_at = float("-inf")
        self._page_failed = False
        self._undecided: list[Checkpoint] = []
        """Gone upstream while they were being copied."""
        self._disk_error: str | None = None
        """Why the last transfer that met the disk's end failed, until one succeeds."""
        self._news = News()
        self.proven_at: datetime | None = None
        """When the account was last listed completely."""
        self.remarks: dict[str, object] = {}
        """What `status` should know of the service besides."""
        self.retention_due = False
        """Whether a proven listing came since retention ran: a look at one page is no reason to run it, and list, again."""
        self._beat: Callable[[float], None] = _unheard
        self._patient = False
        """A service waits for a server in trouble; a command gives up after a while."""
        self.result = PassResult(enforced=enforcer.result)

    async def sync(self) -> PassResult:
        """One pass: list, then transfer until the queue is empty, polling on while that lasts.

        Raises ServiceTrouble when the account cannot be listed at all, TinkerSyncError for what a person must fix.
        """
        begun = self._clock.monotonic()
        self._served = await self._index(self._catalog.served)
        try:
            await self._poll()
            async with asyncio.TaskGroup() as group:
                polling = group.create_task(self._poll_on())
                await self._work()
                polling.cancel()
            if self.result.service_error is None:
                await self._retain_after_copying()
            await self._note_lost()
        except ServiceTrouble as error:
            self.result.service_error = str(error)
            self.result.credential_refused = isinstance(error, CredentialMissing | CredentialRefused)
            raise
        except BaseExceptionGroup as several:
            raise first_of(several) from None
        finally:
            self.result.seconds = self._clock.monotonic() - begun
            await self._save_pass()
        return self.result

    async def serve(self, beat: Callable[[float], None]) -> None:
        """Transfer whatever polls put into the queue, until this is cancelled.

        `beat` hears, again and again, within how many seconds it will hear from this loop again.
        """
        self._beat = beat
        self._served = await self._index(self._catalog.served)
        if not self._rows:  # until the first listing: what the last one showed
            self._rows = {row.path: row for row in await self._index(self._catalog.listed)}
        self._patient = True
        await self._work(forever=True)

    async def poll(self) -> PassResult:
        """One poll of the service: re-plan the queue by a listing, or by one page where that is enough.

        Raises ServiceTrouble.
        """
        begun = self._clock.monotonic()
        if begun - self._listed_at < self._settings.full_interval and self.is_large:
            await self._look_at_one_page()
            return self._shown
        self.result = PassResult(enforced=self._enforcer.result)
        try:
            await self._poll()
            if self.result.complete:
                self._listed_at = begun
                self.retention_due = True
        except TinkerSyncError as error:
            self.result.service_error = str(error)
            self.result.credential_refused = isinstance(error, CredentialMissing | CredentialRefused)
            raise
        else:
            self._shown = self.result
        finally:
            self.result.seconds = self._clock.monotonic() - begun
            await self._save_pass(keep_enforced=True)
            self._changed.set()
        return self.result

    async def retain(self) -> bool:
        """Retention of the service, beside polls and transfers: whether it ran, and well.

        What it came to the last time stays as it was told when it could decide nothing. Raises nothing that a later pass
        can mend.
        """
        self.retention_due = False
        enforced = self.result.enforced = self._enforcer.renew()
        try:
            if not await self._retain(apply=self._settings.enforce):
                return False
        except ServiceTrouble as trouble:  # the polls tell of it
            log.warning("retention.interrupted", error=str(trouble))
            return False
        except TinkerSyncError as trouble:
            enforced.error = str(trouble)
            if self._news.is_new("retention", enforced.error):
                log.error("retention.failed", error=enforced.error)  # noqa: TRY400 - told in words
        else:
            self._news.over("retention")
        await self._save_enforced()
        return enforced.error is None

    @property
    def is_large(self) -> bool:
        """Whether most polls look at one page, and a listing comes every `full_interval`."""
        return len(self._rows) > self._settings.small_account

    def replan(self) -> None:
        """The next poll decides anew even if it brings no news: something here was found damaged."""
        self._replan_at = float("-inf")

    @property
    def shown(self) -> PassResult:
        """What the last poll that was finished came to."""
        return self._shown

    @property
    def rows(self) -> Mapping[TinkerPath, Checkpoint]:
        """What the account showed last; another object after every change."""
        return self._rows

    @property
    def skipped(self) -> Mapping[TinkerPath, str]:
        """What the last pass did not copy, for a stated reason that is no failure."""
        return self._shown.skipped

    def explain(
        self, rows: Mapping[TinkerPath, Checkpoint], replicas: Mapping[TinkerPath, Replica], now: datetime
    ) -> Mapping[TinkerPath, Sequence[Verdict]]:
        """What retention would decide about these runs. Blocking. Raises FixFirst, CatalogUnusable."""
        return self._enforcer.explain(rows, replicas, now)

    @property
    def waiting(self) -> int:
        """How many transfers wait or run."""
        return len(self._queue.pending()) + len(self._running)

    def configure(self, settings: EngineSettings, enforcement: EnforcementSettings) -> None:
        """Go on by other settings: from the next poll, and for transfers that start from now on."""
        self._settings = settings
        self._enforcer.configure(enforcement)
        self._listed_at = self._replan_at = float("-inf")
        self._changed.set()

    async def _look_at_one_page(self) -> None:
        """A poll by one page; what is wrong with it is known to `status` like that of a whole one. Raises ServiceTrouble."""
        try:
            await self._peek()
        except TinkerSyncError as error:
            refused = isinstance(error, CredentialMissing | CredentialRefused)
            await self._save_facts({"service_error": str(error), "credential_refused": refused})
            self._page_failed = True
            raise
        if self._page_failed:
            await self._save_facts({"service_error": None, "credential_refused": False})
            self._page_failed = False

    async def _peek(self) -> None:
        """A large account that was listed a while ago: one page shows what is new."""
        found = self._up_to_date(await self._account.peek())
        fresh = [row for row in found.checkpoints if not self._shows(row)]
        if fresh:
            await self._index(lambda: self._catalog.observe(fresh, found.seen_at, complete=False))
            found = self._up_to_date(found)
            self._rows = self._rows | {row.path: row for row in found.checkpoints if not self._shows(row)}
        if fresh or self._clock.monotonic() >= self._replan_at:
            everything = replace(found, checkpoints=tuple(self._rows.values()))
            await self._plan(everything, await self._index(self._catalog.known))
            await self._save_pass(keep_enforced=True)
            self._changed.set()

    async def fetch(self, paths: Sequence[TinkerPath]) -> PassResult:
        """Transfer exactly these now, whatever selection and back-off say.

        Raises ServiceTrouble.
        """
        begun = self._clock.monotonic()
        outcomes = await self._ask(paths, self.result)
        self._reporter.planned(len(outcomes), sum(self._asked_for[path].size_bytes or 0 for path in outcomes))
        await self._work()
        for path, outcome in outcomes.items():
            if outcome.done():
                self._note_outcome(self.result, path, outcome.result())
        self.result.seconds = self._clock.monotonic() - begun
        return self.result

    def _note_outcome(self, result: PassResult, path: TinkerPath, outcome: _Outcome) -> None:
        """What became of one that was asked for."""
        kind, detail, size = outcome
        if kind == "failed":
            result.failed[path] = (detail, self._retry_at(path))
        elif kind == "skipped":
            result.skipped[path] = detail
        elif path not in result.transferred:
            result.transferred.append(path)
            result.bytes += size

    async def fetch_beside(self, paths: Sequence[TinkerPath], planned: Callable[[int, int], None]) -> PassResult:
        """The same for a service: asks the loop that transfers anyway, and waits for what becomes of these.

        `planned` hears how many transfers there are, and their bytes. Raises ServiceTrouble.
        """
        begun = self._clock.monotonic()
        result = PassResult()
        outcomes = await self._ask(paths, result)
        planned(len(outcomes), sum(self._asked_for[path].size_bytes or 0 for path in outcomes))
        self._changed.set()
        for path, outcome in outcomes.items():
            self._note_outcome(result, path, await outcome)
        result.seconds = self._clock.monotonic() - begun
        return result

    async def _ask(self, paths: Sequence[TinkerPath], result: PassResult) -> dict[TinkerPath, asyncio.Future[_Outcome]]:
        """Put these into the queue before everything else; what becomes of each is told by its future."""
        known = await self._index(self._catalog.known)
        for run_id in dict.fromkeys(path.run_id for path in paths):
            begun = self._clock.now()
            with suppress(NotFound):
                rows = await self._account.look(run_id)
                self._note_seen(begun, rows, [path for path in paths if path.run_id == run_id])
        wanted: list[Checkpoint] = []
        for path in dict.fromkeys(paths):
            row = self._rows.get(path)
            replica = known.replicas.get(path)
            if row is None:
                result.failed[path] = ("the service does not list it: gone, or misspelt", None)
            elif replica is not None and replica.identity.matches(row.identity) and not replica.damaged:
                result.skipped[path] = "already here"
            else:
                wanted.append(row)
                self._note_repair(path, known)
        result.listed, result.complete = len(wanted), True
        plan = self._plan_asked(wanted, known)
        result.skipped |= {skip.path: skip.reason for skip in plan.skipped}
        outcomes: dict[TinkerPath, asyncio.Future[_Outcome]] = {}
        for transfer in plan.transfers:
            self._asked_for[transfer.path] = transfer
            outcomes[transfer.path] = asyncio.get_running_loop().create_future()
            self._waiters.setdefault(transfer.path, []).append(outcomes[transfer.path])
        self._full = False
        self._offer([waiting for waiting in self._queue.pending() if waiting.path not in self._asked_for])
        return outcomes

    def _retry_at(self, path: TinkerPath) -> str | None:
        failure = self._failures.get(path)
        return None if failure is None else rfc3339(failure.retry_at.replace(microsecond=0))

    def _offer(self, transfers: Sequence[Transfer]) -> None:
        """What is to be done now, behind what somebody asked for.

        A plan takes a while: of what was overwritten since it was begun, what waits already stays.
        """
        asked = self._asked_for
        stale = {transfer.path for transfer in transfers if not self._shows(transfer)}
        current = [transfer for transfer in transfers if transfer.path not in stale]
        current += [waiting for waiting in self._queue.pending() if waiting.path in stale and self._shows(waiting)]
        self._queue.offer([*asked.values(), *(transfer for transfer in current if transfer.path not in asked)])

    def _over(
        self, transfer: Transfer, kind: Literal["committed", "failed", "skipped"], detail: str, size: int
    ) -> None:
        """Nothing more happens to it in this pass: whoever asked for it, and not for another object, is told."""
        asked = self._asked_for.get(transfer.path)
        if asked is not None and not asked.identity.matches(transfer.identity):
            return
        self._asked_for.pop(transfer.path, None)
        for waiter in self._waiters.pop(transfer.path, ()):
            if not waiter.done():
                waiter.set_result((kind, detail, size))

    async def prune(self, *, allow: int | None = None) -> PassResult:
        """Enforce retention now, transferring nothing. Raises ServiceTrouble, TinkerSyncError."""
        begun = self._clock.monotonic()
        try:
            self._note_listing(await self._survey())
            await self._note_lost()
            try:
                await self._retain(apply=True, allow=allow)
            except ServiceTrouble as error:  # what was done before is told
                self.result.service_error = str(error)
            except TinkerSyncError as error:
                if not (self.result.enforced.deleted or self.result.enforced.expired or self.result.enforced.trashed):
                    raise
                self.result.enforced.error = str(error)
        except ServiceTrouble as error:
            self.result.service_error = str(error)
            raise
        finally:
            self.result.seconds = self._clock.monotonic() - begun
            await self._save_enforced()
        return self.result

    async def _retain_after_copying(self) -> None:
        """What goes wrong here takes nothing from what was copied."""
        try:
            await self._retain(apply=self._settings.enforce)
        except ServiceTrouble as error:
            self.result.service_error = str(error)
        except TinkerSyncError as error:
            self.result.enforced.error = str(error)
            log.error("retention.failed", error=str(error))  # noqa: TRY400 - told in words

    async def _save_enforced(self) -> None:
        """`status` tells of the last pass, and of what enforcement came to since."""
        now = _summary(self.result, self._clock.now())
        await self._save_facts({key: now[key] for key in _ENFORCED})

    async def _survey(self) -> Listing | Sighting:
        self._listed = (self._clock.monotonic(), await self._enforcer.survey())
        return self._listed[1]

    async def _retain(self, *, apply: bool, allow: int | None = None) -> bool:
        """Retention by a listing that is fresh: whether there was one that proves something."""
        at, found = self._listed or (0.0, None)
        if found is None or self._clock.monotonic() - at > LISTING_HOLDS:
            found = await self._survey()
            self._note_listing(found)
        await self._enforcer.enforce(found, apply=apply, allow=allow)
        return isinstance(found, Listing)

    # Polling

    async def _poll_on(self) -> None:
        """Poll at the interval while transfers run; trouble there is no news: what is queued goes on."""
        while True:
            await self._clock.sleep(self._settings.poll_interval)
            try:
                await self._poll()
            except ServiceTrouble as error:
                log.warning("poll.failed", error=str(error))
            self._changed.set()

    async def _poll(self) -> None:
        found = await self._survey()
        known = await self._index(self._catalog.known_of_missing)
        await asyncio.to_thread(self._destination.forget_old_stages)
        self._note_listing(found)
        await self._note_lost()
        found = self._up_to_date(found)
        shown = {checkpoint.path: checkpoint for checkpoint in found.checkpoints}
        self._rows = shown if isinstance(found, Listing) else self._rows | shown
        await self._plan(found, known)

    def _up_to_date(self, found: Found) -> Found:
        """With what was seen since it was begun. Nothing may be awaited between this and what is made of it."""
        self._seen = {path: seen for path, seen in self._seen.items() if seen[0] >= found.seen_at}
        if not self._seen:
            return found
        rows = {row.path: row for row in found.checkpoints}
        for path, (_, row) in self._seen.items():
            if path not in rows or rows[path].time < row.time:
                rows[path] = row
        return replace(found, checkpoints=tuple(rows.values()))

    def _shows(self, sight: Checkpoint | Transfer) -> bool:
        """Whether what was seen last of its path is that very object."""
        row = self._rows.get(sight.path)
        return row is not None and same_object(row, sight)

    async def _plan(self, found: Listing | Sighting, known: Known) -> None:
        """Decide by what was shown what waits for transfer; a poll by one page comes with all that is known."""
        now, complete = self._clock.now(), isinstance(found, Listing)
        planning = partial(
            plan_transfers, found.checkpoints, known, self._settings.selection, now=now, bytes_per_second=self._rate
        )
        plan = await self._within_allowance(await self._index(planning), found)
        if self._settings.rescue and complete:
            refuses = self._served.server_refuses(now)
            rows = to_rescue(plan, found.checkpoints, now=now, bytes_per_second=self._rate, refuses=refuses)
            with _no_reason_not_to_copy():
                await self._enforcer.rescue(rows)
        self._replan_at = self._clock.monotonic() + _seconds_until_news(plan, known, now)
        unseen: list[Transfer] = []
        if not complete:
            shown = {checkpoint.path for checkpoint in found.checkpoints}
            unseen = [waiting for waiting in self._queue.pending() if waiting.path not in shown]
        self._failures = dict(known.failures)
        for transfer in plan.transfers:
            self._note_repair(transfer.path, known)
        self._note_plan(plan)
        if self.result.service_error is not None:
            return
        self._full = False
        self._offer([*plan.transfers, *unseen])  # absence from a sighting takes nothing out of the queue
        self._reporter.planned(len(self._queue.pending()), sum(t.size_bytes or 0 for t in self._queue.pending()))

    async def _within_allowance(self, plan: TransferPlan, found: Listing | Sighting) -> TransferPlan:
        """Without what local retention would let go at once, and what `max_bytes` has no room for."""
        allowance = Allowance()
        with _no_reason_not_to_copy():
            allowance = await self._enforcer.allowance(found, apply=self._settings.enforce)
        skipped = [
            Skip(transfer.path, f"local retention would let it go at once: {allowance.spare[transfer.path].detail}")
            for transfer in plan.transfers
            if transfer.path in allowance.spare
        ]
        wanted = [transfer for transfer in plan.transfers if transfer.path not in allowance.spare]
        left = allowance.bytes
        fitting: list[Transfer] = []
        for transfer in wanted:
            size = transfer.size_bytes or 0
            if left is not None and (size > left or left == 0):
                self._note_failed(transfer.path, _NO_ALLOWANCE, None)
                continue
            left = None if left is None else left - size
            fitting.append(transfer)
        self.result.no_room = len(wanted) - len(fitting)
        if not self.result.no_room:
            self._news.over("room")
        elif self._news.is_new("room", "full"):
            log.error("mirror.full", refused=self.result.no_room, why=_NO_ALLOWANCE)
        return replace(plan, transfers=tuple(fitting), skipped=(*plan.skipped, *skipped))

    def _note_listing(self, found: Listing | Sighting) -> None:
        if isinstance(found, Listing):
            self.result.listed, self.result.complete, self.result.doubts = len(found.checkpoints), True, ()
            self.proven_at = found.seen_at
            self._news.over("listing")
            return
        if self._news.is_new("listing", "; ".join(found.doubts)):
            for doubt in found.doubts:
                log.warning("listing.unproven", doubt=doubt)
        if not self.result.complete:  # a later doubt takes nothing from a proof
            self.result.listed, self.result.doubts = len(found.checkpoints), found.doubts

    async def _note_lost(self) -> None:
        """What a proven listing no longer has, was wanted, and ran out before it was copied: that is a loss."""
        gone = self._undecided = [*self._undecided, *self._enforcer.take_gone()]
        if not gone:
            return
        known, now = await self._index(self._catalog.known), self._clock.now()
        self._undecided = [row for row in gone if row.path in self._running]
        lost = []
        for row in gone:
            if row.path in self._running:
                continue  # it may come yet
            replica = known.replicas.get(row.path)
            here = replica is not None and replica.identity.matches(row.identity)
            wanted = self._settings.selection.refusal(row.path) is None
            ended = row.expires_at is not None and row.expires_at <= now
            if ended and wanted and not here and not is_short_lived(row, known, self._settings.selection.short_ttl):
                lost.append(row)
        for row in lost:
            log.error("checkpoint.lost", checkpoint=str(row.path), error="it ended upstream before it was copied")
            self._reporter.happened(Event("failed", row.path, {"error": "it ended upstream before it was copied"}))
        if lost:
            ended_at = [(row.path, row.expires_at or now) for row in lost]
            await self._remember(partial(self._catalog.add_lost, ended_at))

    def _note_plan(self, plan: TransferPlan) -> None:
        for skip in plan.skipped:
            if skip.path not in self.result.failed:
                self.result.skipped.setdefault(skip.path, skip.reason)
        for failure in plan.waiting:
            if failure.path not in self.result.failed:
                self._note_failed(failure.path, failure.error, failure.retry_at)

    def _note_repair(self, path: TinkerPath, known: Known) -> None:
        replica = known.replicas.get(path)
        if replica is not None and replica.damaged:
            self._repairs[path] = replica

    # Transferring

    async def _work(self, *, forever: bool = False) -> None:
        """Run transfers until nothing waits and nothing runs."""
        try:
            async with asyncio.TaskGroup() as group:
                while forever or self._running or self._queue.pending():
                    self._changed.clear()
                    await self._start_what_may(group)
                    self._beat(_LOOP_MOST)
                    if forever or self._running or self._queue.pending():
                        await self._wait_for_change()
        except BaseExceptionGroup as several:
            raise first_of(several) from None

    async def _start_what_may(self, group: asyncio.TaskGroup) -> None:
        while len(self._running) < self._settings.connections * 3 // 2:  # some are signed or made durable meanwhile
            self._beat(_LOOP_MOST)
            transfer = self._queue.claim(self._may_start)
            if transfer is None:
                return
            if not await self._refused_beforehand(transfer):
                self._running[transfer.path] = transfer
                group.create_task(self._run(transfer))

    def _may_start(self, transfer: Transfer) -> bool:
        """Large transfers share `concurrency` slots; an unknown size counts as small until it is known."""
        if self._clock.monotonic() < self._paused_until:
            return False
        if (transfer.size_bytes or 0) <= LARGE:
            return True
        large = sum(1 for running in self._running.values() if (running.size_bytes or 0) > LARGE)
        return large < self._settings.concurrency

    async def _wait_for_change(self) -> None:
        due = self._queue.next_ready_in()
        pause = self._paused_until - self._clock.monotonic()
        if pause > 0:
            due = max(pause, due or 0.0)
        waiting = asyncio.ensure_future(self._changed.wait())
        longest = _LOOP_MOST / 2
        waking = asyncio.ensure_future(self._clock.sleep(longest if due is None else min(longest, due + 0.01)))
        try:
            await asyncio.wait([waiting, waking], return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
            waking.cancel()

    async def _refused_beforehand(self, transfer: Transfer) -> bool:
        """Whether there is no point in even asking: no room, or a server that hands out nothing."""
        if self._full and not (transfer.size_bytes is not None and self._destination.room_for(transfer.size_bytes)):
            self._queue.done(transfer)
            await self._fail(transfer, NoSpace("no space: the disk is full below [mirror] min_free"))
            return True
        if transfer.path.checkpoint_type == "external":
            return False
        if transfer.path not in self._asked_for and not self._served.may_ask(self._clock.now()):
            self._queue.done(transfer)
            reason = "this server hands out no archives (asked again every 6 hours)"
            self.result.skipped[transfer.path] = reason
            return True
        return False

    async def _run(self, transfer: Transfer) -> None:
        row = self._rows.get(transfer.path)
        effort = self._efforts.setdefault(transfer.path, _Effort())
        begun = self._clock.monotonic()
        try:
            if effort.attempts or not self._shows(transfer):  # what was kept does not tell in every case
                seen = await self._look(transfer)
                if await self._is_another_now(transfer, seen):
                    return
                if seen is None and not self._shows(transfer):
                    message = "it cannot be told just now whether it was overwritten"
                    raise Unreachable(message)  # noqa: TRY301 - sorted like any other trouble
                row = self._rows.get(transfer.path)
            if row is None or not self._shows(transfer):
                self._queue.done(transfer)
                self._efforts.pop(transfer.path, None)
                self._over(transfer, "skipped", "it was overwritten or deleted meanwhile", 0)
                return
            repairs = self._repairs.get(transfer.path)
            if repairs is None and await self._transferrer.adopt(transfer):
                self._queue.done(transfer)
                self._efforts.pop(transfer.path, None)
                log.info("replica.adopted", checkpoint=str(transfer.path))
                self._over(transfer, "committed", "it was here already", 0)
                return
            committed = await self._transferrer.transfer(transfer, row, repairs=repairs)
        except TinkerSyncError as error:
            await self._after(transfer, effort, error)
        except Exception as error:  # noqa: BLE001 - a bug met by one checkpoint must not stop the others
            await self._after(transfer, effort, as_bug(error))
        except BaseException as stop:
            task = asyncio.current_task()
            if isinstance(stop, asyncio.CancelledError) and task is not None and not task.cancelling():
                await self._after(transfer, effort, as_bug(stop))  # nobody asked for it: it must not go unseen
                return
            self._queue.done(transfer)
            raise
        else:
            self._queue.done(transfer)
            await self._succeeded(transfer, committed, self._clock.monotonic() - begun)
        finally:
            if self._running.get(transfer.path) is transfer:  # and no successor
                del self._running[transfer.path]
            self._changed.set()

    async def _succeeded(self, transfer: Transfer, committed: Committed, seconds: float) -> None:
        replica = committed.replica
        self._pauses = 0
        self._disk_error = None
        self._efforts.pop(transfer.path, None)
        self._repairs.pop(transfer.path, None)
        self.result.failed.pop(transfer.path, None)
        self.result.skipped.pop(transfer.path, None)
        self.result.transferred.append(transfer.path)
        self.result.bytes += replica.total_bytes
        self._over(transfer, "committed", "", replica.total_bytes)
        if seconds > 0 and (committed.received or 0) > 1_000_000:
            rate = (committed.received or 0) / seconds
            self._rate = rate if self._rate is None else 0.7 * self._rate + 0.3 * rate
        if replica.source == "archive":
            await self._note_served()
        log.info(
            "transfer.committed",
            checkpoint=str(transfer.path),
            bytes=replica.total_bytes,
            files=replica.files,
            seconds=round(seconds, 2),
        )
        facts = {
            "directory": replica.directory,
            "bytes": str(replica.total_bytes),
            "files": str(replica.files),
            "seconds": f"{seconds:.2f}",
            "fidelity": replica.fidelity,
            "time": rfc3339(replica.time),
        }
        self._reporter.happened(Event("committed", transfer.path, facts))

    async def _note_served(self) -> None:
        """The server hands out archives; written down when that is news, and once an hour."""
        now, before = self._clock.now(), self._served.last_success
        if self._served.refused or before is None or now - before > _SUCCESS_NOTED_EVERY:
            self._served.add_success(now)
            await self._remember(partial(self._catalog.save_served, self._served))

    async def _after(self, transfer: Transfer, effort: _Effort, error: TinkerSyncError) -> None:
        """Sort a failure by what follows from it."""
        if isinstance(error, BeingMade):
            await self._wait_until_made(transfer, effort, error)
        elif isinstance(error, Overloaded) and error.status == 429:
            busy = BeingMade(str(error), status=429, retry_after=error.retry_after or 5.0)
            await self._wait_until_made(transfer, effort, busy)
        elif isinstance(error, ServiceTrouble) and not await self._service_answers():
            await self._server_in_trouble(transfer, error)
        elif isinstance(error, NotServed | NotFound):
            self._queue.done(transfer)
            await self._not_served(transfer, error)
        else:
            effort.attempts += 1
            again = isinstance(error, ObjectChanged) and effort.attempts < ATTEMPTS
            if again and await self._is_another_now(transfer, await self._look(transfer)):
                return
            if isinstance(error, NoSpace):
                self._full = True
            elif isinstance(error, TransferFailed) and error.again_now and effort.attempts < ATTEMPTS:
                delay = min(10.0, 1.0 * 3 ** (effort.attempts - 1) * (1 + self._jitter() / 2))
                log.info("transfer.again", checkpoint=str(transfer.path), attempt=effort.attempts, error=str(error))
                self._queue.defer(transfer, delay)
                return
            self._queue.done(transfer)
            await self._fail(transfer, error)

    async def _wait_until_made(self, transfer: Transfer, effort: _Effort, error: BeingMade) -> None:
        """An archive is being made: ask again, without a slot, within the budget."""
        now = self._clock.monotonic()
        if effort.building_since is None:
            effort.building_since = now
            log.info("transfer.being_made", checkpoint=str(transfer.path))
        if now - effort.building_since >= BUILD_BUDGET:
            self._queue.done(transfer)
            effort.building_since = None
            message = f"the server was still packing it, or busy, after {BUILD_BUDGET / 60:.0f} minutes"
            await self._fail(transfer, RequestRefused(message, status=error.status))
            return
        delay = error.retry_after if error.retry_after is not None else min(30.0, 1.0 * 2**effort.building_waits)
        effort.building_waits += 1
        self._queue.defer(transfer, delay)

    async def _service_answers(self) -> bool:
        """One checkpoint's odd answer is no trouble of the service: asked once for all that fail together."""
        async with self._asking:
            now = self._clock.monotonic()
            if self._asked is None or now - self._asked[0] > _ANSWER_HOLDS:
                answers = await self._account.answers()
                self._asked = (self._clock.monotonic(), answers)
            return self._asked[1]

    async def _server_in_trouble(self, transfer: Transfer, error: ServiceTrouble) -> None:
        """No fault of this checkpoint: everything pauses, and after a few pauses without success the pass ends."""
        now = self._clock.monotonic()
        if now >= self._paused_until:
            self._pauses += 1
            longest = 30.0 if self._settings.poll_interval < 30 or not self._patient else LONGEST_PAUSE
            pause = min(longest, 2.0 * 2 ** min(self._pauses, 20)) * (1 - self._jitter() / 5)
            self._paused_until = now + (error.retry_after or pause)
            log.warning("service.trouble", error=str(error), pause=round(self._paused_until - now, 1))
        if self._patient or (
            self._pauses <= SERVER_PAUSES and not isinstance(error, CredentialMissing | CredentialRefused)
        ):
            self._queue.defer(transfer, max(0.0, self._paused_until - now))
            if self._patient and transfer.path in self._waiters:
                self._over(transfer, "failed", f"{error}; it goes on trying", 0)
            return
        self.result.service_error = str(error)
        self._queue.done(transfer)
        for waiting in (transfer, *self._queue.pending()):
            self._note_failed(waiting.path, str(error), None)
            self._over(waiting, "failed", str(error), 0)
        self._queue.clear()

    async def _not_served(self, transfer: Transfer, error: RequestRefused) -> None:
        """404, 405, 410, 501: gone meanwhile, or never to be had from this server."""
        path, now = transfer.path, self._clock.now()
        self._efforts.pop(path, None)
        if isinstance(error, NotFound) and await self._is_gone(transfer):
            self.result.skipped[path] = "gone upstream while the pass ran"
            self._rows = {known: row for known, row in self._rows.items() if known != path}  # until a listing shows it
            self._over(transfer, "skipped", self.result.skipped[path], 0)
            return
        reason = f"not served by this server ({error.status}), asked again in 24 h"
        failure = Failure(
            path=path,
            time=transfer.time,
            size_bytes=transfer.size_bytes,
            trouble=Trouble.NOT_SERVED,
            attempts=1,
            error=reason,
            failed_at=now,
            retry_at=now + NOT_SERVED_RETRY,
        )
        await self._remember(partial(self._catalog.add_failure, failure))
        if path.checkpoint_type != "external":  # those come another way, and say nothing about archives
            self._served.add_refusal(path, now)
            await self._remember(partial(self._catalog.save_served, self._served))
        self.result.skipped[path] = reason
        self._over(transfer, "skipped", reason, 0)
        log.warning("transfer.not_served", checkpoint=str(path), status=error.status)

    async def _is_gone(self, transfer: Transfer) -> bool:
        rows = await self._look(transfer)
        return rows is not None and all(row.path != transfer.path for row in rows)

    async def _look(self, transfer: Transfer) -> Sequence[Checkpoint] | None:
        """Its run as it is now; None where that cannot be told."""
        begun = self._clock.now()
        try:
            rows = await self._account.look(transfer.path.run_id)
        except NotFound:
            rows = ()
        except TinkerSyncError:
            return None
        self._note_seen(begun, rows, (transfer.path,))
        return rows

    def _note_seen(self, begun: datetime, rows: Sequence[Checkpoint], paths: Sequence[TinkerPath]) -> None:
        """What a look shows of these paths is as it is now, whatever a listing says that was begun before."""
        wanted = set(paths)
        seen = {row.path: row for row in rows if row.path in wanted}
        if not all(map(self._shows, seen.values())):
            self.replan()
        self._rows = self._rows | seen
        for path in paths:
            self._seen.pop(path, None)
        self._seen |= {path: (begun, row) for path, row in seen.items()}

    async def _is_another_now(self, transfer: Transfer, seen: Sequence[Checkpoint] | None) -> bool:
        """Whether it was overwritten while it was copied: then what is there now is copied in its stead."""
        path = transfer.path
        row = next((row for row in seen or () if row.path == path), None)
        if row is None or row.identity.matches(transfer.identity):
            return False
        known, alone = None, Known()
        try:
            known = alone = await self._index(self._catalog.known)
        except TinkerSyncError as error:
            log.error("catalog.trouble", error=str(error))  # noqa: TRY400 - told in words
        log.info("transfer.overwritten", checkpoint=str(path))
        self._queue.done(transfer)
        self._note_repair(path, alone)
        if path in self._asked_for:
            plan = self._plan_asked([row], alone)
            self._asked_for |= {asked.path: asked for asked in plan.transfers}
            if not plan.transfers:
                reason = plan.skipped[0].reason if plan.skipped else "already here"
                self._over(transfer, "skipped", reason, 0)
            self._offer([waiting for waiting in self._queue.pending() if waiting.path != path])
            return True
        if known is not None:
            with _trouble_told():
                shown = Sighting(tuple(self._rows.values()), self._clock.now(), ("one run was looked at",))
                await self._plan(shown, known)
                return True
        plan = plan_transfers([row], alone, self._settings.selection, now=self._clock.now())
        self._offer([*(waiting for waiting in self._queue.pending() if waiting.path != path), *plan.transfers])
        return True

    def _plan_asked(self, rows: Sequence[Checkpoint], known: Known) -> TransferPlan:
        """What somebody named: at once, whatever selection and back-off say."""
        plan = plan_transfers(
            rows,
            type(known)(replicas=known.replicas, first_expiry=known.first_expiry),
            Selection(short_ttl=timedelta(0)),
            now=self._clock.now(),
        )
        return replace(plan, transfers=tuple(replace(transfer, priority=0) for transfer in plan.transfers))

    async def _fail(self, transfer: Transfer, error: TinkerSyncError) -> None:
        """Remember it, with the time to try again."""
        now = self._clock.now()
        before = self._failures.get(transfer.path)
        known_before = before is not None and before.identity.matches(transfer.identity)
        attempts = before.attempts + 1 if before is not None and known_before else 1
        if isinstance(error, NoSpace | DiskTrouble):
            attempts, self._disk_error = 1, str(error)  # room comes back from one moment to the next
        delay = retry_delay(attempts, expires_at=transfer.expires_at, now=now, jitter=self._jitter())
        defects = tuple(str(defect) for defect in error.defects) if isinstance(error, Defective) else ()
        quarantine = error.quarantine if isinstance(error, Defective) else ""
        failure = Failure(
            path=transfer.path,
            time=transfer.time,
            size_bytes=transfer.size_bytes,
            trouble=Trouble.QUARANTINED if quarantine else Trouble.FAILING,
            attempts=attempts,
            error=f"quarantined: {error}" if quarantine else str(error),
            failed_at=now,
            retry_at=now + delay,
            defects=defects,
            quarantine=quarantine,
        )
        self._failures[transfer.path] = failure
        self._efforts.pop(transfer.path, None)
        await self._remember(partial(self._catalog.add_failure, failure))
        self._note_failed(transfer.path, failure.error, failure.retry_at)
        self._over(transfer, "failed", failure.error, 0)
        log.error(
            "transfer.failed",
            checkpoint=str(transfer.path),
            error=failure.error,
            retry_at=rfc3339(failure.retry_at.replace(microsecond=0)),
        )
        facts = {"error": failure.error, "retry_at": rfc3339(failure.retry_at.replace(microsecond=0))}
        self._reporter.happened(Event("failed", transfer.path, facts))

    def _note_failed(self, path: TinkerPath, error: str, retry_at: datetime | None) -> None:
        self.result.skipped.pop(path, None)
        self.result.failed[path] = (error, None if retry_at is None else rfc3339(retry_at.replace(microsecond=0)))

    async def _remember(self, work: Callable[[], None]) -> None:
        """Write something down that the next pass would only find out again: a full state disk ends no transfer."""
        with _trouble_told():
            await self._index(work)

    async def _save_pass(self, *, keep_enforced: bool = False) -> None:
        """For `status`. A service's polls say nothing of retention, which runs beside them."""
        now = {**_summary(self.result, self._clock.now()), **self.remarks, "disk_error": self._disk_error}
        proven = None if self.proven_at is None else rfc3339(self.proven_at)

        def save() -> None:
            before = self._catalog.last_pass() or {}
            kept = {key: before[key] for key in _ENFORCED if keep_enforced and key in before}
            ever = {"listed_at": proven or before.get("listed_at"), "begun_at": before.get("begun_at") or now["at"]}
            self._catalog.save_pass({**now, **kept, **ever})

        with suppress(TinkerSyncError):
            await self._index(save)

    async def _save_facts(self, facts: Mapping[str, object]) -> None:
        """Change these of the last summary."""

        def save() -> None:
            before = self._catalog.last_pass() or _summary(self.result, self._clock.now())
            self._catalog.save_pass({**before, **facts})

        with suppress(TinkerSyncError):
            await self._index(save)

    async def _index(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._indexer, work)


@contextmanager
def _trouble_told() -> Iterator[None]:
    """What can be done without goes on."""
    try:
        yield
    except TinkerSyncError as error:
        log.error("catalog.trouble", error=str(error))  # noqa: TRY400 - told in words


@contextmanager
def _no_reason_not_to_copy() -> Iterator[None]:
    """Trouble of the pins, the journal or the state's disk is told, and copying goes on."""
    try:
        yield
    except (FixFirst, DiskTrouble) as error:
        log.error("retention.trouble", error=str(error))  # noqa: TRY400 - told in words


def failed_pass(error: ServiceTrouble, before: Mapping[str, object] | None) -> dict[str, object]:
    """What `status` is to say of a pass that could not even begin, after the pass `before`."""
    refused = isinstance(error, CredentialMissing | CredentialRefused)
    now = _summary(PassResult(service_error=str(error), credential_refused=refused), datetime.now(UTC))
    kept = before or {}
    return {**now, "listed_at": kept.get("listed_at"), "begun_at": kept.get("begun_at") or now["at"]}


def _summary(result: PassResult, now: datetime) -> dict[str, object]:
    return {
        "at": rfc3339(now),
        "listed": result.listed,
        "complete": result.complete,
        "transferred": len(result.transferred),
        "failed": len(result.failed),
        "skipped": len(result.skipped),
        "deleted": len(result.enforced.deleted),
        "due": result.enforced.due_remote,
        "due_bytes": result.enforced.due_bytes,
        "breaker": None if result.enforced.breaker is None else result.enforced.breaker.as_json(),
        "over_bytes": result.enforced.over_bytes,
        "retention_error": result.enforced.error,
        "no_room": result.no_room,
        "bytes": result.bytes,
        "seconds": round(result.seconds, 3),
        "service_error": result.service_error,
        "credential_refused": result.credential_refused,
    }


_ENFORCED: Final = ("deleted", "due", "due_bytes", "breaker", "over_bytes", "retention_error")
"""What of a summary retention says."""


def _seconds_until_news(plan: TransferPlan, known: Known, now: datetime) -> float:
    """When the same rows would give another plan: a retry is due, or a rolling save has settled."""
    waits = [(failure.retry_at - now).total_seconds() for failure in plan.waiting]
    if any(path not in known.replicas for path in plan.short_lived):
        waits.append(_SETTLE_LOOK)
    return max(1.0, min(waits, default=float("inf")))


def _unheard(seconds: float) -> None:
    """Nobody watches this loop."""


def as_bug(error: BaseException) -> TransferFailed:
    """An error that nobody foresaw, without its text: that could hold a URL."""
    return TransferFailed(f"internal error {type(error).__name__} at {place_of(error)}: please report it")


def first_of(several: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error inside a group, however deep: one is told, and all have the same cause."""
    found: BaseException = several
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found


def not_repaired(damaged: Sequence[Replica], outcome: PassResult, known: Known) -> dict[TinkerPath, str]:
    """Of damaged replicas that were fetched again, which still are, and why. Somebody else may have been quicker."""
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
