"""How things are, in one document: for `status`, for the page, for metrics, and for what people are told.

Reads the catalog through its port and judges; it changes nothing and prints nothing. What reads tables (`take_stock`) is
apart from what depends on the clock (`overview`), so that a service need not read again while nothing was written.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, Literal

from tinker_sync.model.moments import parse_time, rfc3339
from tinker_sync.model.work import Trouble
from tinker_sync.planning import Known, is_short_lived

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tinker_sync.model.checkpoint import Checkpoint
    from tinker_sync.model.paths import TinkerPath
    from tinker_sync.model.work import Failure
    from tinker_sync.planning import Selection
    from tinker_sync.ports import Catalog

SOON: Final = timedelta(hours=24)
"""What expires within it and is not here yet is worth a word."""
PATIENCE: Final = timedelta(minutes=30)
"""So long a new checkpoint may wait before its coming end is an alarm."""
TRIED: Final = 2
"""A checkpoint that failed in so many passes is an alarm; one failure is often gone with the next pass."""
Level = Literal["well", "working", "bad"]
LOST_FOR: Final = timedelta(hours=24)
"""So long a checkpoint that ended uncopied is an alarm; there is nothing to be done about it but to know."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A checkpoint that is wanted and not here."""

    checkpoint: Checkpoint
    first_seen_at: datetime


@dataclass(frozen=True, slots=True)
class Stock:
    """What the catalog holds, in few rows: the usual is counted, only what is not well is listed."""

    counts: Mapping[str, int]
    missing: Sequence[Waiting]
    """Wanted by the configuration, no rolling save, and not here."""
    failures: Sequence[Failure]
    running_out: int
    """Upstream under a TTL of ours."""
    last_pass: Mapping[str, Any] | None
    lost: Sequence[tuple[TinkerPath, datetime]] = ()
    """What ended upstream before it was copied, and when."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the catalog does not know."""

    root: str
    enforce: bool
    stop_reason: str | None = None
    trash: int = 0
    free_bytes: int | None = None
    partial: int = 0
    """Checkpoints of which a part is here, and durable."""
    partial_bytes: int = 0
    min_free: int = 0


def take_stock(catalog: Catalog, selection: Selection) -> Stock:
    """Read what an overview needs. Raises CatalogUnusable."""
    missing = []
    for row, first_expires_at, first_seen_at in catalog.unmirrored():
        known = Known(first_expiry={row.path: (row.time, first_expires_at)})
        if selection.refusal(row.path) is None and not is_short_lived(row, known, selection.short_ttl):
            missing.append(Waiting(row, first_seen_at))
    return Stock(
        counts=catalog.counts(),
        missing=missing,
        failures=catalog.failures(),
        running_out=sum(1 for deed in catalog.unsettled_deeds() if deed.is_ours_to_undo),
        last_pass=catalog.last_pass(),
        lost=catalog.lost(),
    )


NOTHING: Final = Stock(
    dict.fromkeys(("replicas", "bytes", "damaged", "upstream", "upstream_bytes"), 0),
    (),
    (),
    running_out=0,
    last_pass=None,
)
"""The stock of a mirror that has not begun."""


def overview(stock: Stock, around: Surroundings, *, now: datetime) -> dict[str, Any]:
    """The document of `status --json`; stable keys."""
    trouble = {failure.path: failure for failure in stock.failures}
    wanted = [one for one in stock.missing if one.checkpoint.expires_at is None or one.checkpoint.expires_at > now]
    pending = [
        one
        for one in wanted
        if one.checkpoint.path not in trouble or trouble[one.checkpoint.path].time != one.checkpoint.time
    ]
    expiring = sorted(
        ((one.checkpoint.expires_at, one) for one in wanted if _ends_soon(one, now)), key=lambda pair: str(pair[0])
    )
    return {
        **stock.counts,
        "pending": len(pending),
        "failing": sum(1 for failure in stock.failures if failure.trouble is Trouble.FAILING),
        "unmirrorable": sum(1 for failure in stock.failures if failure.trouble is Trouble.NOT_SERVED),
        "quarantined": sum(1 for failure in stock.failures if failure.trouble is Trouble.QUARANTINED),
        "expiring_unmirrored": [
            {
                "tinker_path": str(one.checkpoint.path),
                "expires_at": rfc3339(expires_at),
                "first_seen_at": rfc3339(one.first_seen_at),
            }
            for expires_at, one in expiring
            if expires_at is not None
        ],
        "failures": [
            {
                "tinker_path": str(failure.path),
                "trouble": failure.trouble.value,
                "error": failure.error,
                "attempts": failure.attempts,
                "retry_at": rfc3339(failure.retry_at),
            }
            for failure in stock.failures
        ],
        "lost": [
            {"tinker_path": str(path), "expires_at": rfc3339(at)} for path, at in stock.lost if now - at < LOST_FOR
        ],
        "stopped": around.stop_reason is not None,
        "stop_reason": around.stop_reason,
        "enforce": around.enforce,
        "running_out": stock.running_out,
        "trash": around.trash,
        "free_bytes": around.free_bytes,
        "partial": around.partial,
        "partial_bytes": around.partial_bytes,
        "min_free": around.min_free,
        "last_pass": stock.last_pass,
        "root": around.root,
    }


def _ends_soon(one: Waiting, now: datetime) -> bool:
    return one.checkpoint.expires_at is not None and one.checkpoint.expires_at - now < SOON


