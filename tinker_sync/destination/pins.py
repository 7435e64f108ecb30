"""Pins: paths and globs that are never let go, on any side. A small file in the state directory, replaced atomically.

It needs no lock and outlives the catalog. Lines that start with `#` are comments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tinker_sync.destination.files import replace_file
from tinker_sync.errors import FixFirst

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

PINS_FILE: Final = "pins"


def read_pins(state: Path) -> tuple[str, ...]:
    """What is pinned. Raises FixFirst when the file is there and cannot be read: then nothing may be let go."""
    path = state / PINS_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as error:
        message = f"the pins in {path} cannot be read ({error}): mend the file, or remove it to pin nothing"
        raise FixFirst(message) from error
    return tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))


def write_pins(state: Path, pins: Iterable[str]) -> None:
    """Replace the file. Raises OSError."""
    replace_file(state / PINS_FILE, "".join(f"{pin}\n" for pin in dict.fromkeys(pins)).encode())
