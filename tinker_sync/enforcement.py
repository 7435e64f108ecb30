"""Carries out what retention decided, after proof. It alone holds the capability to delete.

**A remote delete**, in one pass: a proven listing; the verdict stood for `grace`; the replicas of the run's batch read
back from disk; one look at the run, at most 60 s old, that shows the same object and by which the verdict still
stands; then, one by one, pins, stop flag, the intent durable in the journal, DELETE, the outcome. The next listing
confirms it, and whatever else that run has lost meanwhile stops enforcement.

It decides nothing by itself (`retention` does), and what it cannot prove it leaves alone: one damaged or missing
replica stops nothing but its own delete.
"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import structlog

from tinker_sync.errors import (
    BillingBlocked,
    DiskTrouble,
    NotAllowed,
    NotFound,
    NotServed,
    Overloaded,
    ProtocolBroken,
    RequestRefused,
    ServiceTrouble,
    TinkerSyncError,
    Unreachable,
)
from tinker_sync.integrity import judge_proof
from tinker_sync.inventory import Decision, Holdings, decide, make_members, pin_matcher, unexplained
from tinker_sync.model.checkpoint import Listing
from tinker_sync.model.deeds import OPEN, object_facts
from tinker_sync.model.events import Event
from tinker_sync.model.moments import rfc3339
from tinker_sync.model.news import News
from tinker_sync.retention import Policy, duration, not_worth_copying, plan_retention

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
    from concurrent.futures import Executor
    from datetime import datetime

    from tinker_sync.model.checkpoint import Checkpoint, Sighting
    from tinker_sync.model.deeds import Deed
    from tinker_sync.model.events import EventKind
    from tinker_sync.model.evidence import Defect
    from tinker_sync.model.paths import TinkerPath
    from tinker_sync.model.work import ReadBack, Replica
    from tinker_sync.ports import Account, Catalog, Clock, Destination, Journal, Remover, Reporter, Safeguards
    from tinker_sync.retention import Breaker, Member, Reason, RetentionRules, Verdict

T = TypeVar("T")
Outcome = Literal["deleted", "gone", "set", "refused", "failed", "lost", "not-done"]
log = structlog.get_logger()

LOOK_HOLDS: Final = 60.0
"""Seconds; an older look at a run is taken again before a delete."""
SHRUNK_AGAIN: Final = 30.0
"""Seconds after which a listing that lost too much is taken again, and then believed."""
REFUSED_FOR: Final = timedelta(hours=24)
REREAD_EVERY: Final = timedelta(days=1)
"""How often the replica of what runs out by our TTL is read again."""
REREAD_AT_ONCE: Final = 4
"""So many are read again after one listing, those that end first before the others: copying waits for it."""
LAST_READ: Final = timedelta(hours=6)
"""Before the end of our TTL; within it the replica is read once more."""
TTL_LEAST: Final = 3600
"""Seconds; the API takes no shorter one."""
FAILED_FOR: Final = timedelta(minutes=10)
"""For so long a delete that failed is not tried again."""
UNSEEN_FOR: Final = timedelta(hours=1)
"""For so long a listing may still show the expiry from before our TTL."""
AGAIN_AFTER: Final = 2.0
"""Seconds after which a call that never got through is made once more."""
_NEAR: Final = timedelta(minutes=10)
"""How far two clocks may be apart; one that is further off proves no listing."""
_SAME_MOMENT: Final = timedelta(seconds=2)


@dataclass(frozen=True, slots=True)
class EnforcementSettings:
    """Plain arguments of enforcement."""

    rules: RetentionRules
    short_ttl: timedelta
    by: str
    """Which command it is, for the journal."""
    max_shrink_fraction: float = 0.5
    trash: timedelta = timedelta(days=7)
    extend_ttl_max: timedelta = timedelta(days=14)
    types_known_apart: bool = False
    """Whether this is the official service, which keeps the types of a name apart."""
    reads_at_once: int = 2


@dataclass(slots=True)
class Enforced:
    """What came of it."""

    due_remote: int = 0
    due_local: int = 0
    """Verdicts that let go, whether or not they were carried out."""
    due_bytes: int = 0
    """What those upstream weigh."""
    deleted: list[TinkerPath] = field(default_factory=list)
    expired: list[TinkerPath] = field(default_factory=list)
    """Put under a TTL of ours."""
    restored: list[TinkerPath] = field(default_factory=list)
    """Given back the expiry that they had before."""
    extended: list[TinkerPath] = field(default_factory=list)
    trashed: list[TinkerPath] = field(default_factory=list)
    emptied: int = 0
    withheld: dict[TinkerPath, str] = field(default_factory=dict)
    """Could have gone, and did not: what proof or what time is missing."""
    failed: dict[TinkerPath, str] = field(default_factory=dict)
    breaker: Breaker | None = None
    stopped: str | None = None
    over_bytes: int = 0
    error: str | None = None
    """What is wrong on this side, so that nothing was let go: the pins, the journal, the state's disk."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """What local retention leaves to transfers."""

    spare: Mapping[TinkerPath, Reason] = field(default_factory=dict)
    """What would be let go here at once, and why: not worth copying."""
    bytes: int | None = None
    """How much more `max_bytes` allows; None without a limit."""


class _Stopped(Exception):
    """Nobody waits for the rest of what is being read."""


class _Halt(Exception):
    """The stop flag was set: nothing more happens in this pass."""


@dataclass(slots=True)
class _Look:
    """What a run showed, and when."""

    rows: Mapping[TinkerPath, Checkpoint]
    at: float


@dataclass(frozen=True, slots=True)
class _Case:
    """One delete that is to happen, with its proof."""

    verdict: Verdict
    member: Member
    row: Checkpoint
    replica: Replica | None
    read: ReadBack | None
    unproven: bool = False


