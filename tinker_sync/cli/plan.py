"""`plan` and `explain`: what retention would let go now, and why. They change nothing, here or upstream."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from tinker_sync.cli import render
from tinker_sync.config import load_settings
from tinker_sync.destination.root import read_facts
from tinker_sync.destination.safeguards import read_stop
from tinker_sync.errors import FixFirst, RequestRefused, ServiceTrouble, TinkerSyncError, WrongRoot
from tinker_sync.inventory import Decision, decide
from tinker_sync.model.checkpoint import Listing
from tinker_sync.model.moments import parse_time, rfc3339
from tinker_sync.retention import GUARDS, duration
from tinker_sync.wiring import (
    SystemClock,
    make_account,
    open_catalog_for_reading,
    open_service,
    read_holdings,
    retention_rules,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tinker_sync.catalog.store import SqlCatalog
    from tinker_sync.config import Settings
    from tinker_sync.model.paths import TinkerPath
    from tinker_sync.model.work import Replica
    from tinker_sync.retention import Member, RetentionPlan, Verdict
    from tinker_sync.wiring import Service

_SHOWN_PER_RUN = 40


async def show(
    settings: Settings,
    *,
    at: str | None = None,
    diff: Path | None = None,
    allow: int | None = None,
    as_json: bool,
    more: Mapping[str, object] | None = None,
) -> int:
    """Plan against a fresh listing, and print it; `more` are further keys of the JSON document."""
    now = _moment(at)
    _check_root(settings)
    other = load_settings(diff, root=settings.root) if diff is not None else None
    price = None
    async with open_service(settings) as service:
        found = await make_account(settings, service, SystemClock()).list()
        if not as_json and other is None:
            price = await _price(settings, service)
    rows = [row for row in found.checkpoints if row.expires_at is None or row.expires_at > now]
    complete = isinstance(found, Listing)
    holdings = read_holdings(settings)

    def by(chosen: Settings) -> Decision:
        rules, short_ttl = retention_rules(chosen), chosen.mirror.short_ttl
        return decide(rows, holdings, rules, now=now, complete=complete, short_ttl=short_ttl, allow=allow)

    decision = by(settings)
    plan = decision.plan
    if other is not None:
        _tell_difference(plan, by(other).plan, complete=complete, as_json=as_json)
        return 0 if complete else 3
    if as_json:
        render.print_json(
            {
                "complete": complete,
                "breaker": None if plan.breaker is None else plan.breaker.as_json(),
                "verdicts": [_as_json(verdict) for verdict in plan.verdicts],
                **({} if more is None else {**more, "listed": len(rows)}),
            }
        )
    else:
        _tell(decision, settings, price, now)
        for doubt in () if isinstance(found, Listing) else found.doubts:
            render.say(f"nothing may go: the listing is unproven ({doubt})")
        stopped = read_stop(settings.state)
        if stopped is not None:
            render.say(f"STOPPED: {stopped}; look into it, then `tinker-sync resume`")
    if plan.breaker is not None or read_stop(settings.state) is not None:
        return 5
    return 0 if complete else 3


async def explain(settings: Settings, path: TinkerPath, *, as_json: bool) -> int:
    """One checkpoint's story; from the last listing when the service does not answer."""
    try:
        async with open_service(settings) as service:
            found = await make_account(settings, service, SystemClock()).list()
        rows, complete, source = found.checkpoints, isinstance(found, Listing), "the service, now"
    except ServiceTrouble as error:
        with open_catalog_for_reading(settings) as catalog:
            rows, complete = tuple(catalog.listed()), False
        source = f"what it listed last ({error})"
    now = datetime.now(UTC)
    holdings = read_holdings(settings)
    short_ttl = settings.mirror.short_ttl
    rules = retention_rules(settings)
    decision = decide(rows, holdings, rules, now=now, complete=complete, short_ttl=short_ttl)
    subject = decision.members.get(path)
    if subject is None:
        message = f"{path} is neither listed nor here: gone, or misspelt"
        raise TinkerSyncError(message)
    verdicts = [verdict for verdict in decision.plan.verdicts if verdict.path == path]
    story = _Story(
        member=subject,
        verdicts=verdicts,
        other=None if subject.replica is not None else holdings.known.replicas.get(path),
        failure=_failure(settings, path),
        changes=[_when(verdict, subject, settings, now, _since(settings, path)) for verdict in verdicts],
    )
    if as_json:
        render.print_json(
            {
                "tinker_path": str(path),
                "source": source,
                "complete": complete,
                "remote": None if subject.remote is None else _remote_json(subject),
                "replica": None if subject.replica is None else str(settings.root / subject.replica.directory),
                "other_replica": None if story.other is None else str(settings.root / story.other.directory),
                "short_lived": subject.short_lived,
                "failure": story.failure,
                "verdicts": [
                    {**_as_json(verdict), "changes": change}
                    for verdict, change in zip(verdicts, story.changes, strict=True)
                ],
            }
        )
        return 0
    _tell_story(story, settings, source, now)
    return 0


