"""What may go, and why: one verdict with reasons per checkpoint and side. Pure; deletes nothing.

- **Policy**: the first that matches governs. An unknown match ends the search with *keep*; what none selects is kept.
- **Rule**: what any rule of the policy keeps is kept. Rules count only members that the same policy governs.
- **Guard**: a keep that no configuration can switch off. Guards look at the whole group, which is (run, type).
- A checkpoint that was born short-lived, is under a TTL that we set, or is dated in the future takes part in no rule:
  it is no anchor, no count, and fills no slot.
- **Never both**: what one side would let go, the other keeps.
- **Twins**: where a server is not known to keep types apart, a name that exists in several types goes as a whole or not.
- **max_bytes** is the last rule: it takes what no guard keeps, oldest first, where a living original stays.

Order is by time, ties by step, never by string.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from datetime import timedelta
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final, Literal

from tinker_sync.model.moments import FAR_FUTURE, UNKNOWN_TIME, rfc3339
from tinker_sync.model.work import Replica

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from datetime import datetime, tzinfo

    from tinker_sync.model.checkpoint import Checkpoint
    from tinker_sync.model.paths import TinkerPath

Side = Literal["remote", "local"]
Action = Literal["keep", "delete", "expire"]
GUARDS: Final = frozenset(
    {"leaving", "declined"}
    | {
        "newest",
        "not-replicated",
        "fidelity",
        "public",
        "pinned",
        "future",
        "young",
        "unknown",
        "other-side",
        "unproven",
    }
    | {"expiring", "expires", "withheld", "twin", "expiring-original", "orphan", "last-copy"}
)
"""Reasons that no configuration switches off; the others are rules, and `no-policy`."""
BREAKER_FRACTION_FROM: Final = 10
"""Deletes from which on the fraction counts: three of four in a small account are no mass deletion."""
_STEP_WORDS: Final = tuple(
    re.compile(rf"{word}[-_]?(\d+)", re.IGNORECASE) for word in ("step", "ckpt", "checkpoint", "iter", "epoch")
)
_SLOTS: Final[Mapping[str, Callable[[datetime], tuple[object, ...]]]] = {
    "hourly": lambda local: (local.date(), local.hour, local.utcoffset()),
    "daily": lambda local: (local.date(),),
    "weekly": lambda local: tuple(local.isocalendar()[:2]),
    "monthly": lambda local: (local.year, local.month),
    "yearly": lambda local: (local.year,),
}


@dataclass(frozen=True, slots=True)
class KeepBest:
    """Keep the best by a number in the metadata."""

    metric: str
    mode: Literal["min", "max"]
    count: int


@dataclass(frozen=True, slots=True)
class Policy:
    """What it selects, and the rules that keep. Counts are positive where they are set."""

    name: str
    types: tuple[str, ...]
    include: tuple[str, ...] = ()
    base_model: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    keep_last: int | None = None
    keep_within: timedelta | None = None
    keep_slots: Mapping[str, int] = field(default_factory=dict)
    """`hourly`, `daily`, `weekly`, `monthly`, `yearly` to a number of slots."""
    keep_every_steps: int | None = None
    keep_names: tuple[str, ...] = ()
    keep_best: KeepBest | None = None
    delete_adapter_only: bool = False
    keep_orphans: bool = True


@dataclass(frozen=True, slots=True)
class RetentionRules:
    """The policies of both sides, and the numbers of the guards and the breaker."""

    timezone: tzinfo
    min_age: timedelta
    remote: tuple[Policy, ...] = ()
    local: tuple[Policy, ...] = ()
    action: Literal["delete", "expire"] = "delete"
    grace: timedelta = timedelta(0)
    """How long a verdict must stand before a delete; for `expire`, the TTL that is set."""
    max_deletes: int = 50
    max_delete_fraction: float = 0.25
    max_bytes: int = 0
    """What the replicas may weigh in all; 0 is no limit."""
    types_apart: bool = False
    """Whether the server is known to leave `weights/x` alone when `sampler_weights/x` is deleted."""


@dataclass(frozen=True, slots=True)
class Member:
    """One checkpoint of the inventory: what exists where."""

    path: TinkerPath
    time: datetime
    remote: Checkpoint | None = None
    replica: Replica | None = None
    """The replica of this very object (identity), undamaged or not; None for another object's."""
    short_lived: bool = False
    pinned: bool = False
    ttl_is_ours: bool = False
    deleted_by_us: bool = False
    """The original is gone because a policy let it go: then the replica is all there is."""
    withheld: str = ""
    """Why a deed that was tried is not tried again yet: refused by the service, or not confirmed."""
    declined: bool = False
    """We had set a TTL and somebody else changed it: no other is set."""
    leaving: bool = False
    """A delete or a TTL of ours is under way: the original is no second copy."""
    base_model: str | None = None
    """None when it is not known."""
    user_metadata: Mapping[str, str] | None = None
    """None when it could not be had."""
    step: int | None = None

    @property
    def size_bytes(self) -> int:
        """What it weighs, as well as is known."""
        if self.remote is not None and self.remote.size_bytes is not None:
            return self.remote.size_bytes
        return 0 if self.replica is None else self.replica.total_bytes