class Enforcer:
    """Enforces retention for one account and one root. One pass at a time."""

    def __init__(
        self,
        *,
        account: Account,
        remover: Remover,
        destination: Destination,
        catalog: Catalog,
        journal: Journal,
        safeguards: Safeguards,
        clock: Clock,
        reporter: Reporter,
        readers: Executor,
        indexer: Executor,
        settings: EnforcementSettings,
    ) -> None:
        self._account = account
        self._remover = remover
        self._destination = destination
        self._catalog = catalog
        self._journal = journal
        self._safeguards = safeguards
        self._clock = clock
        self._reporter = reporter
        self._readers = readers
        self._indexer = indexer
        self._settings = settings
        self._apart: bool | None = None
        self._by_hand = False
        self._of_runs: dict[str, Holdings] = {}
        self._gone: list[Checkpoint] = []
        self._news = News()
        self.trouble: TinkerSyncError | None = None
        """What is wrong on this side, pins or journal: it ends retention, and not the copying."""
        self._turn = asyncio.Lock()
        """Held while deeds are done: a listing meanwhile settles none of them."""
        self.result = Enforced()

    def renew(self) -> Enforced:
        """Count anew, unless deeds are being done just now."""
        if not self._turn.locked():
            self.result = Enforced()
        return self.result

    def configure(self, settings: EnforcementSettings) -> None:
        """Go on by other settings: from the next decision."""
        self._settings = settings

    # Listing

    async def survey(self) -> Listing | Sighting:
        """List the account, record it, and settle what earlier deeds came to, unless deeds are being done just now.

        Raises ServiceTrouble when not even one page could be read.
        """
        self.trouble = None
        found = await self._observed()
        if isinstance(found, Listing) and not self._turn.locked():
            async with self._turn:
                await self._settle_all(found)
        return found

    async def _settle_all(self, found: Listing) -> None:
        try:
            await self._settle(found)
            await self._watch(found)
        except ServiceTrouble:
            raise
        except TinkerSyncError as error:  # no reason not to copy; retention raises it again
            self.trouble = error
            if self._news.is_new("trouble", str(error)):
                log.error("retention.trouble", error=str(error))  # noqa: TRY400 - told in words
        else:
            self._news.over("trouble")

    async def _observed(self) -> Listing | Sighting:
        found = await self._account.list()
        if isinstance(found, Listing) and await self._index(partial(self._shrank, found)):
            log.warning("listing.shrank", listed=len(found.checkpoints), again_in=SHRUNK_AGAIN)
            await self._clock.sleep(SHRUNK_AGAIN)
            found = await self._account.list()
        complete = isinstance(found, Listing)
        observing = partial(self._catalog.observe, found.checkpoints, found.seen_at, complete=complete)
        self._gone += await self._index(observing)
        return found

    def take_gone(self) -> list[Checkpoint]:
        """What proven listings no longer had, since this was last asked."""
        gone, self._gone = self._gone, []
        return gone

    def _shrank(self, found: Listing) -> bool:
        shown = {row.path for row in found.checkpoints}
        if not self._catalog.lacks(shown, self._settings.max_shrink_fraction):
            return False
        listed = self._catalog.listed()
        gone = [row for row in listed if row.path not in shown]
        holdings = Holdings(known=self._catalog.known(), deeds=self._catalog.deeds())
        lost = unexplained(gone, holdings, now=self._clock.now(), short_ttl=self._settings.short_ttl)
        return len(lost) > self._settings.max_shrink_fraction * len(listed)

    async def _settle(self, listing: Listing) -> None:
        """Judge what went besides, then confirm by this listing what was done."""
        await self._look_for_losses()
        rows: dict[TinkerPath, Checkpoint] | None = None
        for deed in await self._index(self._catalog.unsettled_deeds):
            if rows is None:
                rows = {row.path: row for row in listing.checkpoints}
            row = rows.get(deed.path)
            same = row if row is not None and deed.concerns(row) else None
            if deed.state in OPEN:
                await self._resolve(deed, same)
            elif deed.state == "deleted":
                if same is None:
                    await self._note("delete.confirmed", _of(deed), listed_at=rfc3339(listing.seen_at))
                elif deed.action != "delete":  # a TTL that seemed to have ended it already: it is still under it
                    await self._note("ttl.outcome", _of(deed), outcome="set", answer="it is still listed")
            elif deed.state == "under-ttl":
                await self._settle_ttl(deed, same, row, listing)

    async def _settle_ttl(self, deed: Deed, row: Checkpoint | None, other: Checkpoint | None, listing: Listing) -> None:
        """A TTL that we set, by the listing: running, run out, changed by somebody, or on an overwritten path."""
        ours = deed.action in ("expire", "set-ttl")
        if row is not None:
            if deed.detail != "seen" and row.expires_at is not None and _near(row.expires_at, deed.ends_at):
                await self._note("ttl.confirmed", _of(deed), ends_at=rfc3339(row.expires_at))
            elif not _same(row.expires_at, deed.ends_at):
                late = _same(row.expires_at, deed.former_expires_at) and deed.detail != "seen"
                if not late or self._clock.now() - deed.at > UNSEEN_FOR:
                    await self._note("ttl.over", _of(deed), answer="its expiry was changed by somebody else")
        elif other is not None:
            if ours and _same(other.expires_at, deed.ends_at):
                await self._restore(deed, "the path was overwritten and kept our TTL", other)
            else:
                await self._note("ttl.over", _of(deed), answer="the path was overwritten")
        elif ours:
            await self._note("delete.confirmed", _of(deed), listed_at=rfc3339(listing.seen_at), answer="expired")
        else:
            await self._note("ttl.over", _of(deed), answer="expired")

    async def _look_for_losses(self) -> None:
        """A delete that took something else with it stops everything until a person has looked.

        What went is set aside in the transaction that forgets it, and stays so until it is judged: nothing that happens
        between can hide a loss.
        """
        suspects = await self._index(self._catalog.suspects)
        if not suspects:
            return
        rows = [
            [
                str(row.path),
                rfc3339(row.time),
                row.size_bytes,
                None if row.expires_at is None else rfc3339(row.expires_at),
            ]
            for row in suspects
        ]
        await self._note("enforcement.suspects", {}, rows=rows)  # outlives the catalog until it is judged
        holdings = Holdings(deeds=await self._index(self._catalog.deeds))
        lost = unexplained(suspects, holdings, now=self._clock.now(), short_ttl=self._settings.short_ttl)
        if lost:
            names = ", ".join(str(row.path) for row in lost[:5])
            reason = f"beside what was deleted, this is gone too and nothing explains it: {names}"
            self.result.stopped = reason
            log.error("enforcement.stopped", reason=reason)
            await self._note("enforcement.stopped", {}, reason=reason, lost=[str(row.path) for row in lost])
            try:
                await self._index(partial(self._safeguards.stop, reason, self._clock.now()))
            except OSError as error:
                message = f"the stop flag cannot be written ({error.strerror}), and it is needed: {reason}"
                raise DiskTrouble(message) from error
        await self._note("enforcement.judged", {}, lost=len(lost))

    async def _resolve(self, deed: Deed, listed: Checkpoint | None) -> None:
        """An intent without an outcome: a crash, or a lost answer. Looking tells what came of it.

        The look and the proven listing must agree about what is there; else it stays open until they do.
        """
        try:
            rows = {row.path: row for row in await self._account.look(deed.path.run_id)}
        except NotFound:
            rows = {}
        except (RequestRefused, ServiceTrouble) as error:
            log.warning("deed.unresolved", checkpoint=str(deed.path), error=str(error))
            return
        row = rows.get(deed.path)
        same = row if row is not None and deed.concerns(row) else None
        if (same is None) is not (listed is None):
            log.warning("deed.unresolved", checkpoint=str(deed.path), error="listing and look differ")
            return
        event = "delete.outcome" if deed.state == "deleting" else "ttl.outcome"
        await self._note(event, _of(deed), outcome=_found(deed, same), answer="found by looking")

    # Deciding

    async def decide(
        self,
        found: Listing | Sighting,
        *,
        allow: int | None = None,
        rules: RetentionRules | None = None,
        now: datetime | None = None,
    ) -> Decision:
        """What may go by what was shown, now."""
        now = now or self._clock.now()
        complete = isinstance(found, Listing)
        return await self._index(
            lambda: decide(
                found.checkpoints,
                self._holdings(),
                rules or self._settings.rules,
                now=now,
                complete=complete,
                short_ttl=self._settings.short_ttl,
                allow=allow,
            )
        )

    async def allowance(self, found: Listing | Sighting, *, apply: bool) -> Allowance:
        """What of the listed is worth copying at all, and how many bytes more there may be here."""
        rules = self._settings.rules
        if not rules.local and not rules.max_bytes:
            return Allowance()
        now, short_ttl = self._clock.now(), self._settings.short_ttl

        def work() -> Allowance:
            holdings = self._holdings()
            chosen = holdings.rules(rules)
            members = make_members(found.checkpoints, holdings, now=now, short_ttl=short_ttl)
            spare = not_worth_copying(members, chosen, now=now, other_bytes=holdings.other_bytes)
            if not rules.max_bytes:
                return Allowance(spare)
            plan = plan_retention(members, chosen, now=now, complete=True, other_bytes=holdings.other_bytes)
            weight = holdings.other_bytes + sum(
                member.replica.total_bytes for member in members if member.replica is not None
            )
            return Allowance(spare, max(0, rules.max_bytes - (plan.least_bytes if apply else weight)))

        return await self._index(work)

    def _holdings(self) -> Holdings:
        rules = self._settings.rules
        by_model = any(policy.base_model is not None for policy in (*rules.remote, *rules.local))
        return Holdings(
            known=self._catalog.known(),
            deeds=self._catalog.deeds(),
            standing=self._catalog.standing(),
            pins=self._safeguards.pins(),
            base_models=self._destination.base_models() if by_model else {},
            other_bytes=self._catalog.other_bytes(),
            types_apart=self._catalog.types_apart() is True,
        )

    def explain(
        self, rows: Mapping[TinkerPath, Checkpoint], replicas: Mapping[TinkerPath, Replica], now: datetime
    ) -> dict[TinkerPath, list[Verdict]]:
        """What would be decided about these runs, seen alone: without breaker and `max_bytes`, which look at all.

        Blocking; for a thread of the caller's. Raises FixFirst, CatalogUnusable.
        """
        rules = self._settings.rules
        if not rules.remote and not rules.local:
            return {}
        holdings = self._holdings()
        holdings = replace(holdings, known=replace(holdings.known, replicas=replicas))
        decision = decide(
            rows.values(),
            holdings,
            replace(rules, max_bytes=0),
            now=now,
            complete=True,
            short_ttl=self._settings.short_ttl,
        )
        found: dict[TinkerPath, list[Verdict]] = {}
        for verdict in decision.plan.verdicts:
            found.setdefault(verdict.path, []).append(verdict)
        return found

    # Enforcing

    async def enforce(self, found: Listing | Sighting, *, apply: bool, allow: int | None = None) -> Enforced:
        """Decide by this listing, and with `apply` carry it out. Over the breaker's limits none of it happens.

        Without `apply` only the time is kept since which verdicts stand, and TTLs of ours whose verdict changed are
        taken back. Raises ServiceTrouble, DiskTrouble, FixFirst.
        """
        result = self.result
        if self.trouble is not None:
            raise self.trouble
        if await self._index(self._is_idle):
            if isinstance(found, Listing):
                await self._index(partial(self._catalog.stand, {}, self._clock.now()))
                await self._empty_trash(self._clock.now())
            return result
        now = self._clock.now()  # one moment for what is counted and for what is done
        decision = await self.decide(found, allow=allow, now=now)
        plan = decision.plan
        going = [verdict for verdict in plan.verdicts if verdict.action != "keep"]
        result.due_remote = sum(1 for verdict in going if verdict.side == "remote")
        result.due_local = len(going) - result.due_remote
        result.due_bytes = sum(decision.members[v.path].size_bytes for v in going if v.side == "remote")
        result.over_bytes = plan.over_bytes
        if not isinstance(found, Listing):
            return result
        standing = {v.path: decision.members[v.path].time for v in going if v.side == "remote"}
        since = await self._index(partial(self._catalog.stand, standing, now))
        stopped = await self._index(self._safeguards.stopped)
        if stopped is not None:
            result.stopped = stopped
            return result
        await self._empty_trash(now)
        if not apply:
            return result
        if plan.breaker is not None:
            result.breaker = plan.breaker
            if self._news.is_new("breaker", str(plan.breaker)):
                log.error("breaker.tripped", **plan.breaker.as_json())
            return result
        self._news.over("breaker")
        async with self._turn:
            try:
                await self._carry_out(decision, since, now)
            except _Halt as halt:
                result.stopped = str(halt)
            await self._confirm()
        return result

    def _is_idle(self) -> bool:
        """No policy, no limit, nothing under a TTL of ours, no stop flag: everything is kept."""
        rules = self._settings.rules
        if rules.remote or rules.local or rules.max_bytes or self._safeguards.stopped() is not None:
            return False
        return not any(deed.is_ours_to_undo for deed in self._catalog.unsettled_deeds())

    async def _confirm(self) -> None:
        """After deletes, list again: it confirms them, and shows what else went. Trouble leaves that to the next pass."""
        if self.result.deleted:
            try:
                found = await self._observed()
                if isinstance(found, Listing):
                    await self._settle_all(found)
            except ServiceTrouble as error:
                log.warning("deletes.unconfirmed", error=str(error))
                return
            if self.trouble is not None:
                return
            unconfirmed = {
                deed.path for deed in await self._index(self._catalog.unsettled_deeds) if deed.state == "deleted"
            }
            for path in [path for path in self.result.deleted if path in unconfirmed and isinstance(found, Listing)]:
                self.result.deleted.remove(path)
                self.result.failed[path] = "the service said that it is deleted, and still lists it"
                log.error("checkpoint.still_listed", checkpoint=str(path))

    async def _carry_out(self, decision: Decision, since: Mapping[TinkerPath, datetime], now: datetime) -> None:
        rules = self._settings.rules
        remote: dict[str, list[Verdict]] = {}
        local: dict[str, list[Verdict]] = {}
        for verdict in decision.plan.permitted:
            stood = now - since.get(verdict.path, now)
            if verdict.side == "local":
                local.setdefault(verdict.path.run_id, []).append(verdict)
            elif verdict.action == "delete" and stood < rules.grace:
                left = duration(rules.grace - timedelta(seconds=int(stood.total_seconds())))
                self.result.withheld[verdict.path] = f"its verdict must stand for {duration(rules.grace)}: {left} left"
            else:
                remote.setdefault(verdict.path.run_id, []).append(verdict)
        self._of_runs = _by_run(await self._index(self._holdings), {*remote, *local})
        for run_id, verdicts in remote.items():
            batch = [(verdict, decision.members[verdict.path]) for verdict in verdicts]
            await self._run_by_run(run_id, verdicts, partial(self._remote_batch, run_id, batch))
        for run_id, verdicts in local.items():
            batch = [(verdict, decision.members[verdict.path]) for verdict in verdicts]
            await self._run_by_run(run_id, verdicts, partial(self._local_batch, run_id, batch))

    async def _run_by_run(
        self, run_id: str, verdicts: Sequence[Verdict], work: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        """One run that cannot be looked at stops no other."""
        try:
            await work()
        except (RequestRefused, Overloaded, ProtocolBroken, Unreachable) as error:
            if isinstance(error, Unreachable) and not await self._account.answers():
                raise
            log.warning("run.withheld", run=run_id, error=str(error))
            done = {*self.result.deleted, *self.result.expired, *self.result.trashed, *self.result.failed}
            for verdict in verdicts:
                if verdict.path not in done:
                    self.result.withheld.setdefault(verdict.path, f"its run cannot be looked at: {error}")

    async def _remote_batch(self, run_id: str, batch: Sequence[tuple[Verdict, Member]]) -> None:
        """Prove and let go what may go of one run: one look for all of it."""
        cases = await self._prove(batch)
        if not cases:
            return
        look, standing = await self._judged_look(run_id)
        for twins in await self._with_twins(self._agreed(cases, standing), look):
            if self._clock.monotonic() - look.at > LOOK_HOLDS:
                look, standing = await self._judged_look(run_id)
            left = [case for case in self._agreed(twins, standing) if self._still_there(case, look)]
            if len(left) != len(twins) and not await self._apart_now():
                for case in left:
                    self.result.withheld[case.row.path] = "its twin of the other type cannot go, and may go with it"
            elif len(left) > 1:
                await self._let_twins_go(left)
            elif left and await self._let_go(left[0]) == "lost":
                await self._try_again(left[0])

    async def _try_again(self, case: _Case) -> None:
        """A call that never got through: once more, after everything was looked at anew."""
        await self._clock.sleep(AGAIN_AFTER)
        look, standing = await self._judged_look(case.row.path.run_id)
        if self._agreed([case], standing) and self._still_there(case, look):
            await self._let_go(case, last_try=True)

    async def _prove(self, batch: Sequence[tuple[Verdict, Member]]) -> list[_Case]:
        """Read the replicas back; the damaged ones are marked, and stop nothing but their own delete."""
        found: list[_Case] = []
        turn = asyncio.Semaphore(self._settings.reads_at_once)
        halt = threading.Event()

        def going_on(_: int) -> None:
            if halt.is_set():
                raise _Stopped

        async def prove(verdict: Verdict, member: Member) -> None:
            replica, row = member.replica, member.remote
            if replica is None or row is None:
                return
            async with turn:
                read = await self._read(replica, going_on)
            defects = judge_proof(replica, read)
            if defects:
                self.result.withheld[member.path] = f"its replica is not whole: {defects[0]}"
            else:
                found.append(_Case(verdict, member, row, replica, read))

        try:
            async with asyncio.TaskGroup() as group:
                for verdict, member in batch:
                    group.create_task(prove(verdict, member))
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from None
        finally:
            halt.set()  # a thread cannot be cancelled: it ends at its next piece
        order = {verdict.path: place for place, (verdict, _) in enumerate(batch)}
        return sorted(found, key=lambda case: order[case.row.path])

    async def _read(self, replica: Replica, advanced: Callable[[int], None]) -> ReadBack:
        """Read one replica back, and write down what was found."""
        loop = asyncio.get_running_loop()
        read = await loop.run_in_executor(self._readers, self._destination.read, replica.directory, advanced)
        defects: Sequence[Defect] = judge_proof(replica, read)
        words = [str(defect) for defect in defects]
        if defects:
            log.error("replica.damaged", checkpoint=str(replica.path), defects=words[:5])
            self._tell("failed", replica.path, side="local", error=f"damaged: {words[0]}")
        await self._index(partial(self._catalog.mark_verified, replica.directory, self._clock.now(), words))
        return read

    async def _look(self, run_id: str, *, sure: bool = False) -> _Look:
        """What a run shows; a run that is unknown shows nothing, unless what is gone is concluded from that."""
        at = self._clock.monotonic()
        try:
            rows = await self._account.look(run_id)
        except NotFound:
            if sure:
                raise
            rows = ()
        return _Look({row.path: row for row in rows}, at)

    async def _judged_look(self, run_id: str) -> tuple[_Look, set[TinkerPath]]:
        """A look, and what by what it shows at this moment may still go."""
        look = await self._look(run_id)

        def again() -> set[TinkerPath]:
            holdings = self._of_runs.get(run_id, Holdings())
            decision = decide(
                look.rows.values(),
                replace(holdings, pins=self._safeguards.pins(), deeds=self._catalog.deeds()),
                replace(self._settings.rules, max_bytes=0),
                now=self._clock.now(),
                complete=True,
                short_ttl=self._settings.short_ttl,
            )
            return {v.path for v in decision.plan.verdicts if v.side == "remote" and v.action != "keep"}

        return look, await self._index(again)

    def _agreed(self, cases: Sequence[_Case], standing: set[TinkerPath]) -> list[_Case]:
        """By what the run shows at this moment the verdicts must still be the same."""
        agreed = [case for case in cases if case.unproven or case.row.path in standing]
        for case in cases:
            if case not in agreed:
                self.result.withheld[case.row.path] = "its run changed meanwhile: a look at it no longer lets it go"
        return agreed

    def _still_there(self, case: _Case, look: _Look) -> bool:
        """Whether the object listed is still the object that was decided about."""
        now = look.rows.get(case.row.path)
        path = case.row.path
        if now is None:
            self.result.withheld[path] = "it is gone already"
        elif not now.identity.matches(case.row.identity) or now.user_metadata != case.row.user_metadata:
            self.result.withheld[path] = "it is another object now, or has other metadata"
        elif now.public and not case.unproven:
            self.result.withheld[path] = "it is public now"
        elif now.expires_at != case.row.expires_at and not case.unproven:
            self.result.withheld[path] = "its expiry changed meanwhile"
        else:
            return True
        return False

    # Twins: one name in several types

    async def _apart_now(self) -> bool:
        if self._apart is None:
            known = self._settings.types_known_apart or await self._index(self._catalog.types_apart) is True
            self._apart = known
        return self._apart

    async def _with_twins(self, cases: Sequence[_Case], look: _Look) -> list[list[_Case]]:
        """Cases that must go together: alone on a server that keeps types apart, by name on others."""
        if await self._apart_now():
            return [[case] for case in cases]
        named: dict[str, list[_Case]] = {}
        for case in cases:
            named.setdefault(case.row.path.name, []).append(case)
        listed: dict[str, set[TinkerPath]] = {}
        for path in look.rows:
            listed.setdefault(path.name, set()).add(path)
        whole: list[list[_Case]] = []
        for name, twins in named.items():
            missing = listed.get(name, set()) - {case.row.path for case in twins}
            if missing and not twins[0].unproven:
                for case in twins:
                    self.result.withheld[case.row.path] = "its twin of the other type is not proven, and may go with it"
            else:
                whole.append(twins)
        return whole

    async def _let_twins_go(self, twins: Sequence[_Case]) -> None:
        """Delete the first of a name's types where that may take the others: all are proven, and all are to go."""
        if await self._apart_now() or twins[0].verdict.action != "delete":
            for case in twins:
                await self._let_go(case, last_try=True)
            return
        first, *others = twins
        intended = []
        for case in others:
            if not await self._intend(case, with_twin=str(first.row.path)):
                break
            intended.append(case)
        may_go = [await self._may_go(case.row.path) for case in intended]  # the first call may take them all
        done = len(intended) == len(others) and all(may_go)
        done = done and await self._let_go(first, last_try=True) in ("deleted", "gone")
        look = await self._look(first.row.path.run_id, sure=True) if done else None
        rest = []
        for case in intended:
            if look is None:
                await self._outcome(case, "not-done", "its twin of the other type was not deleted")
                self.result.withheld[case.row.path] = "its twin of the other type was not deleted, and may go with it"
            elif case.row.path not in look.rows:
                await self._outcome(case, "gone", f"it went with {first.row.path.checkpoint_id}")
                await self._learn(apart=False)
            else:
                await self._outcome(case, "not-done", "the other type was tried first")
                if await self._account.serves(look.rows[case.row.path]) is True:
                    await self._learn(apart=True)
                rest.append(case)
        if rest:
            now, standing = await self._judged_look(first.row.path.run_id)
            for case in self._agreed(rest, standing):
                if self._still_there(case, now):
                    await self._let_go(case, last_try=True)

    async def _learn(self, *, apart: bool) -> None:
        """Remember whether this server keeps the types of a name apart."""
        if self._apart is not apart or not apart:
            self._apart = apart
            await self._note("server.types", {}, apart=apart)
            log.info("server.types", apart=apart)

    # The deed

    async def _let_go(self, case: _Case, *, last_try: bool = False) -> Outcome:
        """Pins, stop flag, intent, the call, the outcome.

        `lost` is a call that never got through, as far as looking tells: worth another try, unless this was the last.
        """
        if not await self._intend(case):
            return "not-done"
        path = case.row.path
        if case.verdict.action == "delete":
            outcome, answer = await self._ask(case, self._remover.delete(path))
        else:
            outcome, answer = await self._ask(case, self._remover.set_ttl(path, self._ttl_of(case)))
        if outcome == "lost" and last_try:
            outcome = "failed"
        await self._outcome(case, "not-done" if outcome == "lost" else outcome, answer)
        return outcome

    def _ttl_of(self, case: _Case) -> int:
        """Seconds of the TTL to set: `grace`, never later than the present expiry; 0 when the API takes none so short."""
        seconds = int(self._settings.rules.grace.total_seconds())
        if case.row.expires_at is not None:
            seconds = min(seconds, int((case.row.expires_at - self._clock.now()).total_seconds()))
        return seconds if seconds >= TTL_LEAST else 0

    async def _intend(self, case: _Case, *, with_twin: str | None = None) -> bool:
        """Write down what is meant; False when it was pinned. Raises _Halt, DiskTrouble, FixFirst: nothing is sent then."""
        if not await self._may_go(case.row.path):
            return False
        if case.verdict.action == "expire" and not self._ttl_of(case):
            self.result.withheld[case.row.path] = "it expires within the hour by itself"
            return False
        now, read = self._clock.now(), case.read
        facts: dict[str, Any] = {
            **object_facts(case.row),
            "by": self._settings.by,
            "action": "set-ttl" if self._by_hand and case.verdict.action == "expire" else case.verdict.action,
            "policy": case.verdict.policy,
            "reasons": [reason.why for reason in case.verdict.reasons],
            "former_expires_at": None if case.row.expires_at is None else rfc3339(case.row.expires_at),
        }
        if case.replica is not None and read is not None and read.manifest is not None:
            facts |= {
                "replica": case.replica.directory,
                "manifest_sha256": read.manifest_sha256,
                "read_back": {"files": len(read.manifest.files), "bytes": read.manifest.total_bytes},
            }
        if case.unproven:
            facts["unproven"] = True
        if with_twin is not None:
            facts["twin"] = with_twin
        if case.verdict.action == "delete":
            await self._note("delete.intent", facts)
        else:
            ends = now + timedelta(seconds=self._ttl_of(case))
            await self._note("ttl.intent", facts, ends_at=rfc3339(ends))
        return True

    async def _may_go(self, path: TinkerPath) -> bool:
        """Stop flag and pins, read at this moment. Raises _Halt, FixFirst."""
        stopped = await self._index(self._safeguards.stopped)
        if stopped is not None:
            raise _Halt(stopped)
        if pin_matcher(await self._index(self._safeguards.pins))(path):
            self.result.withheld[path] = "pinned"
            return False
        return True

    async def _ask(self, case: _Case, call: Awaitable[None]) -> tuple[Outcome, str]:
        """Make the call; an answer that was lost is resolved by looking. Returns outcome and answer."""
        path, deleting = case.row.path, case.verdict.action == "delete"
        try:
            await call
        except NotFound:
            if deleting:
                return "gone", "404"
            there = path in (await self._look(path.run_id, sure=True)).rows
            return ("refused", "404: this server sets no TTL") if there else ("gone", "404")
        except BillingBlocked as error:
            return "failed", str(error)
        except RequestRefused as error:
            return ("failed" if error.status == 409 else "refused"), str(error)
        except ServiceTrouble as error:
            # When this fails too, the intent stays open.
            now = (await self._look(path.run_id, sure=True)).rows.get(path)
            if now is None or not now.identity.matches(case.row.identity):
                return "gone", f"the answer was lost ({error}); it is no longer there"
            if not deleting and now.expires_at != case.row.expires_at:
                return "set", f"the answer was lost ({error}); it has the TTL"
            return "lost", str(error)
        return ("deleted" if deleting else "set"), "ok"

    async def _outcome(self, case: _Case, outcome: Outcome, answer: str) -> None:
        path, facts = case.row.path, object_facts(case.row)
        if outcome in ("refused", "failed"):
            hold = REFUSED_FOR if outcome == "refused" else FAILED_FOR
            facts["retry_at"] = rfc3339(self._clock.now() + hold)
        event = "delete.outcome" if case.verdict.action == "delete" else "ttl.outcome"
        await self._note(event, facts, outcome=outcome, answer=answer)
        if outcome in ("deleted", "gone"):
            self.result.deleted.append(path)
            log.info("checkpoint.deleted", checkpoint=str(path), policy=case.verdict.policy, answer=answer)
            self._tell("deleted", path, side="remote", action="delete", policy=case.verdict.policy)
        elif outcome == "set":
            self.result.expired.append(path)
            log.info("checkpoint.expires", checkpoint=str(path), policy=case.verdict.policy)
            self._tell("deleted", path, side="remote", action="expire", policy=case.verdict.policy)
        elif outcome in ("refused", "failed"):
            self.result.failed[path] = f"not deleted: {answer}"
            log.error("checkpoint.not_deleted", checkpoint=str(path), answer=answer)
            self._tell("failed", path, side="remote", error=f"not deleted: {answer}")

    # Our TTLs

    async def _watch(self, found: Listing) -> None:
        """What runs out by our TTL: read its replica again daily and before the end, and restore it when it must stay."""
        watched = [deed for deed in await self._index(self._catalog.unsettled_deeds) if deed.is_ours_to_undo]
        if not watched:
            return
        decision = await self.decide(found)
        stopped = await self._index(self._safeguards.stopped)
        reasons = {verdict.path: verdict.reasons for verdict in decision.plan.verdicts if verdict.side == "remote"}
        halt = threading.Event()

        def going_on(_: int) -> None:
            if halt.is_set():
                raise _Stopped

        due: list[tuple[Deed, Replica]] = []
        try:
            for deed in watched:
                member = decision.members.get(deed.path)
                if member is None or not member.ttl_is_ours or self._clock.now() < (deed.retry_at or deed.at):
                    continue
                why = next((reason.detail for reason in reasons[member.path] if reason.why != "expiring"), stopped)
                if why is not None:
                    await self._restore(deed, why)
                elif member.replica is not None and self._reread_due(deed, member.replica):
                    due.append((deed, member.replica))
            due.sort(key=lambda item: item[0].ends_at or item[0].at)
            for deed, replica in due[:REREAD_AT_ONCE]:
                defects = judge_proof(replica, await self._read(replica, going_on))
                if defects:
                    await self._restore(deed, f"its replica is not whole: {defects[0]}")
        finally:
            halt.set()  # a thread cannot be cancelled: it ends at its next piece

    def _reread_due(self, deed: Deed, replica: Replica) -> bool:
        now = self._clock.now()
        if now - replica.verified_at >= REREAD_EVERY:
            return True
        before = min(LAST_READ, self._settings.rules.grace / 4)
        last = None if deed.ends_at is None else deed.ends_at - before
        return last is not None and replica.verified_at < last <= now

    async def _restore(self, deed: Deed, why: str, other: Checkpoint | None = None) -> None:
        """Give a checkpoint back the expiry that it had before our TTL, while it still is under it.

        `other` is what has overwritten the path since and kept our TTL.
        """
        now, former = self._clock.now(), deed.former_expires_at
        try:
            row = (await self._look(deed.path.run_id)).rows.get(deed.path)
        except (RequestRefused, ServiceTrouble) as error:
            self.result.failed[deed.path] = f"its former expiry could not be restored: {error}"
            return
        wanted = row is not None and (deed.concerns(row) if other is None else other.identity.matches(row.identity))
        if row is None or not wanted or not _near(row.expires_at, deed.ends_at):
            return  # gone, another one, or no longer under our TTL: the next listing settles it
        seconds = None if former is None else max(TTL_LEAST, int((former - now).total_seconds()))
        facts = _of(deed)
        expiries = {
            "former_expires_at": None if former is None else rfc3339(former),
            "ends_at": None if deed.ends_at is None else rfc3339(deed.ends_at),
        }
        await self._note("ttl.intent", facts, action="restore", by=self._settings.by, why=why, **expiries)
        try:
            await self._remover.set_ttl(row.path, seconds)
        except (RequestRefused, ServiceTrouble) as error:
            retry = rfc3339(now + FAILED_FOR)
            await self._note("ttl.outcome", facts, outcome="failed", answer=str(error), retry_at=retry)
            self.result.failed[row.path] = f"its former expiry could not be restored: {error}"
            log.error("checkpoint.not_restored", checkpoint=str(row.path), error=str(error))  # noqa: TRY400 - told in words
            return
        await self._note("ttl.outcome", facts, outcome="set", answer="ok")
        self.result.failed.pop(row.path, None)
        self.result.restored.append(row.path)
        log.warning("checkpoint.restored", checkpoint=str(row.path), why=why)

    async def rescue(self, rows: Sequence[Checkpoint]) -> None:
        """Give what would expire before it can be copied a longer life, once each. Needs rows of a proven listing."""
        deeds = await self._index(self._catalog.deeds) if rows else {}
        now = self._clock.now()
        for row in rows:
            deed = deeds.get((row.path, row.identity.time))
            if deed is not None and (deed.state != "withheld" or deed.retry_at is None or deed.retry_at > now):
                continue
            seconds = int(self._settings.extend_ttl_max.total_seconds())
            ends = now + timedelta(seconds=seconds)
            if row.expires_at is None or row.expires_at >= ends:
                continue
            facts = object_facts(row)
            expiries = {"former_expires_at": rfc3339(row.expires_at), "ends_at": rfc3339(ends)}
            await self._note("ttl.intent", facts, action="extend", by=self._settings.by, **expiries)
            try:
                await self._remover.set_ttl(row.path, seconds)
            except (RequestRefused, ServiceTrouble) as error:
                for_good = isinstance(error, NotAllowed | NotServed | NotFound)
                retry = rfc3339(now + (REFUSED_FOR if for_good else FAILED_FOR))
                await self._note("ttl.outcome", facts, outcome="failed", answer=str(error), retry_at=retry)
                log.warning("checkpoint.not_extended", checkpoint=str(row.path), error=str(error))
                continue
            await self._note("ttl.outcome", facts, outcome="set", answer="ok")
            self.result.extended.append(row.path)
            log.warning("checkpoint.extended", checkpoint=str(row.path), until=rfc3339(ends.replace(microsecond=0)))

    # Here

    async def _local_batch(self, run_id: str, batch: Sequence[tuple[Verdict, Member]]) -> None:
        """Move replicas to the trash; those with an original only while a look shows it living, for good."""
        look: _Look | None = None
        for verdict, member in batch:
            replica = member.replica
            if replica is None:
                continue
            if look is None or self._clock.monotonic() - look.at > LOOK_HOLDS:
                look = await self._look(run_id)
            now = look.rows.get(member.path)
            if member.remote is None:
                if now is not None and now.identity.matches(replica.identity):
                    self.result.withheld[member.path] = "a look at its run shows its original"
                    continue
            elif now is None or not now.identity.matches(member.remote.identity) or now.expires_at is not None:
                self.result.withheld[member.path] = "its original is gone, another one, or expires"
                continue
            if await self._may_go(member.path):
                await self._retire(verdict, replica)

    async def _retire(self, verdict: Verdict, replica: Replica) -> None:
        loop = asyncio.get_running_loop()
        facts: dict[str, Any] = {
            "tinker_path": str(replica.path),
            "checkpoint_time": rfc3339(replica.time),
            "size_bytes": replica.size_bytes,
            "directory": replica.directory,
        }
        await self._note("local.intent", facts, action="trash")
        try:
            entry = await loop.run_in_executor(self._readers, self._destination.retire, replica.directory)
        except TinkerSyncError as error:
            found = await loop.run_in_executor(self._readers, self._destination.find, replica.path)
            if found is None or found.replica.directory != replica.directory:  # it moved, and then something failed
                await self._index(partial(self._catalog.remove_replica, replica.directory))
            await self._note("local.failed", facts, answer=str(error))
            self.result.failed[replica.path] = f"not moved to the trash: {error}"
            log.error("replica.not_trashed", checkpoint=str(replica.path), error=str(error))  # noqa: TRY400 - told in words
            self._tell("failed", replica.path, side="local", error=f"not moved to the trash: {error}")
            return
        await self._index(partial(self._catalog.remove_replica, replica.directory))
        reasons = [reason.why for reason in verdict.reasons]
        more = {"policy": verdict.policy, "reasons": reasons, "manifest_sha256": replica.manifest_sha256}
        await self._note("local.trashed", facts, entry=entry, by=self._settings.by, **more)
        self.result.trashed.append(replica.path)
        log.info("replica.trashed", checkpoint=str(replica.path), policy=verdict.policy, entry=entry)
        self._tell("deleted", replica.path, side="local", action="trash", policy=verdict.policy)

    async def _empty_trash(self, now: datetime) -> None:
        """Delete what has been in the trash for its time."""
        loop = asyncio.get_running_loop()
        over = now - self._settings.trash
        for item in await loop.run_in_executor(self._readers, self._destination.trashed, over):
            if item.path is not None and pin_matcher(await self._index(self._safeguards.pins))(item.path):
                continue
            if await self._index(self._safeguards.stopped) is not None:
                return
            try:
                await loop.run_in_executor(self._readers, self._destination.empty, item.entry)
            except TinkerSyncError as error:
                log.error("trash.not_emptied", entry=item.entry, error=str(error))  # noqa: TRY400 - told in words
                continue
            facts = {} if item.path is None else {"tinker_path": str(item.path)}
            await self._note("local.emptied", facts, entry=item.entry, why=f"{duration(self._settings.trash)} are over")
            self.result.emptied += 1

    # By hand

    async def remove_one(
        self, found: Listing | Sighting, path: TinkerPath, *, unproven: bool, ttl: timedelta | None = None
    ) -> Enforced:
        """Delete this one, or with `ttl` let it expire, by a person's word: guards, proof and journal as ever.

        `unproven` leaves guards and proof out, but not pins and the stop flag. Raises the same as `enforce`.
        """
        if self.trouble is not None:
            raise self.trouble
        self._by_hand = True
        action: Literal["delete", "expire"] = "delete" if ttl is None else "expire"
        only = Policy(
            name=self._settings.by,
            types=(path.checkpoint_type,),
            include=("/".join(_literally(part) for part in (path.run_id, path.segment, path.name)),),
        )
        rules = replace(
            self._settings.rules,
            remote=(only,),
            action=action,
            grace=ttl or timedelta(0),
            types_apart=unproven or self._settings.rules.types_apart,
        )
        self._settings = replace(self._settings, rules=rules)
        decision = await self.decide(found, rules=rules)
        member = decision.members.get(path)
        if member is None or member.remote is None:
            self.result.failed[path] = "the service does not list it: gone, or misspelt"
            return self.result
        verdict = next(v for v in decision.plan.verdicts if v.path == path and v.side == "remote")
        self._of_runs = _by_run(await self._index(self._holdings), {path.run_id})
        try:
            if not unproven:
                if verdict.action == "keep":
                    self.result.withheld[path] = "; ".join(reason.detail or reason.why for reason in verdict.reasons)
                else:
                    await self._remote_batch(path.run_id, [(verdict, member)])
            else:
                forced = replace(verdict, action=action, policy=only.name)
                look = await self._look(path.run_id)
                case = _Case(forced, member, member.remote, member.replica, None, unproven=True)
                if self._still_there(case, look):
                    await self._let_go(case, last_try=True)
        except _Halt as halt:
            self.result.stopped = str(halt)
        await self._confirm()
        return self.result

    async def lengthen(self, row: Checkpoint, seconds: int | None) -> None:
        """Give a checkpoint a longer life, or one without end, by a person's word. Raises RequestRefused, ServiceTrouble."""
        facts = object_facts(row)
        ends = None if seconds is None else rfc3339(self._clock.now() + timedelta(seconds=seconds))
        former = None if row.expires_at is None else rfc3339(row.expires_at)
        by = self._settings.by
        await self._note("ttl.intent", facts, action="extend", by=by, former_expires_at=former, ends_at=ends)
        try:
            await self._remover.set_ttl(row.path, seconds)
        except RequestRefused as error:
            await self._note("ttl.outcome", facts, outcome="failed", answer=str(error))
            raise
        await self._note("ttl.outcome", facts, outcome="set", answer="ok")

    def _tell(self, kind: EventKind, path: TinkerPath, **facts: str | None) -> None:
        told = {name: value for name, value in facts.items() if value is not None}
        self._reporter.happened(Event(kind, path, told))

    async def _note(self, event: str, facts: Mapping[str, Any], **more: Any) -> None:
        """One line in the journal, durable, and what follows from it in the catalog."""
        line = {"time": rfc3339(self._clock.now()), "event": event, **facts, **more}
        await self._index(lambda: self._catalog.apply([(self._journal.append(line), line)]))

    async def _index(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._indexer, work)


def _of(deed: Deed) -> dict[str, Any]:
    return {
        "tinker_path": str(deed.path),
        "checkpoint_time": rfc3339(deed.time),
        "size_bytes": deed.size_bytes,
    }


def _found(deed: Deed, row: Checkpoint | None) -> str:
    """The outcome of an intent, by the object that is there."""
    if row is None:
        return "gone"
    if deed.state == "deleting":
        return "not-done"
    if deed.action == "restore":
        return "failed" if _same(row.expires_at, deed.ends_at) else "set"
    return "not-done" if _same(row.expires_at, deed.former_expires_at) else "set"


def _same(one: datetime | None, other: datetime | None) -> bool:
    if one is None or other is None:
        return one is other
    return abs(one - other) <= _SAME_MOMENT


def _near(one: datetime | None, other: datetime | None) -> bool:
    return one is not None and other is not None and abs(one - other) <= _NEAR


def _by_run(holdings: Holdings, runs: Iterable[str]) -> dict[str, Holdings]:
    """The holdings of single runs, so that deciding about one costs no look at all the others."""
    replicas: dict[str, dict[TinkerPath, Replica]] = {run_id: {} for run_id in runs}
    for path, replica in holdings.known.replicas.items():
        if path.run_id in replicas:
            replicas[path.run_id][path] = replica
    return {
        run_id: replace(holdings, known=replace(holdings.known, replicas=mine)) for run_id, mine in replicas.items()
    }


def _literally(text: str) -> str:
    """A glob that matches only this text."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in text)
