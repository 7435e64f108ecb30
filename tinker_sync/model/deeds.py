"""What was last done to a checkpoint upstream, told by the journal's events. Pure.

**deed**: one checkpoint's present state as far as we changed it. `fold` makes it from the events, in their order, so
that the catalog's table and a replayed journal come to the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, Literal

from tinker_sync.model.moments import parse_time, rfc3339
from tinker_sync.model.paths import TinkerPath

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tinker_sync.model.checkpoint import Checkpoint

DeedKey = tuple[TinkerPath, datetime]
"""A path and the time of the object that it means, to the second."""
State = Literal["deleting", "deleted", "confirmed", "setting-ttl", "under-ttl", "withheld", "declined"]
Action = Literal["delete", "expire", "restore", "extend", "set-ttl"]
OPEN: Final = frozenset({"deleting", "setting-ttl"})
"""An intent without an outcome: what came of it is resolved by looking."""
LEAVING: Final = frozenset({"deleting", "deleted", "setting-ttl", "under-ttl"})
"""Its original may not be there for long: no second copy."""
GONE: Final = frozenset({"deleted", "confirmed"})


@dataclass(frozen=True, slots=True)
class Deed:
    """What was last done to one object."""

    path: TinkerPath
    time: datetime
    """The object's own, as listed."""
    size_bytes: int | None
    state: State
    action: Action
    at: datetime
    """When its last event was written."""
    retry_at: datetime | None = None
    """For `withheld`, and a restore that failed: not before this."""
    former_expires_at: datetime | None = None
    """What `restore` goes back to."""
    ends_at: datetime | None = None
    """When the TTL that we set runs out."""
    detail: str = ""

    @property
    def key(self) -> DeedKey:
        """Which object it is about."""
        return self.path, self.time.replace(microsecond=0)

    def concerns(self, row: Checkpoint) -> bool:
        """Whether it is about this very object."""
        same_size = None in (self.size_bytes, row.size_bytes) or self.size_bytes == row.size_bytes
        return self.path == row.path and self.time.replace(microsecond=0) == row.identity.time and same_size

    @property
    def is_ours_to_undo(self) -> bool:
        """Whether retention put it under a TTL, and so watches it."""
        return self.state == "under-ttl" and self.action == "expire"


def fold(before: Deed | None, event: Mapping[str, Any]) -> Deed | None:
    """The deed after one more event about its object; None when nothing is left to remember.

    Events of other kinds, and those of a later version, change nothing. Raises KeyError, ValueError for a broken one.
    """
    match event["event"]:
        case "delete.intent":
            return _begun(event, "deleting", "delete")
        case "ttl.intent":
            return _begun(event, "setting-ttl", event["action"])
        case "delete.outcome" | "ttl.outcome":
            return None if before is None else _ended(before, event)
        case "delete.confirmed":
            return None if before is None else replace(before, state="confirmed", at=parse_time(event["time"]))
        case "ttl.confirmed":
            ends = _moment(event.get("ends_at"))
            return (
                None if before is None else replace(before, ends_at=ends, detail="seen", at=parse_time(event["time"]))
            )
        case "ttl.over":
            if before is None or before.action != "expire":
                return None
            return replace(before, state="declined", at=parse_time(event["time"]), detail=str(event.get("answer", "")))
        case _:
            return before


def _begun(event: Mapping[str, Any], state: State, action: Action) -> Deed:
    return Deed(
        path=TinkerPath.parse(event["tinker_path"]),
        time=parse_time(event["checkpoint_time"]),
        size_bytes=event.get("size_bytes"),
        state=state,
        action=action,
        at=parse_time(event["time"]),
        former_expires_at=_moment(event.get("former_expires_at")),
        ends_at=_moment(event.get("ends_at")),
    )


def _ended(before: Deed, event: Mapping[str, Any]) -> Deed | None:
    at, outcome = parse_time(event["time"]), event["outcome"]
    undoing = before.action == "restore"
    if outcome in ("deleted", "gone"):
        return replace(before, state="deleted", at=at)
    if outcome == "set":
        if undoing or before.ends_at is None:
            return None
        return replace(before, state="under-ttl", at=at)
    if undoing:  # it still runs out: a later pass tries to restore it again
        retry_at = _moment(event.get("retry_at"))
        return replace(before, state="under-ttl", action="expire", at=at, retry_at=retry_at, detail="seen")
    return _withheld(before, event) if event.get("retry_at") else None


def _withheld(before: Deed, event: Mapping[str, Any]) -> Deed:
    return replace(
        before,
        state="withheld",
        at=parse_time(event["time"]),
        retry_at=_moment(event.get("retry_at")),
        detail=str(event.get("answer", "")),
    )


def key_of(event: Mapping[str, Any]) -> DeedKey:
    """Which object an event is about. Raises KeyError, ValueError for one that is about none."""
    return TinkerPath.parse(event["tinker_path"]), parse_time(event["checkpoint_time"]).replace(microsecond=0)


def object_facts(row: Checkpoint) -> dict[str, object]:
    """How an event names the object that it is about."""
    return {
        "tinker_path": str(row.path),
        "checkpoint_time": rfc3339(row.time),
        "size_bytes": row.size_bytes,
    }


def _moment(text: str | None) -> datetime | None:
    return None if text is None else parse_time(text)