@dataclass(frozen=True, slots=True)
class Reason:
    """Why: a stable word, and the details for people."""

    why: str
    detail: str = ""


_UNPROVEN: Final = Reason("unproven", "the listing is not proven complete")
_NO_POLICY: Final = Reason("no-policy", "no policy selects it")
_NEWEST: Final = Reason("newest", "newest of its run and type")
_NEWEST_LASTING: Final = Reason("newest", "newest of its run and type that lasts")
_NOT_REPLICATED: Final = Reason("not-replicated", "there is no replica of it")


@dataclass(frozen=True, slots=True)
class Verdict:
    """The one decision about a checkpoint on a side."""

    path: TinkerPath
    side: Side
    action: Action
    policy: str | None
    reasons: tuple[Reason, ...]
    """Never empty."""


@dataclass(frozen=True, slots=True)
class Breaker:
    """The stop on mass deletion has tripped: none of the deletes happens."""

    deletes: int
    listed: int
    max_deletes: int
    max_delete_fraction: float

    def as_json(self) -> dict[str, object]:
        """For `plan --json`."""
        return {
            "deletes": self.deletes,
            "listed": self.listed,
            "max_deletes": self.max_deletes,
            "max_delete_fraction": self.max_delete_fraction,
        }


@dataclass(frozen=True, slots=True)
class RetentionPlan:
    """All verdicts, and whether the breaker tripped."""

    verdicts: tuple[Verdict, ...]
    breaker: Breaker | None
    over_bytes: int = 0
    """By how much the replicas will still exceed `max_bytes`, since what is left must stay."""
    least_bytes: int = 0
    """With `max_bytes`: what the replicas weigh that no rule of that kind can let go."""

    @property
    def permitted(self) -> tuple[Verdict, ...]:
        """What may be carried out: nothing at all, on either side, when the breaker tripped."""
        if self.breaker is not None:
            return ()
        return tuple(verdict for verdict in self.verdicts if verdict.action != "keep")


def step_of(name: str) -> int | None:
    """The whole name if digits, else the digits after `step`, `ckpt`, `checkpoint`, `iter`, `epoch`."""
    if name.isascii() and name.isdigit():
        return int(name[:30])
    for pattern in _STEP_WORDS:
        found = pattern.search(name)
        if found:
            return int(found.group(1)[:30])
    return None


@dataclass(slots=True)
class _Case:
    """One member on one side: what governs it, and what keeps it so far."""

    member: Member
    policy: Policy | None
    kept: list[Reason]


