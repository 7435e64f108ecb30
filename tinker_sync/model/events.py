"""What happened to a checkpoint, as others are told: hooks, notifications, metrics. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tinker_sync.model.paths import TinkerPath

EventKind = Literal["committed", "deleted", "failed"]
EVENT_KINDS: Final[tuple[EventKind, ...]] = ("committed", "deleted", "failed")


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that was done, or could not be, with its facts as text.

    committed: `directory` (below the root), `bytes`, `files`, `seconds`, `fidelity`, `time`. deleted: `side` (remote or
    local), `action` (delete, expire or trash), `policy`. failed: `error`, `side` where it was not a transfer,
    `retry_at` where it is known.
    """

    kind: EventKind
    path: TinkerPath
    facts: Mapping[str, str] = field(default_factory=dict)