def _left_to_end(document: Mapping[str, Any], now: datetime) -> list[Mapping[str, Any]]:
    """What ends soon and should be here by now: it failed, or has waited for long. The first to end comes first."""
    troubled = {row["tinker_path"] for row in document["failures"]}
    return [
        row
        for row in document["expiring_unmirrored"]
        if row["tinker_path"] in troubled or now - parse_time(row["first_seen_at"]) > PATIENCE
    ]


def judge(document: Mapping[str, Any], *, now: datetime) -> tuple[Level, str]:
    """Whether all is well, in one sentence; what is worst comes first."""
    last = document["last_pass"]
    bad = document["failing"] + document["quarantined"] + document["damaged"]
    soon = len(_left_to_end(document, now))
    if last is None and not document["replicas"]:
        return "working", "nothing was mirrored here yet"
    if document["stopped"]:
        return "bad", f"enforcement is stopped: {document['stop_reason']} (then `tinker-sync resume`)"
    if last is not None and last["service_error"]:
        return "bad", f"the last pass ended with: {last['service_error']}"
    if bad or soon:
        return "bad", (
            f"{document['failing']} failing, {document['quarantined']} quarantined, "
            f"{document['damaged']} damaged, {soon} expire uncopied within 24 h"
        )
    if document["lost"]:
        return "bad", f"{len(document['lost'])} checkpoints ended upstream before they were copied, in the last day"
    if last is not None and last.get("breaker"):
        return "bad", f"the breaker held back {last['breaker']['deletes']} deletes: see `tinker-sync plan`"
    if last is not None and last.get("retention_error"):
        return "bad", f"retention cannot run: {last['retention_error']}"
    if is_full(document):
        return "bad", "the disk has less room than [mirror] min_free: nothing more is copied"
    if last is not None and last.get("disk_error"):
        return "bad", f"copies cannot be written: {last['disk_error']}"
    if last is not None and last.get("no_room"):
        return "bad", f"[mirror] max_bytes has no room for {last['no_room']} checkpoints, and what is here must stay"
    if document["pending"]:
        return "working", f"{document['pending']} checkpoints are still to be copied"
    return "well", "everything wanted is here"


def is_full(document: Mapping[str, Any]) -> bool:
    """Whether the disk has no room left for copies."""
    return document["free_bytes"] is not None and document["free_bytes"] < document["min_free"]


def alarms(
    document: Mapping[str, Any], *, now: datetime, silence: timedelta, begun_at: datetime | None = None
) -> dict[str, str]:
    """What a person should be told now, one sentence for each `kind` or `kind:cause`.

    Kinds are those of `[notify] on`. `silence` is how long the account may go without a proven listing; a mirror that never
    had one is silent since `begun_at`.
    """
    last = document["last_pass"] or {}
    candidates = {
        "failure:credential": f"the credential is not accepted: {last.get('service_error')}"
        if last.get("credential_refused")
        else None,
        "failure:checkpoints": _failing(document),
        "failure:damage": f"{document['damaged']} replicas are damaged: see `tinker-sync verify`"
        if document["damaged"]
        else None,
        "failure:retention": f"retention cannot run: {last['retention_error']}"
        if last.get("retention_error")
        else None,
        "breaker:stopped": f"enforcement is stopped: {document['stop_reason']}" if document["stopped"] else None,
        "breaker:limits": f"the breaker held back {last['breaker']['deletes']} deletes: see `tinker-sync plan`"
        if last.get("breaker")
        else None,
        "expiring": _expiring(document, now),
        "expiring:lost": _lost(document),
        "disk:min_free": f"{document['free_bytes']:,} bytes are free, [mirror] min_free is {document['min_free']:,}"
        if is_full(document)
        else None,
        "disk:trouble": f"copies cannot be written: {last['disk_error']}" if last.get("disk_error") else None,
        "disk:max_bytes": f"[mirror] max_bytes has no room for {last['no_room']} checkpoints, and what is here must stay"
        if last.get("no_room")
        else None,
        "silence": _silence(last, now, silence, begun_at),
    }
    return {kind: text for kind, text in candidates.items() if text is not None}


def _failing(document: Mapping[str, Any]) -> str | None:
    failing = [
        row
        for row in document["failures"]
        if row["trouble"] == Trouble.QUARANTINED.value
        or (row["trouble"] == Trouble.FAILING.value and row["attempts"] >= TRIED)
    ]
    if not failing:
        return None
    return f"{len(failing)} checkpoints cannot be copied, as {failing[0]['tinker_path']}: {failing[0]['error']}"


def _expiring(document: Mapping[str, Any], now: datetime) -> str | None:
    expiring = _left_to_end(document, now)
    if not expiring:
        return None
    first = expiring[0]
    return (
        f"{len(expiring)} checkpoints end within 24 h and are not copied, first {first['tinker_path']} "
        f"at {first['expires_at']}"
    )


def _lost(document: Mapping[str, Any]) -> str | None:
    lost = document["lost"]
    return f"{len(lost)} checkpoints ended before they were copied, as {lost[-1]['tinker_path']}" if lost else None


def _silence(last: Mapping[str, Any], now: datetime, silence: timedelta, begun_at: datetime | None) -> str | None:
    listed = last.get("listed_at")
    begun = last.get("begun_at")
    since = parse_time(listed) if listed else parse_time(begun) if begun else begun_at
    if since is None or now - since <= silence:
        return None
    why = f"; the last try ended with: {last['service_error']}" if last.get("service_error") else ""
    return f"the account was last listed completely at {since:%Y-%m-%d %H:%M} UTC{why}"
