"""What an overview needs and the catalog does not know: stop flag, trash, room on the disk, stages. Without lock."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, TypedDict

from tinker_sync.destination.progress import read_note
from tinker_sync.destination.root import STATE_DIRECTORY
from tinker_sync.destination.safeguards import read_stop
from tinker_sync.destination.space import free_bytes

if TYPE_CHECKING:
    from pathlib import Path


class Around(TypedDict):
    """Why enforcement is stopped, or None; entries of the trash; bytes, None where nobody can tell; parts: how many, bytes."""

    stop_reason: str | None
    trash: int
    free_bytes: int | None
    partial: int
    partial_bytes: int


def look_around(root: Path, state: Path) -> Around:
    """All of it."""
    free, trash = None, 0
    with suppress(OSError):
        free = free_bytes(root)
    with suppress(OSError):
        trash = len(os.listdir(root / STATE_DIRECTORY / "trash"))
    kept = _kept(root / STATE_DIRECTORY / "staging")
    return {
        "stop_reason": read_stop(state),
        "trash": trash,
        "free_bytes": free,
        "partial": len(kept),
        "partial_bytes": sum(kept),
    }


def _kept(staging: Path) -> list[int]:
    """Of each stage that a transfer can go on with, or has now, the bytes that are durable and noted."""
    try:
        notes = [read_note(home) for home in staging.iterdir()]
    except OSError:
        return []
    return [note.kept for note in notes if note is not None and not note.reason]