def plan_retention(
    members: Iterable[Member],
    rules: RetentionRules,
    *,
    now: datetime,
    complete: bool,
    allow: int | None = None,
    other_bytes: int = 0,
    standing: Mapping[TinkerPath, tuple[datetime, datetime]] | None = None,
) -> RetentionPlan:
    """Decide for every member and side where it exists.

    `complete` says whether the remote side is a proven listing; if not, everything is kept. `allow` lifts the
    breaker's limits for at most so many deletes. `other_bytes` is what weighs here besides the members: superseded
    versions. `standing` says of what may go upstream (path to the object's time) since when it may: with a grace, only
    what stood for it counts as a delete of this pass.
    """
    groups: dict[tuple[str, str], list[Member]] = {}
    listed = 0
    for member in members:
        groups.setdefault((member.path.run_id, member.path.segment), []).append(member)
        listed += member.remote is not None
    remote: list[_Case] = []
    local: list[_Case] = []
    for _, group in sorted(groups.items()):
        group.sort(key=_order)
        theirs, ours = _decide_group(group, rules, now, complete=complete)
        remote += theirs
        local += ours
    if not rules.types_apart:
        _keep_with_twins(remote)
    released, over, least = _make_room(remote, local, rules, other_bytes) if rules.max_bytes else ({}, 0, 0)
    verdicts = [
        *(_verdict(case, "remote", action=rules.action) for case in remote),
        *(released.get(case.member.path) or _verdict(case, "local", action="delete") for case in local),
    ]
    verdicts.sort(key=lambda verdict: (verdict.path.run_id, verdict.path.segment))
    deletes = sum(1 for case in remote if not case.kept and _stood(case.member, rules, standing or {}, now))
    deletes += sum(1 for case in local if not case.kept and case.member.remote is None)
    return RetentionPlan(tuple(verdicts), _breaker(deletes, listed, rules, allow), over, least)


def not_worth_copying(
    members: Sequence[Member], rules: RetentionRules, *, now: datetime, other_bytes: int = 0
) -> dict[TinkerPath, Reason]:
    """What is listed, not here, and would be let go here at once if it were, with why."""
    if not rules.local and not rules.max_bytes:
        return {}
    missing = {member.path for member in members if member.replica is None}
    imagined = [replace(member, replica=_imagine(member)) if member.path in missing else member for member in members]
    plan = plan_retention(imagined, rules, now=now, complete=True, other_bytes=other_bytes)
    return {
        verdict.path: verdict.reasons[0]
        for verdict in plan.verdicts
        if verdict.side == "local" and verdict.action == "delete" and verdict.path in missing
    }


def _imagine(member: Member) -> Replica:
    """A perfect replica of what is only listed."""
    size = member.size_bytes
    return Replica(
        path=member.path,
        time=member.time,
        size_bytes=size,
        directory="",
        total_bytes=size,
        files=0,
        fidelity="exact",
        source="archive",
        committed_at=member.time,
        verified_at=member.time,
        manifest_sha256="",
    )


def _stood(
    member: Member, rules: RetentionRules, standing: Mapping[TinkerPath, tuple[datetime, datetime]], now: datetime
) -> bool:
    """Whether its verdict is old enough for a delete."""
    if rules.action == "expire" or rules.grace <= timedelta(0):
        return True
    time, since = standing.get(member.path, (None, now))
    return time == member.time and now - since >= rules.grace


def _breaker(deletes: int, listed: int, rules: RetentionRules, allow: int | None) -> Breaker | None:
    if allow is not None:
        tripped = deletes > allow
    else:
        too_large = deletes >= BREAKER_FRACTION_FROM and deletes > rules.max_delete_fraction * listed
        tripped = deletes > rules.max_deletes or too_large
    return Breaker(deletes, listed, rules.max_deletes, rules.max_delete_fraction) if tripped else None


def _order(member: Member) -> tuple[datetime, int, str]:
    return member.time, -1 if member.step is None else member.step, member.path.name


def _decide_group(
    group: Sequence[Member], rules: RetentionRules, now: datetime, *, complete: bool
) -> tuple[list[_Case], list[_Case]]:
    remote = _by_policy([member for member in group if member.remote is not None], rules.remote, rules.timezone, now)
    local = _by_policy([member for member in group if member.replica is not None], rules.local, rules.timezone, now)
    for case in remote:
        case.kept.extend(_remote_guards(case.member, rules, now, case.policy))
    for case in local:
        case.kept.extend(_local_guards(case.member, rules, now, case.policy))
    _guard_newest(remote, lambda member: member.remote is not None and member.remote.expires_at is None, now)
    _guard_newest(local, lambda _: True, now)
    for cases in (remote, local):
        if not complete:
            for case in cases:
                case.kept.append(_UNPROVEN)
    going = {id(case.member): case for case in remote if not case.kept}
    for case in local:
        other = None if case.kept else going.get(id(case.member))
        if other is not None:
            other.kept.append(Reason("other-side", "the local side would let it go too"))
            case.kept.append(Reason("other-side", "the remote side would let it go too"))
    return remote, local


