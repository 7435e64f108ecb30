"""What to transfer, in which order, and when to try again. Pure: inventory and clock in, a plan out.

Rules (docs/ARCHITECTURE.md, "Which, when, how often"):

- A checkpoint that is short-lived (life at birth under `short_ttl`) is copied when it is its group's newest and older
  than `short_ttl_settle`, at once if under 45 minutes remain, else skipped.
- Soonest `expires_at` first, then newest; what cannot finish before it expires goes last.
- What failed waits: 1 minute doubling to 6 hours, jittered, never beyond a quarter of the remaining life.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final

from tinker_sync.model.checkpoint import same_object
from tinker_sync.model.moments import to_micros
from tinker_sync.model.paths import CHECKPOINT_TYPES
from tinker_sync.model.work import Failure, Skip, Transfer, Trouble

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tinker_sync.model.checkpoint import Checkpoint
    from tinker_sync.model.paths import TinkerPath
    from tinker_sync.model.work import Replica

LAST_CALL: Final = timedelta(minutes=45)
"""A short-lived checkpoint with less than this to live is copied at once."""
FIRST_RETRY: Final = timedelta(minutes=1)
LONGEST_RETRY: Final = timedelta(hours=6)
NOT_SERVED_RETRY: Final = timedelta(hours=24)

RESCUE_MARGIN: Final = timedelta(minutes=30)
RESCUE_FAILING: Final = timedelta(hours=4)
PROBE_EVERY: Final = timedelta(hours=6)

_NEVER_EXPIRES: Final = 4_000_000_000_000_000_000
_TOO_LATE: Final = 8_000_000_000_000_000_000


@dataclass(frozen=True, slots=True)
class Selection:
    """Which checkpoints the configuration wants."""

    types: tuple[str, ...] = CHECKPOINT_TYPES
    include: tuple[str, ...] = ()
    """Globs over `<run>/<segment>/<name>`; empty means all."""
    exclude: tuple[str, ...] = ()
    short_ttl: timedelta = timedelta(hours=3)
    short_ttl_settle: timedelta = timedelta(minutes=15)

    def refusal(self, path: TinkerPath) -> str | None:
        """Why the configuration does not want this path, or None."""
        if path.checkpoint_type not in CHECKPOINT_TYPES:
            return f"its type {path.checkpoint_type!r} is unknown to this version"
        if path.checkpoint_type not in self.types:
            return f"type {path.checkpoint_type} is not in [mirror] types"
        if self.include and not any(path.matches(glob) for glob in self.include):
            return "matched by nothing in [mirror] include"
        for glob in self.exclude:
            if path.matches(glob):
                return f"excluded by {glob!r} in [mirror] exclude"
        return None


@dataclass(frozen=True, slots=True)
class Known:
    """What this side knows: replicas and failures by path, and each object's life at birth."""

    replicas: Mapping[TinkerPath, Replica] = field(default_factory=dict)
    failures: Mapping[TinkerPath, Failure] = field(default_factory=dict)
    first_expiry: Mapping[TinkerPath, tuple[datetime, datetime | None]] = field(default_factory=dict)
    """Path to (time, the first `expires_at` seen for that time)."""
    missing: frozenset[TinkerPath] | None = None
    """Of what is listed, what no sound replica is a copy of, where the catalog compared; then the rest of this is about
    these alone. None where it did not."""

    def mirrors(self, checkpoint: Checkpoint) -> bool:
        """Whether a sound replica of this very object is here."""
        if self.missing is not None:
            return checkpoint.path not in self.missing
        replica = self.replicas.get(checkpoint.path)
        return replica is not None and not replica.damaged and same_object(replica, checkpoint)


@dataclass(frozen=True, slots=True)
class TransferPlan:
    """One verdict per listed checkpoint: mirrored, to transfer now, waiting for its retry, or skipped."""

    transfers: tuple[Transfer, ...]
    """In order, most urgent first."""
    waiting: tuple[Failure, ...]
    """Failed before; their time to try again has not come."""
    skipped: tuple[Skip, ...]
    mirrored: tuple[Checkpoint, ...]
    short_lived: frozenset[TinkerPath]
    """Of what is not mirrored."""

    @property
    def bytes_to_transfer(self) -> int:
        """What the listing says they weigh; unknown sizes count nothing."""
        return sum(transfer.size_bytes or 0 for transfer in self.transfers)


