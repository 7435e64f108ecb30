"""What may go, and why: one verdict with reasons per checkpoint and side. Pure; deletes nothing.

- **Policy**: the first that matches governs. An unknown match ends the search with *keep*; what none selects is kept.
- **Rule**: what any rule of the policy keeps is kept. Rules count only members that the same policy governs.
- **Guard**: a keep that no configuration can switch off. Guards look at the whole group, which is (run, type).
- A checkpoint that was born short-lived, is under a TTL that we set, or is dated in the future takes part in no rule:
  it is no anchor, no count, and fills no slot.
- **Never both**: what one side would let go, the other keeps.

Order is by time, ties by step, never by string.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final, Literal

from tinker_sync.model.moments import UNKNOWN_TIME

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from datetime import datetime, timedelta, tzinfo

    from tinker_sync.model.checkpoint import Checkpoint
    from tinker_sync.model.paths import TinkerPath
    from tinker_sync.model.work import Replica

    Kept = dict[TinkerPath, tuple["Policy | None", list["Reason"]]]

Side = Literal["remote", "local"]
Action = Literal["keep", "delete", "expire"]
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
    max_deletes: int = 50
    max_delete_fraction: float = 0.25


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


def plan_retention(
    members: Iterable[Member], rules: RetentionRules, *, now: datetime, complete: bool, allow: int | None = None
) -> RetentionPlan:
    """Decide for every member and side where it exists.

    `complete` says whether the remote side is a proven listing; if not, everything is kept. `allow` lifts the
    breaker's limits for at most so many deletes.
    """
    groups: dict[tuple[str, str], list[Member]] = {}
    listed = 0
    for member in members:
        groups.setdefault((member.path.run_id, member.path.checkpoint_type), []).append(member)
        listed += member.remote is not None
    verdicts: list[Verdict] = []
    for _, group in sorted(groups.items()):
        group.sort(key=_order)
        verdicts += _decide_group(group, rules, now, complete=complete)
    deletes = sum(1 for verdict in verdicts if verdict.side == "remote" and verdict.action != "keep")
    return RetentionPlan(tuple(verdicts), _breaker(deletes, listed, rules, allow))


def _breaker(deletes: int, listed: int, rules: RetentionRules, allow: int | None) -> Breaker | None:
    if allow is not None:
        tripped = deletes > allow
    else:
        too_large = deletes >= BREAKER_FRACTION_FROM and deletes > rules.max_delete_fraction * listed
        tripped = deletes > rules.max_deletes or too_large
    return Breaker(deletes, listed, rules.max_deletes, rules.max_delete_fraction) if tripped else None


def _order(member: Member) -> tuple[datetime, int, TinkerPath]:
    return member.time, -1 if member.step is None else member.step, member.path


def _decide_group(group: Sequence[Member], rules: RetentionRules, now: datetime, *, complete: bool) -> list[Verdict]:
    remote = [member for member in group if member.remote is not None]
    local = [member for member in group if member.replica is not None]
    remote_kept = _kept_by_policy(remote, rules.remote, rules.timezone, now)
    local_kept = _kept_by_policy(local, rules.local, rules.timezone, now)
    for member in remote:
        remote_kept[member.path][1].extend(_remote_guards(member, rules, now, remote_kept[member.path][0]))
    for member in local:
        local_kept[member.path][1].extend(_local_guards(member, rules, now, local_kept[member.path][0]))
    for found, members in ((remote_kept, remote), (local_kept, local)):
        _guard_newest(found, members, now)
        if not complete:
            for _, reasons in found.values():
                reasons.append(Reason("unproven", "the listing is not proven complete"))
    both = {path for path, (_, reasons) in remote_kept.items() if not reasons} & {
        path for path, (_, reasons) in local_kept.items() if not reasons
    }
    for path in both:
        remote_kept[path][1].append(Reason("other-side", "the local side would let it go too"))
        local_kept[path][1].append(Reason("other-side", "the remote side would let it go too"))
    return [
        *(_verdict(member.path, "remote", *remote_kept[member.path], action=rules.action) for member in remote),
        *(_verdict(member.path, "local", *local_kept[member.path], action="delete") for member in local),
    ]


def _verdict(path: TinkerPath, side: Side, policy: Policy | None, kept: list[Reason], *, action: Action) -> Verdict:
    name = None if policy is None else policy.name
    if kept:
        return Verdict(path, side, "keep", name, tuple(kept))
    told = [Reason("no-rule", f"no rule of policy {name!r} keeps it")]
    if policy is not None and policy.keep_every_steps is not None and step_of(path.name) is None:
        told.append(Reason("keep_every_steps", "its name has no step: neither kept nor dropped by this rule"))
    return Verdict(path, side, action, name, tuple(told))


def _kept_by_policy(members: Sequence[Member], policies: Sequence[Policy], zone: tzinfo, now: datetime) -> Kept:
    """For each member the policy that governs it, and why it or a rule keeps it; an empty list lets it go."""
    found: Kept = {}
    governed: dict[int, list[Member]] = {}
    for member in members:
        policy, reason = _governing(member, policies)
        found[member.path] = (policy, [reason] if reason is not None else [])
        if policy is not None and reason is None and _takes_part(member, now):
            governed.setdefault(policies.index(policy), []).append(member)
    for index, participants in governed.items():
        for path, reason in _apply(policies[index], participants, zone):
            found[path][1].append(reason)
    return found


def _takes_part(member: Member, now: datetime) -> bool:
    return not member.short_lived and not member.ttl_is_ours and _is_dated(member) and member.time <= now


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
    return None, Reason("no-policy", "no policy selects it")


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


# Rules: each gives (path, reason) for what it keeps. Members come oldest first.


def _apply(policy: Policy, members: Sequence[Member], zone: tzinfo) -> Iterable[tuple[TinkerPath, Reason]]:
    if policy.keep_last is not None:
        for place, member in enumerate(reversed(members[-policy.keep_last :]), start=1):
            yield member.path, Reason("keep_last", f"number {place} of the newest {policy.keep_last}")
    if policy.keep_within is not None:
        for member in members:
            if members[-1].time - member.time <= policy.keep_within:
                yield member.path, Reason("keep_within", f"within {policy.keep_within} of the newest")
    for slot, count in policy.keep_slots.items():
        yield from _keep_slots(slot, count, members, zone)
    if policy.keep_every_steps is not None:
        yield from _keep_every_steps(policy.keep_every_steps, members)
    for member in members:
        for glob in policy.keep_names:
            if fnmatchcase(member.path.name, glob):
                yield member.path, Reason("keep_names", f"its name matches {glob!r}")
                break
    if policy.keep_best is not None:
        yield from _keep_best(policy.keep_best, members)


def _keep_slots(slot: str, count: int, members: Sequence[Member], zone: tzinfo) -> Iterable[tuple[TinkerPath, Reason]]:
    """The newest of each of the last slots that hold any; when slots are missing, the oldest besides."""
    key_of = _SLOTS[slot]
    filled: set[tuple[object, ...]] = set()
    for member in reversed(members):
        key = key_of(member.time.astimezone(zone))
        if key in filled:
            continue
        if len(filled) == count:
            return
        filled.add(key)
        yield member.path, Reason(f"keep_{slot}", f"newest of slot {len(filled)} of {count}")
    if len(filled) < count:
        yield members[0].path, Reason(f"keep_{slot}", f"oldest; {len(filled)} of {count} slots are filled")


def _keep_every_steps(every: int, members: Sequence[Member]) -> Iterable[tuple[TinkerPath, Reason]]:
    highest: dict[int, Member] = {}
    for member in members:
        if member.step is None:
            continue
        bucket = member.step // every
        best = highest.get(bucket)
        if best is None or best.step is None or member.step >= best.step:
            highest[bucket] = member
    for bucket, member in highest.items():
        detail = f"highest step from {bucket * every} to {(bucket + 1) * every - 1}"
        yield member.path, Reason("keep_every_steps", detail)


def _keep_best(rule: KeepBest, members: Sequence[Member]) -> Iterable[tuple[TinkerPath, Reason]]:
    """The best by the metric; a missing or non-numeric value means keep."""
    valued: list[tuple[float, int, Member]] = []
    for position, member in enumerate(members):
        value = _number((member.user_metadata or {}).get(rule.metric))
        if value is None:
            yield member.path, Reason("keep_best", f"it has no number {rule.metric!r}")
        else:
            valued.append((-value if rule.mode == "max" else value, -position, member))
    valued.sort(key=lambda item: item[:2])
    for place, (_, _, member) in enumerate(valued[: rule.count], start=1):
        yield member.path, Reason("keep_best", f"number {place} of the best {rule.count} by {rule.metric}")


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


# Guards


def _guard_newest(found: Kept, members: Sequence[Member], now: datetime) -> None:
    """The newest of the group, and the newest without short-lived, TTL'd and future ones."""
    if not members:
        return
    found[members[-1].path][1].append(Reason("newest", "newest of its run and type"))
    lasting = next((member for member in reversed(members) if _takes_part(member, now)), None)
    if lasting is not None and lasting is not members[-1]:
        found[lasting.path][1].append(Reason("newest", "newest of its run and type that lasts"))


