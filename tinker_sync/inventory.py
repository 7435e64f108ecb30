"""The inventory: what is listed joined with what is here, what we did, and what is pinned. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from tinker_sync.model.deeds import GONE, LEAVING, OPEN, Deed, DeedKey
from tinker_sync.model.moments import rfc3339
from tinker_sync.planning import Known, is_short_lived
from tinker_sync.retention import Member, RetentionPlan, RetentionRules, plan_retention, step_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from datetime import datetime

    from tinker_sync.model.checkpoint import Checkpoint
    from tinker_sync.model.paths import TinkerPath

CLOCK_TOLERANCE: Final = timedelta(minutes=10)
"""How far two clocks may be apart."""
UNCONFIRMED_FOR: Final = timedelta(hours=24)
"""For so long a delete that the service confirmed is not repeated, though it still lists the checkpoint."""


@dataclass(frozen=True, slots=True)
class Holdings:
    """All that this side knows when it decides."""

    known: Known = field(default_factory=Known)
    deeds: Mapping[DeedKey, Deed] = field(default_factory=dict)
    standing: Mapping[TinkerPath, tuple[datetime, datetime]] = field(default_factory=dict)
    """Of what may go upstream: the object's time, and since when."""
    pins: tuple[str, ...] = ()
    base_models: Mapping[str, str] = field(default_factory=dict)
    other_bytes: int = 0
    """What superseded versions weigh."""
    types_apart: bool = False
    """Whether the server was found to keep the types of a name apart."""

    def rules(self, configured: RetentionRules) -> RetentionRules:
        """The configured rules, with what was learnt about the server."""
        return replace(configured, types_apart=True) if self.types_apart else configured


@dataclass(frozen=True, slots=True)
class Decision:
    """The plan, with the inventory that it was made from."""

    plan: RetentionPlan
    members: Mapping[TinkerPath, Member]


def decide(
    rows: Iterable[Checkpoint],
    holdings: Holdings,
    rules: RetentionRules,
    *,
    now: datetime,
    complete: bool,
    short_ttl: timedelta,
    allow: int | None = None,
) -> Decision:
    """What may go, from rows that the service showed. `plan` and enforcement share this."""
    members = make_members(rows, holdings, now=now, short_ttl=short_ttl)
    chosen = holdings.rules(rules)
    plan = plan_retention(
        members,
        chosen,
        now=now,
        complete=complete,
        allow=allow,
        other_bytes=holdings.other_bytes,
        standing=holdings.standing,
    )
    return Decision(plan, {member.path: member for member in members})


def make_members(
    checkpoints: Iterable[Checkpoint], holdings: Holdings, *, now: datetime, short_ttl: timedelta
) -> list[Member]:
    """One member for each path that is listed or here."""
    known, deeds = holdings.known, holdings.deeds
    found: dict[TinkerPath, Member] = {}
    pinned = pin_matcher(holdings.pins)
    for row in checkpoints:
        replica = known.replicas.get(row.path)
        deed = deeds.get((row.path, row.identity.time))
        if deed is not None and not deed.concerns(row):
            deed = None
        found[row.path] = Member(
            row.path,
            row.time,
            row,
            replica if replica is not None and replica.identity.matches(row.identity) else None,
            short_lived=is_short_lived(row, known, short_ttl),
            pinned=pinned(row.path),
            ttl_is_ours=deed is not None and deed.state == "under-ttl" and deed.action in ("expire", "set-ttl"),
            withheld="" if deed is None else _withheld(deed, now),
            declined=deed is not None and deed.state == "declined",
            leaving=deed is not None and deed.state in LEAVING and deed.action not in ("extend", "restore"),
            base_model=holdings.base_models.get(row.path.run_id) or None,
            user_metadata=row.user_metadata,
            step=step_of(row.path.name),
        )
    for path, replica in known.replicas.items():
        if path not in found:
            first = replica.first_expires_at
            deed = deeds.get((path, replica.identity.time))
            found[path] = Member(
                path,
                replica.time,
                None,
                replica,
                short_lived=first is not None and first - replica.time < short_ttl,
                pinned=pinned(path),
                deleted_by_us=deed is not None and _took(deed),
                base_model=holdings.base_models.get(path.run_id) or None,
                user_metadata=replica.user_metadata,
                step=step_of(path.name),
            )
    return list(found.values())


def pin_matcher(pins: Sequence[str]) -> Callable[[TinkerPath], bool]:
    """Whether a path is pinned. A name can hold `[`: every pin is taken literally too."""
    lines = {*pins, *(pin.strip() for pin in pins)}  # a blank at the end is a slip far oftener than a part of a name
    exact = lines
    globs = tuple(pin for pin in lines if set(pin) & set("*?["))

    def pinned(path: TinkerPath) -> bool:
        return str(path) in exact or path.tail in exact or any(path.matches(glob) for glob in globs)

    return pinned


def unexplained(
    gone: Iterable[Checkpoint], holdings: Holdings, *, now: datetime, short_ttl: timedelta
) -> tuple[Checkpoint, ...]:
    """Of what is no longer listed, what neither the journal nor its expiry nor a short life explains."""
    left = []
    for row in gone:
        deed = holdings.deeds.get((row.path, row.identity.time))
        if deed is not None and (deed.state in GONE or deed.state in OPEN or _ran_out(deed, now)):
            continue
        if row.expires_at is not None and row.expires_at <= now:
            continue
        if not is_short_lived(row, holdings.known, short_ttl):
            left.append(row)
    return tuple(left)


def _ran_out(deed: Deed, now: datetime) -> bool:
    """Whether our TTL explains by now that it is gone."""
    ours = deed.state == "under-ttl" and deed.action in ("expire", "set-ttl")
    return ours and deed.ends_at is not None and deed.ends_at <= now + CLOCK_TOLERANCE


def _took(deed: Deed) -> bool:
    """Whether what is gone is gone by us, or may be."""
    by_ttl = deed.state in ("under-ttl", "declined") and deed.action in ("expire", "set-ttl", "restore")
    return deed.state in GONE or deed.state in OPEN or by_ttl


def _withheld(deed: Deed, now: datetime) -> str:
    if deed.state == "withheld" and deed.retry_at is not None and deed.retry_at > now:
        return f"{deed.detail or 'the service refused it'}; tried again at {rfc3339(deed.retry_at)}"
    if deed.state == "deleted" and now - deed.at < UNCONFIRMED_FOR:
        return f"the service said at {rfc3339(deed.at)} that it is deleted, and still lists it"
    if deed.state in OPEN:
        return "what became of the last attempt is not known yet"
    return ""