def _keep_with_twins(remote: Sequence[_Case]) -> None:
    """A name that exists in several types goes as a whole or not: one delete may take them all."""
    named: dict[tuple[str, str], list[_Case]] = {}
    for case in remote:
        named.setdefault((case.member.path.run_id, case.member.path.name), []).append(case)
    for twins in named.values():
        staying = next((case for case in twins if not _goes(case)), None)
        if staying is None or len(twins) == 1:
            continue
        detail = (
            f"this server may delete {staying.member.path.checkpoint_id} with it, and that stays "
            "([tinker] types_apart = true says that it does not)"
        )
        for case in twins:
            if _goes(case):
                case.kept.append(Reason("twin", detail))


def _goes(case: _Case) -> bool:
    """Whether it is let go, or runs out by our TTL and nothing takes that back."""
    return not case.kept or (case.member.ttl_is_ours and all(reason.why == "expiring" for reason in case.kept))


def _make_room(
    remote: Sequence[_Case], local: Sequence[_Case], rules: RetentionRules, other_bytes: int
) -> tuple[dict[TinkerPath, Verdict], int, int]:
    """Let go what no guard keeps, oldest first, until `max_bytes` is met.

    Besides: by how much it is not, and what would be left if all of that went.
    """
    staying = {case.member.path for case in remote if case.kept}
    weight = other_bytes + sum(_weight(case.member) for case in local if case.kept)
    released: dict[TinkerPath, Verdict] = {}
    may_go = [
        case
        for case in local
        if case.kept and case.member.path in staying and not any(reason.why in GUARDS for reason in case.kept)
    ]
    least = weight - sum(_weight(case.member) for case in may_go)
    for case in sorted(may_go, key=lambda case: _order(case.member)):
        if weight <= rules.max_bytes:
            break
        weight -= _weight(case.member)
        policy = None if case.policy is None else case.policy.name
        why = Reason("max_bytes", "the replicas weigh more than max_bytes, and this is the oldest that may go")
        released[case.member.path] = Verdict(case.member.path, "local", "delete", policy, (why,))
    return released, max(0, weight - rules.max_bytes), least


def _weight(member: Member) -> int:
    return 0 if member.replica is None else member.replica.total_bytes


def _verdict(case: _Case, side: Side, *, action: Action) -> Verdict:
    path, policy = case.member.path, case.policy
    name = None if policy is None else policy.name
    if case.kept:
        return Verdict(path, side, "keep", name, tuple(case.kept))
    told = [Reason("no-rule", f"no rule of policy {name!r} keeps it")]
    if case.member.short_lived:
        told.append(Reason("short-lived", "born short-lived: it takes part in no rule"))
    elif policy is not None and policy.keep_every_steps is not None and case.member.step is None:
        told.append(Reason("keep_every_steps", "its name has no step: neither kept nor dropped by this rule"))
    return Verdict(path, side, action, name, tuple(told))


def _by_policy(members: Sequence[Member], policies: Sequence[Policy], zone: tzinfo, now: datetime) -> list[_Case]:
    """For each member the policy that governs it, and why it or a rule keeps it; an empty list lets it go.

    One under our own TTL takes part in no rule; whether a rule would keep it by now is asked all the same, since that
    changed verdict is what gives it its former expiry back.
    """
    cases: list[_Case] = []
    governed: dict[int, list[_Case]] = {}
    under_ttl: set[int] = set()
    for member in members:
        policy, reason = _governing(member, policies)
        case = _Case(member, policy, [] if reason is None else [reason])
        cases.append(case)
        if policy is not None and reason is None and _takes_part(member, now, ttl_is_ours=False):
            index = next(place for place, known in enumerate(policies) if known is policy)
            governed.setdefault(index, []).append(case)
            if member.ttl_is_ours:
                under_ttl.add(index)
    for index, asked in governed.items():
        participants = [case for case in asked if not case.member.ttl_is_ours] if index in under_ttl else asked
        if participants:
            for case, reason in _apply(policies[index], participants, zone):
                case.kept.append(reason)
        if index in under_ttl:
            for case, reason in _apply(policies[index], asked, zone):
                if case.member.ttl_is_ours:
                    case.kept.append(reason)
    return cases