def _common_guards(member: Member, rules: RetentionRules, now: datetime) -> Iterable[Reason]:
    if member.pinned:
        yield Reason("pinned", "pinned; `tinker-sync unpin` lifts it")
    if not _is_dated(member):
        yield Reason("unknown", "the service gave no time for it")
    if member.time > now:
        yield Reason("future", "created in the future")
    elif now - member.time < rules.min_age:
        yield Reason("young", f"younger than min_age ({rules.min_age})")


def _remote_guards(member: Member, rules: RetentionRules, now: datetime, policy: Policy | None) -> Iterable[Reason]:
    yield from _common_guards(member, rules, now)
    replica, remote = member.replica, member.remote
    if replica is None:
        yield Reason("not-replicated", "there is no replica of it")
    elif replica.damaged:
        yield Reason("not-replicated", "its replica is damaged")
    elif replica.fidelity != "exact" and not (policy is not None and policy.delete_adapter_only):
        yield Reason("fidelity", f"its replica is only {replica.fidelity}")
    if remote is not None and remote.public:
        yield Reason("public", "it is public: others may use it")
    if member.ttl_is_ours:
        yield Reason("expiring", "it runs out already, by our TTL")


def _local_guards(member: Member, rules: RetentionRules, now: datetime, policy: Policy | None) -> Iterable[Reason]:
    yield from _common_guards(member, rules, now)
    if member.remote is None:
        if member.deleted_by_us:
            yield Reason("last-copy", "its original was deleted by policy: this is all there is")
        elif policy is None or policy.keep_orphans:
            yield Reason("orphan", "its original is gone upstream")
    elif member.remote.expires_at is not None:
        yield Reason("expiring-original", "its original expires: that is no second copy")
