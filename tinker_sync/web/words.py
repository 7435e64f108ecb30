"""How the page writes sizes, times and lengths of time: Jinja2 filters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from humanize import naturaldelta, naturalsize

from tinker_sync.model.moments import parse_time

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from datetime import datetime

_WIDTH: Final = 600
_HEIGHT: Final = 120


def size(number: float | None) -> str:
    """`1.4 GB`, decimal as storage is billed."""
    return "unknown size" if number is None else naturalsize(number, format="%.1f")


def since(moment: datetime | str | None, now: datetime) -> str:
    """`3 minutes ago`, `in 2 hours`, `never`."""
    if moment is None:
        return "never"
    when = parse_time(moment) if isinstance(moment, str) else moment
    passed = (now - when).total_seconds()
    if abs(passed) < 1:
        return "now"
    return f"{naturaldelta(abs(passed))} ago" if passed > 0 else f"in {naturaldelta(-passed)}"


def span(seconds: float | None) -> str:
    """`3 minutes`."""
    return "unknown" if seconds is None else naturaldelta(seconds)


def moment(value: datetime | str) -> str:
    """`2026-01-15 12:00 UTC`."""
    when = parse_time(value) if isinstance(value, str) else value
    return f"{when:%Y-%m-%d %H:%M} UTC"


def iso(value: datetime | str) -> str:
    """For `<time datetime>`."""
    when = parse_time(value) if isinstance(value, str) else value
    return f"{when:%Y-%m-%dT%H:%M:%SZ}"


def dollars(number: float) -> str:
    """`$1,234.50`."""
    return f"${number:,.2f}"


def curve(points: Sequence[tuple[datetime, int]]) -> str:
    """The points of an SVG polygon of 600 x 120: a stair from the first moment to the last."""
    begin, end, most = points[0][0], points[-1][0], max(1, points[-1][1])
    width = max(1.0, (end - begin).total_seconds())
    found, before = [f"0,{_HEIGHT}"], float(_HEIGHT)
    for at, total in points:
        x = (at - begin).total_seconds() / width * _WIDTH
        y = _HEIGHT - total / most * (_HEIGHT - 4)
        found += [f"{x:.1f},{before:.1f}", f"{x:.1f},{y:.1f}"]
        before = y
    found += [f"{_WIDTH},{before:.1f}", f"{_WIDTH},{_HEIGHT}"]
    return " ".join(found)


def event_words(event: Mapping[str, Any]) -> str:
    """A journal event's name in words."""
    name = str(event.get("event", "?"))
    return _EVENTS.get(name, name)


def event_detail(event: Mapping[str, Any]) -> str:
    """What an event says of its why."""
    keys = ("policy", "reasons", "outcome", "answer", "reason", "why", "action")
    found = []
    for key in keys:
        value = event.get(key)
        if value:
            found.append(f"{key} {', '.join(map(str, value)) if isinstance(value, list) else value}")
    return "; ".join(found)


_EVENTS: Final = {
    "delete.intent": "is about to be deleted upstream",
    "delete.outcome": "was asked to be deleted upstream",
    "delete.confirmed": "is gone upstream",
    "ttl.intent": "is about to get a TTL",
    "ttl.outcome": "was given a TTL",
    "ttl.confirmed": "is under our TTL",
    "ttl.over": "is no longer under our TTL",
    "local.intent": "is about to be moved to the trash",
    "local.trashed": "was moved to the trash",
    "local.restored": "was taken back from the trash",
    "local.emptied": "was deleted from the trash",
    "local.failed": "could not be moved to the trash",
    "local.settled": "was found after an interruption",
    "enforcement.stopped": "enforcement stopped",
    "enforcement.suspects": "what went besides is looked at",
    "enforcement.judged": "what went besides was judged",
    "server.types": "it was learnt whether this server keeps types apart",
}

FILTERS: Final[dict[str, Callable[..., str]]] = {
    "size": size,
    "since": since,
    "span": span,
    "moment": moment,
    "iso": iso,
    "dollars": dollars,
    "curve": curve,
    "event_words": event_words,
    "event_detail": event_detail,
}