def _takes_part(member: Member, now: datetime, *, ttl_is_ours: bool) -> bool:
    if member.short_lived or ttl_is_ours:
        return False
    return _is_dated(member) and member.time <= now


def _is_dated(member: Member) -> bool:
    """Whether the service gave a time that can be one; year 1 is some languages' word for none."""
    return member.time > UNKNOWN_TIME


def _governing(member: Member, policies: Sequence[Policy]) -> tuple[Policy | None, Reason | None]:
    for policy in policies:
        match = _match(member, policy)
        if match is None:
            return policy, Reason("unknown", f"whether policy {policy.name!r} matches cannot be told")
        if match:
            return policy, None
    return None, _NO_POLICY


def _match(member: Member, policy: Policy) -> bool | None:
    """Yes, no, or None for unknown. A certain no decides, whatever else is unknown."""
    if member.path.checkpoint_type not in policy.types:
        return False
    if policy.include and not any(member.path.matches(glob) for glob in policy.include):
        return False
    unknown = False
    if policy.base_model is not None:
        if member.base_model is None:
            unknown = True
        elif not fnmatchcase(member.base_model, policy.base_model):
            return False
    if policy.metadata:
        if member.user_metadata is None:
            unknown = True
        elif any(member.user_metadata.get(key) != value for key, value in policy.metadata.items()):
            return False
    return None if unknown else True


# Rules: each gives (case, reason) for what it keeps. Cases come oldest first, and there is at least one.


def _apply(policy: Policy, cases: Sequence[_Case], zone: tzinfo) -> Iterable[tuple[_Case, Reason]]:
    if policy.keep_last is not None:
        for place, case in enumerate(reversed(cases[-policy.keep_last :]), start=1):
            yield case, Reason("keep_last", f"number {place} of the newest {policy.keep_last}")
    if policy.keep_within is not None:
        newest = cases[-1].member.time
        within = Reason("keep_within", f"within {duration(policy.keep_within)} of the newest")
        for case in reversed(cases):
            if newest - case.member.time > policy.keep_within:
                break
            yield case, within
    for slot, count in policy.keep_slots.items():
        yield from _keep_slots(slot, count, cases, zone)
    if policy.keep_every_steps is not None:
        yield from _keep_every_steps(policy.keep_every_steps, cases)
    if policy.keep_names:
        for case in cases:
            for glob in policy.keep_names:
                if fnmatchcase(case.member.path.name, glob):
                    yield case, Reason("keep_names", f"its name matches {glob!r}")
                    break
    if policy.keep_best is not None:
        yield from _keep_best(policy.keep_best, cases)


def _keep_slots(slot: str, count: int, cases: Sequence[_Case], zone: tzinfo) -> Iterable[tuple[_Case, Reason]]:
    """The newest of each of the last slots that hold any; when slots are missing, the oldest besides."""
    key_of = _SLOTS[slot]
    filled: set[tuple[object, ...]] = set()
    for case in reversed(cases):
        key = key_of(case.member.time.astimezone(zone))
        if key in filled:
            continue
        if len(filled) == count:
            return
        filled.add(key)
        yield case, Reason(f"keep_{slot}", f"newest of slot {len(filled)} of {count}")
    if len(filled) < count:
        yield cases[0], Reason(f"keep_{slot}", f"oldest; {len(filled)} of {count} slots are filled")


