"""What to tell people, and how often: an alarm once, its end once, and nothing in between but news now and then. Pure.

An alarm is named `kind` or `kind:cause`, so that one cause does not hide another.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from tinker_sync.model.moments import parse_time, rfc3339

if TYPE_CHECKING:
    from collections.abc import Mapping

AGAIN_AFTER: Final = timedelta(hours=1)
"""The same kind of alarm is not raised again sooner after it was over."""
NEWS_AFTER: Final = timedelta(hours=24)
"""An alarm that goes on is told again, with what it has come to."""


@dataclass(frozen=True, slots=True)
class Message:
    """One notification."""

    kind: str
    title: str
    body: str


@dataclass(frozen=True, slots=True)
class Told:
    """What was last said about one kind of alarm."""

    at: datetime
    raised: bool
    """False once its end was told."""
    text: str


def next_messages(
    told: Mapping[str, Told], alarms: Mapping[str, str], *, now: datetime, who: str
) -> tuple[list[Message], dict[str, Told]]:
    """The messages that are due, and what will have been said then. `who` names this mirror in the titles.

    A clock that went back makes nothing be told twice at once, nor keeps anything back for long.
    """
    messages: list[Message] = []
    after = dict(told)
    for kind in sorted({*alarms, *told}):
        text, before = alarms.get(kind), told.get(kind)
        if text is None:
            if before is not None and before.raised:
                messages.append(Message(kind, f"{who}: {_title(kind)} is over", f"It was: {before.text}"))
                after[kind] = Told(now, raised=False, text=before.text)
        elif before is None or _is_due(before, now):
            again = before is not None and before.raised
            messages.append(Message(kind, f"{who}: {_title(kind)}{' (still)' if again else ''}", text))
            after[kind] = Told(now, raised=True, text=text)
    return messages, after


def _title(kind: str) -> str:
    """`failure:damage` as people read it."""
    return kind.replace(":", " of ") if kind.startswith("failure:") else kind.replace(":", ", ")


def _is_due(before: Told, now: datetime) -> bool:
    passed = abs(now - before.at)
    return passed >= (NEWS_AFTER if before.raised else AGAIN_AFTER)


def as_json(told: Mapping[str, Told]) -> dict[str, Any]:
    """For the catalog, so that a restart does not repeat what was said."""
    return {kind: {"at": rfc3339(one.at), "raised": one.raised, "text": one.text} for kind, one in told.items()}


def from_json(document: Mapping[str, Any]) -> dict[str, Told]:
    """What `as_json` made; anything else is nothing."""
    try:
        return {
            str(kind): Told(parse_time(one["at"]), raised=bool(one["raised"]), text=str(one["text"]))
            for kind, one in document.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}
