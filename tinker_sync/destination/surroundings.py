"""What an overview needs and the catalog does not know: the stop flag, the trash, the room on the disk. Without lock."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, TypedDict

from tinker_sync.destination.root import STATE_DIRECTORY
from tinker_sync.destination.safeguards import read_stop
from tinker_sync.destination.space import free_bytes

if TYPE_CHECKING:
    from pathlib import Path


class Around(TypedDict):
    """Why enforcement is stopped, or None; entries of the trash; bytes, None where nobody can tell."""

    stop_reason: str | None
    trash: int
    free_bytes: int | None


def look_around(root: Path, state: Path) -> Around:
    """All three."""
    free, trash = None, 0
    with suppress(OSError):
        free = free_bytes(root)
    with suppress(OSError):
        trash = len(os.listdir(root / STATE_DIRECTORY / "trash"))
    return {"stop_reason": read_stop(state), "trash": trash, "free_bytes": free}