@dataclass(frozen=True, slots=True)
class _Story:
    """What `explain` tells."""

    member: Member
    verdicts: list[Verdict]
    other: Replica | None
    """The replica of another object under this path."""
    failure: str | None
    changes: list[str]
    """For each verdict, when and by what it would change."""


def _when(verdict: Verdict, member: Member, settings: Settings, now: datetime, since: datetime | None) -> str:
    """When it would go, as far as that can be told."""
    if verdict.action != "keep":
        if verdict.side == "local":
            return f"goes to the trash with the next enforced pass, and is deleted {settings.retention.trash.days} days later"
        if verdict.action == "expire":
            return f"is given {duration(settings.grace)} to live with the next enforced pass"
        first = (since or now) + settings.grace
        return (
            "goes with the next enforced pass"
            if first <= now
            else f"goes in an enforced pass after {_moment_text(first)}"
        )
    words = {reason.why for reason in verdict.reasons}
    if words <= {"young"}:
        return f"may go after {_moment_text(member.time + settings.retention.min_age)}"
    if "no-policy" in words:
        return "stays until a policy selects it"
    lifts = [_LIFTED_BY[word] for word in sorted(words) if word in _LIFTED_BY]
    return "stays until " + ", and ".join(dict.fromkeys(lifts)) if lifts else "stays while its rules keep it"


_LIFTED_BY: Final = {
    "newest": "a newer one of its run and type is there",
    "not-replicated": "it is copied, whole",
    "public": "it is unpublished",
    "pinned": "it is unpinned",
    "young": "it is older than min_age",
    "future": "its time has come",
    "fidelity": "an exact copy is here, or the policy sets delete_adapter_only",
    "other-side": "one of the two sides keeps it",
    "expiring-original": "its original no longer expires",
    "orphan": "the policy sets keep_orphans = false",
    "unproven": "a listing is proven",
    "twin": "its twin of the other type may go too",
    "withheld": "that time has passed",
    "expiring": "our TTL runs out",
    "expires": "it expires by itself",
    "declined": "it is deleted by hand",
    "leaving": "its original is gone, or stays",
    "last-copy": "it is removed by hand",
    "unknown": "that can be told",
}


def _moment_text(moment: datetime) -> str:
    return rfc3339(moment.replace(microsecond=0))


def _since(settings: Settings, path: TinkerPath) -> datetime | None:
    if not (settings.state / "catalog.db").exists():
        return None
    with open_catalog_for_reading(settings) as catalog:
        found = catalog.standing().get(path)
    return None if found is None else found[1]


def _moment(at: str | None) -> datetime:
    if at is None:
        return datetime.now(UTC)
    try:
        return parse_time(at)
    except ValueError as error:
        message = f"--at {at!r} is no time: write it like 2026-12-24T18:00:00Z"
        raise FixFirst(message) from error