def plan_transfers(
    checkpoints: Sequence[Checkpoint],
    known: Known,
    selection: Selection,
    *,
    now: datetime,
    bytes_per_second: float | None = None,
) -> TransferPlan:
    """Decide for every checkpoint that was seen what to do about it.

    `bytes_per_second` is the measured rate of transfers, None when nothing was measured yet.
    """
    transfers: list[Transfer] = []
    waiting: list[Failure] = []
    skipped: list[Skip] = []
    mirrored: list[Checkpoint] = []
    missing: list[Checkpoint] = []
    for checkpoint in checkpoints:
        (mirrored if known.mirrors(checkpoint) else missing).append(checkpoint)
    short_lived = frozenset(row.path for row in missing if is_short_lived(row, known, selection.short_ttl))
    newest = _newest_of_groups(checkpoints) if short_lived else {}
    for checkpoint in missing:
        path, identity = checkpoint.path, checkpoint.identity
        reason = selection.refusal(path)
        if reason is None and checkpoint.expires_at is not None and checkpoint.expires_at <= now:
            reason = "expired"
        if reason is None and path in short_lived:
            reason = _short_lived_refusal(checkpoint, newest, selection, now)
        failure = known.failures.get(path)
        if failure is not None and not failure.identity.matches(identity):
            failure = None
        if reason is None and failure is not None and _must_wait(failure, now):
            if failure.trouble is Trouble.NOT_SERVED:
                reason = failure.error
            else:
                waiting.append(failure)
                continue
        if reason is not None:
            skipped.append(Skip(path, reason))
            continue
        urgency = priority(checkpoint, now=now, bytes_per_second=bytes_per_second)
        transfers.append(
            Transfer(
                path,
                checkpoint.time,
                checkpoint.size_bytes,
                urgency,
                expires_at=checkpoint.expires_at,
                first_expires_at=first_expiry(checkpoint, known),
            )
        )
    transfers.sort(key=lambda transfer: (transfer.priority, transfer.path))
    return TransferPlan(tuple(transfers), tuple(waiting), tuple(skipped), tuple(mirrored), short_lived)


def _must_wait(failure: Failure, now: datetime) -> bool:
    """Its time has not come; one that is further off than any back-off was noted by a clock that was wrong."""
    longest = NOT_SERVED_RETRY if failure.trouble is Trouble.NOT_SERVED else LONGEST_RETRY
    return now < failure.retry_at <= now + longest


def is_short_lived(checkpoint: Checkpoint, known: Known, short_ttl: timedelta) -> bool:
    """Whether its life at birth was under `short_ttl`: the first `expires_at` seen for it, minus its time."""
    expires_at = first_expiry(checkpoint, known)
    return expires_at is not None and expires_at - checkpoint.time < short_ttl


def first_expiry(checkpoint: Checkpoint, known: Known) -> datetime | None:
    """The first `expires_at` that was seen for this object: a manifest remembers it longer than the catalog."""
    replica = known.replicas.get(checkpoint.path)
    if replica is not None and replica.first_expires_at is not None and same_object(replica, checkpoint):
        return replica.first_expires_at
    first = known.first_expiry.get(checkpoint.path)
    if first is not None and first[0] == checkpoint.time:
        return first[1]
    return checkpoint.expires_at


def _newest_of_groups(checkpoints: Iterable[Checkpoint]) -> dict[tuple[str, str], datetime]:
    newest: dict[tuple[str, str], datetime] = {}
    for checkpoint in checkpoints:
        group = (checkpoint.path.run_id, checkpoint.checkpoint_type)
        if group not in newest or newest[group] < checkpoint.time:
            newest[group] = checkpoint.time
    return newest


def _short_lived_refusal(
    checkpoint: Checkpoint,
    newest: Mapping[tuple[str, str], datetime],
    selection: Selection,
    now: datetime,
) -> str | None:
    if checkpoint.time < newest[(checkpoint.path.run_id, checkpoint.checkpoint_type)]:
        return "short-lived, and a newer one is there"
    last_call = checkpoint.expires_at is not None and checkpoint.expires_at - now < LAST_CALL
    if last_call or now - checkpoint.time >= selection.short_ttl_settle:
        return None
    return "short-lived, and its run still saves"


