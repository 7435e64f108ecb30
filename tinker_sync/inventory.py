"""The inventory: what is listed joined with what is here. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tinker_sync.planning import is_short_lived
from tinker_sync.retention import Member, step_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import timedelta

    from tinker_sync.model.checkpoint import Checkpoint
    from tinker_sync.model.paths import TinkerPath
    from tinker_sync.planning import Known


def make_members(
    checkpoints: Iterable[Checkpoint],
    known: Known,
    *,
    pins: Sequence[str],
    base_models: Mapping[str, str],
    short_ttl: timedelta,
) -> list[Member]:
    """The inventory: what is listed joined with what is here."""
    found: dict[TinkerPath, Member] = {}
    exact = set(pins)  # a name can hold `[`: every pin is taken literally too
    globs = tuple(pin for pin in pins if set(pin) & set("*?["))

    def pinned(path: TinkerPath) -> bool:
        return str(path) in exact or path.tail in exact or any(path.matches(glob) for glob in globs)

    for row in checkpoints:
        replica = known.replicas.get(row.path)
        found[row.path] = Member(
            row.path,
            row.time,
            row,
            replica if replica is not None and replica.identity.matches(row.identity) else None,
            short_lived=is_short_lived(row, known, short_ttl),
            pinned=pinned(row.path),
            base_model=base_models.get(row.path.run_id) or None,
            user_metadata=row.user_metadata,
            step=step_of(row.path.name),
        )
    for path, replica in known.replicas.items():
        if path not in found:
            born = replica.expires_at - replica.time if replica.expires_at is not None else None
            found[path] = Member(
                path,
                replica.time,
                None,
                replica,
                short_lived=born is not None and born < short_ttl,
                pinned=pinned(path),
                base_model=base_models.get(path.run_id) or None,
                user_metadata=replica.user_metadata,
                step=step_of(path.name),
            )
    return list(found.values())