def _check_root(settings: Settings) -> None:
    """Verdicts about another server's replicas would be nonsense. Raises WrongRoot."""
    facts = read_facts(settings.root)
    if facts is not None and facts.server != settings.base_url:
        message = f"{settings.root} mirrors {facts.server}, [tinker] base_url is {settings.base_url}"
        raise WrongRoot(message)


def _failure(settings: Settings, path: TinkerPath) -> str | None:
    if not (settings.state / "catalog.db").exists():
        return None
    catalog: SqlCatalog
    with open_catalog_for_reading(settings) as catalog:
        return next((failure.error for failure in catalog.failures() if failure.path == path), None)


async def _price(settings: Settings, service: Service) -> float | None:
    """Per GB and month: the service's rate where an admin asks, else the configuration's."""
    try:
        usage = await service.client.get_current_checkpoint_storage_usage()
    except (RequestRefused, ServiceTrouble):
        return settings.retention.price_per_gb_month
    rate = usage.effective_rate_usd_per_gigabyte_month
    return settings.retention.price_per_gb_month if rate is None else rate


def _as_json(verdict: Verdict) -> dict[str, Any]:
    return {
        "tinker_path": str(verdict.path),
        "side": verdict.side,
        "action": verdict.action,
        "policy": verdict.policy,
        "reasons": [{"why": reason.why, "detail": reason.detail} for reason in verdict.reasons],
    }


def _remote_json(member: Member) -> dict[str, Any]:
    row = member.remote
    if row is None:
        return {}
    return {
        "time": rfc3339(row.time),
        "size_bytes": row.size_bytes,
        "public": row.public,
        "expires_at": None if row.expires_at is None else rfc3339(row.expires_at),
    }


def _tell(decision: Decision, settings: Settings, price: float | None, now: datetime) -> None:
    plan, members = decision.plan, decision.members
    if not settings.retention.remote and not settings.retention.local:
        render.say("no policy is configured ([[retention.remote]], [[retention.local]]): everything is kept")
    by_run: dict[str, list[Verdict]] = {}
    for verdict in plan.verdicts:
        by_run.setdefault(verdict.path.run_id, []).append(verdict)
    for run, verdicts in by_run.items():
        going = sum(1 for verdict in verdicts if verdict.action != "keep")
        if not going:
            continue
        render.say(f"{run}: {going} of {len(verdicts)} would go")
        governed = [verdict for verdict in verdicts if verdict.policy is not None]
        ordered = sorted(governed, key=lambda verdict: (verdict.action == "keep", verdict.path))
        render.table(
            ("checkpoint", "side", "would", "age", "size", "per month", "why"),
            [_row(verdict, members[verdict.path], now, price) for verdict in ordered[:_SHOWN_PER_RUN]],
        )
        if len(ordered) > _SHOWN_PER_RUN:
            render.say(f"  … {len(ordered) - _SHOWN_PER_RUN} more, see --json")
        if len(verdicts) > len(governed):
            render.say(f"  {len(verdicts) - len(governed)} are selected by no policy, and stay")
    _tell_totals(plan, members, price)
    if plan.over_bytes:
        render.say(f"[mirror] max_bytes is exceeded by {render.size(plan.over_bytes)} that must stay: copying stops")
    if all(verdict.action == "keep" for verdict in plan.verdicts):
        return
    if settings.retention.enforce:
        render.say("nothing was changed; [retention] enforce is on: the next `sync` carries this out")
    else:
        render.say("nothing was changed; `tinker-sync prune --apply` carries it out ([retention] enforce is off)")


def _row(verdict: Verdict, member: Member, now: datetime, price: float | None) -> tuple[str, ...]:
    costs = verdict.side == "remote" and price is not None
    return (
        f"{verdict.path.segment}/{verdict.path.name}",
        verdict.side,
        verdict.action,
        render.ago(member.time, now),
        render.size(member.size_bytes),
        f"${member.size_bytes / 1e9 * (price or 0):,.2f}" if costs else "",
        "; ".join(reason.detail or reason.why for reason in verdict.reasons[:3]),
    )


