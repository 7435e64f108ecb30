"""Checkpoints as the service shows them.

**identity**: tinker path + time (to the second) + size where both sides know it. A path can be overwritten, so the
path alone names nothing. **sighting**: rows that were shown. **listing**: a view that is proven complete. A sighting
is enough to transfer; only a listing can lead to a delete, so they are two types and neither converts into the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from tinker_sync.model.moments import UNKNOWN_TIME

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from tinker_sync.model.paths import TinkerPath


@dataclass(frozen=True, slots=True)
class Identity:
    """What makes two sights of a path the same object."""

    path: TinkerPath
    time: datetime
    """UTC, whole seconds."""
    size_bytes: int | None
    """As listed; None where the server does not say."""

    def matches(self, other: Identity) -> bool:
        """Whether both can be the same object; an unknown size on either side decides nothing."""
        if self.path != other.path or self.time != other.time:
            return False
        return self.size_bytes is None or other.size_bytes is None or self.size_bytes == other.size_bytes


class Sight(Protocol):
    """What has an identity: a listed row, a replica."""

    @property
    def path(self) -> TinkerPath:
        """Where."""
        ...

    @property
    def time(self) -> datetime:
        """When it was made."""
        ...

    @property
    def size_bytes(self) -> int | None:
        """As listed; None where the server does not say."""
        ...


def same_object(one: Sight, other: Sight) -> bool:
    """What `Identity.matches` says, without making identities: a plan asks it of everything that is listed."""
    if one.path != other.path:
        return False
    if one.time != other.time and one.time.replace(microsecond=0) != other.time.replace(microsecond=0):
        return False
    return one.size_bytes is None or other.size_bytes is None or one.size_bytes == other.size_bytes


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One listed row, with run, type and name taken from its tinker path."""

    path: TinkerPath
    time: datetime = UNKNOWN_TIME
    size_bytes: int | None = None
    public: bool = False
    user_metadata: Mapping[str, str] | None = None
    expires_at: datetime | None = None
    listed_id: str = ""
    """`checkpoint_id` as the server wrote it; some write the bare name (then only that works in URLs)."""

    @property
    def checkpoint_type(self) -> str:
        """`training`, `sampler`, `external`, or what the server calls a type that we do not know."""
        return self.path.checkpoint_type

    @property
    def identity(self) -> Identity:
        """Time to the second: servers differ in what they do with fractions."""
        return Identity(self.path, self.time.replace(microsecond=0), self.size_bytes)


@dataclass(frozen=True, slots=True)
class Sighting:
    """Rows that the service showed, and why they are no proof of anything that is absent."""

    checkpoints: tuple[Checkpoint, ...]
    seen_at: datetime
    doubts: tuple[str, ...]
    """Why this is no listing: a failed page, a moving total, rows that could not be read."""


@dataclass(frozen=True, slots=True)
class Listing:
    """A view of the account that is proven complete: what is not here is not there."""

    checkpoints: tuple[Checkpoint, ...]
    seen_at: datetime
    """When the walk that proved it began."""


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What a restore needs and upstream forgets: the answers as JSON objects, or None when they could not be had."""

    training_run: Mapping[str, object] | None = None
    weights_info: Mapping[str, object] | None = field(default=None)