def priority(checkpoint: Checkpoint, *, now: datetime, bytes_per_second: float | None) -> int:
    """An absolute number, lower first, that fits 64 signed bits.

    With a deadline: its microseconds. Without: after all of those, newest first. What cannot finish before its
    deadline at the measured rate: after everything, soonest first.
    """
    if checkpoint.expires_at is None:
        return _NEVER_EXPIRES - to_micros(checkpoint.time)
    deadline = to_micros(checkpoint.expires_at)
    if bytes_per_second and checkpoint.size_bytes is not None:
        needed = checkpoint.size_bytes / bytes_per_second
        if needed > (checkpoint.expires_at - now).total_seconds():
            return _TOO_LATE + deadline
    return deadline


def to_rescue(
    plan: TransferPlan,
    rows: Sequence[Checkpoint],
    *,
    now: datetime,
    bytes_per_second: float | None,
    refuses: bool = False,
) -> list[Checkpoint]:
    """What would expire before it can be copied, by the queue's order and the measured rate.

    Also what failed and may not come again in time: it is tried at a quarter of its remaining life, so four hours are
    three more attempts. `refuses` says that the server hands out no archives: then only external ones can be had.
    """
    by_path = {row.path: row for row in rows}
    found: list[Checkpoint] = []
    ahead = 0
    for transfer in plan.transfers:
        ahead += transfer.size_bytes or 0
        if transfer.expires_at is None or transfer.path in plan.short_lived:
            continue
        if refuses and transfer.path.checkpoint_type != "external":
            continue
        needed = timedelta(seconds=ahead / bytes_per_second) if bytes_per_second else timedelta(0)
        if now + needed + RESCUE_MARGIN > transfer.expires_at:
            found.append(by_path[transfer.path])
    for failure in plan.waiting:
        row = by_path.get(failure.path)
        if row is None or row.path in plan.short_lived or row.expires_at is None:
            continue
        if row.expires_at - now < RESCUE_FAILING:
            found.append(row)
    return found


def retry_delay(attempts: int, *, expires_at: datetime | None, now: datetime, jitter: float) -> timedelta:
    """How long a checkpoint waits after its `attempts`-th failed pass (1 for the first).

    `jitter` is a random number in [0, 1); it takes up to a fifth off.
    """
    doubled: timedelta = FIRST_RETRY * (1 << min(attempts - 1, 20))
    delay = min(doubled, LONGEST_RETRY) * (1 - jitter / 5)
    if expires_at is not None:
        delay = min(delay, max((expires_at - now) / 4, timedelta(0)))
    return delay


@dataclass(slots=True)
class ServedRecord:
    """Whether this server hands out archives at all: what was learnt from answers that say "not served".

    Five different checkpoints refused and no success within 24 hours: the server as a whole, probed every 6 hours.
    """

    refused: dict[str, datetime] = field(default_factory=dict)
    """Tinker path of a refused one, and when."""
    last_success: datetime | None = None
    last_probe: datetime | None = None

    def add_refusal(self, path: TinkerPath, now: datetime) -> None:
        """Remember one more refused checkpoint."""
        self.refused = {known: when for known, when in self.refused.items() if now - when < NOT_SERVED_RETRY}
        self.refused[str(path)] = now
        self.last_probe = now

    def add_success(self, now: datetime) -> None:
        """The server handed one out: all doubts are void."""
        self.refused.clear()
        self.last_success = now

    def may_ask(self, now: datetime) -> bool:
        """Whether to ask for an archive; of a server that refuses, one question every 6 hours, which this counts."""
        if self.server_refuses(now):
            return False
        if self._many_refused(now):
            self.last_probe = now
        return True

    def server_refuses(self, now: datetime) -> bool:
        """Whether to spare the server the question."""
        return self._many_refused(now) and self.last_probe is not None and now - self.last_probe < PROBE_EVERY

    def _many_refused(self, now: datetime) -> bool:
        if self.last_success is not None and now - self.last_success < NOT_SERVED_RETRY:
            return False
        recent = sum(1 for when in self.refused.values() if now - when < NOT_SERVED_RETRY)
        return recent >= 5