def _tell_totals(plan: RetentionPlan, members: Mapping[TinkerPath, Member], price: float | None) -> None:
    for side in ("remote", "local"):
        mine = [verdict for verdict in plan.verdicts if verdict.side == side]
        going = [verdict for verdict in mine if verdict.action != "keep"]
        size = sum(members[verdict.path].size_bytes for verdict in going)
        money = f", ${size / 1e9 * price:,.2f} per month" if side == "remote" and price is not None and going else ""
        render.say(f"{side}: {len(going)} of {len(mine)} would go, {render.size(size)}{money}")
        guarded = Counter(verdict.reasons[0].why for verdict in mine if _by_guards_alone(verdict))
        if guarded:
            told = ", ".join(f"{number} {why}" for why, number in guarded.most_common())
            render.say(f"  kept by a guard, by no rule: {told} (`tinker-sync explain` tells more)")
    if plan.breaker is not None:
        render.breaker(plan.breaker, "would happen")


def _by_guards_alone(verdict: Verdict) -> bool:
    kept = verdict.action == "keep" and verdict.policy is not None
    return kept and all(reason.why in GUARDS for reason in verdict.reasons)


def _tell_difference(before: RetentionPlan, after: RetentionPlan, *, complete: bool, as_json: bool) -> None:
    """What another configuration would change."""
    old = {(verdict.path, verdict.side): verdict for verdict in before.verdicts}
    changed = [
        (old[verdict.path, verdict.side], verdict)
        for verdict in after.verdicts
        if old[verdict.path, verdict.side].action != verdict.action
    ]
    if as_json:
        render.print_json(
            {
                "complete": complete,
                "breaker": None if after.breaker is None else after.breaker.as_json(),
                "changed": [{"before": _as_json(a), "after": _as_json(b)} for a, b in changed],
            }
        )
        return
    if not complete:
        render.say("the listing is unproven: nothing may go, by either configuration")
    for was, now in changed:
        why = "; ".join(reason.detail or reason.why for reason in now.reasons[:2])
        render.say(f"{now.side} {now.path}: {was.action} -> {now.action} ({why})")
    counts = Counter(f"{was.action} -> {now.action}" for was, now in changed)
    render.say(", ".join(f"{number} {what}" for what, number in counts.items()) or "no difference")


def _tell_story(story: _Story, settings: Settings, source: str, now: datetime) -> None:
    member = story.member
    render.say(str(member.path))
    render.say(f"  made {render.ago(member.time, now)}{', short-lived' if member.short_lived else ''}; from {source}")
    if member.remote is None:
        by = ": deleted by policy" if member.deleted_by_us else ""
        render.say(f"  upstream: not listed{by}")
    else:
        expiry = member.remote.expires_at
        ends = "never expires" if expiry is None else f"expires {render.ahead(expiry, now)}"
        render.say(f"  upstream: {render.size(member.remote.size_bytes or 0)}, {ends}")
    if member.replica is None:
        render.say(f"  here: no replica{f' ({story.failure})' if story.failure else ''}")
    else:
        replica = member.replica
        state = f"DAMAGED: {'; '.join(replica.damaged)}" if replica.damaged else replica.fidelity
        render.say(f"  here: {settings.root / replica.directory} ({state})")
        render.say(f"  proof: read back or written {render.ago(replica.verified_at, now)}; "
                   f"manifest {replica.manifest_sha256[:16]}…")  # fmt: skip
    if story.other is not None:
        where = settings.root / story.other.directory
        render.say(f"  here, under this path, but of another object ({_moment_text(story.other.time)}): {where}")
    for verdict, change in zip(story.verdicts, story.changes, strict=True):
        policy = f" by policy {verdict.policy!r}" if verdict.policy else ""
        render.say(f"  {verdict.side}: {verdict.action}{policy}")
        for reason in verdict.reasons:
            render.say(f"    {reason.why}: {reason.detail}")
        render.say(f"    {change}")