def _keep_every_steps(every: int, cases: Sequence[_Case]) -> Iterable[tuple[_Case, Reason]]:
    highest: dict[int, tuple[int, _Case]] = {}
    for case in cases:
        step = case.member.step
        if step is None:
            continue
        best = highest.get(step // every)
        if best is None or step >= best[0]:
            highest[step // every] = (step, case)
    for bucket, (_, case) in highest.items():
        detail = f"highest step from {bucket * every} to {(bucket + 1) * every - 1}"
        yield case, Reason("keep_every_steps", detail)


def _keep_best(rule: KeepBest, cases: Sequence[_Case]) -> Iterable[tuple[_Case, Reason]]:
    """The best by the metric; a missing or non-numeric value means keep."""
    valued: list[tuple[float, int, _Case]] = []
    for position, case in enumerate(cases):
        value = _number((case.member.user_metadata or {}).get(rule.metric))
        if value is None:
            yield case, Reason("keep_best", f"it has no number {rule.metric!r}")
        else:
            valued.append((-value if rule.mode == "max" else value, -position, case))
    valued.sort(key=lambda item: item[:2])
    for place, (_, _, case) in enumerate(valued[: rule.count], start=1):
        yield case, Reason("keep_best", f"number {place} of the best {rule.count} by {rule.metric}")


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


# Guards


def _guard_newest(cases: Sequence[_Case], lasts: Callable[[Member], bool], now: datetime) -> None:
    """The newest of the group, and the newest that remains without short-lived, TTL'd and future ones."""
    if not cases:
        return
    cases[-1].kept.append(_NEWEST)
    for case in reversed(cases):
        if _takes_part(case.member, now, ttl_is_ours=case.member.ttl_is_ours) and lasts(case.member):
            if case is not cases[-1]:
                case.kept.append(_NEWEST_LASTING)
            return


def _common_guards(member: Member, rules: RetentionRules, now: datetime) -> Iterable[Reason]:
    if member.pinned:
        yield Reason("pinned", "pinned; `tinker-sync unpin` lifts it")
    if not _is_dated(member):
        yield Reason("unknown", "the service gave no time for it")
    if member.time > now:
        yield Reason("future", "created in the future")
    elif now - member.time < rules.min_age:
        yield Reason("young", f"younger than min_age ({duration(rules.min_age)})")


def _remote_guards(member: Member, rules: RetentionRules, now: datetime, policy: Policy | None) -> Iterable[Reason]:
    yield from _common_guards(member, rules, now)
    replica, remote = member.replica, member.remote
    if replica is None:
        yield _NOT_REPLICATED
    elif replica.damaged:
        yield Reason("not-replicated", "its replica is damaged")
    elif replica.fidelity != "exact" and not (policy is not None and policy.delete_adapter_only):
        yield Reason("fidelity", f"its replica is only {replica.fidelity}")
    if member.withheld:
        yield Reason("withheld", member.withheld)
    if remote is None:
        return
    if remote.expires_at == FAR_FUTURE:
        yield Reason("unknown", "its expiry cannot be read")
    if remote.public:
        yield Reason("public", "it is public: others may use it")
    if member.ttl_is_ours:
        ends = "" if remote.expires_at is None else f", at {rfc3339(remote.expires_at)}"
        yield Reason("expiring", f"it runs out already, by our TTL{ends}")
    elif rules.action == "expire" and remote.expires_at is not None and remote.expires_at <= now + rules.grace:
        yield Reason("expires", "it expires by itself before a TTL of ours would end")
    elif rules.action == "expire" and member.declined:
        yield Reason("declined", "we had set a TTL, and somebody else changed it: no other is set")


def _local_guards(member: Member, rules: RetentionRules, now: datetime, policy: Policy | None) -> Iterable[Reason]:
    yield from _common_guards(member, rules, now)
    if member.remote is None:
        if member.deleted_by_us:
            yield Reason("last-copy", "its original was deleted by policy: this is all there is")
        elif policy is None or policy.keep_orphans:
            yield Reason("orphan", "its original is gone upstream")
    elif member.leaving:
        yield Reason("leaving", "its original is being deleted, or put under a TTL: that is no second copy")
    elif member.remote.expires_at is not None:
        yield Reason("expiring-original", "its original expires: that is no second copy")


def duration(value: timedelta) -> str:
    """`90 s`, `2 h`, `7 days`: in the largest unit that fits it."""
    seconds = int(value.total_seconds())
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds and seconds % size == 0:
            number = seconds // size
            return "1 day" if unit == "days" and number == 1 else f"{number} {unit}"
    return f"{seconds} s"
