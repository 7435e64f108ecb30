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
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as error:
        message = f"the pins in {path} cannot be read ({error}): mend the file, or remove it to pin nothing"
        raise FixFirst(message) from error
    pins = tuple(line.removesuffix("\r") for line in lines if line.strip() and not line.startswith("#"))
    for pin in pins:
        if not is_pin(pin):
            message = (
                f"{path}: {pin!a} is no pin: write tinker://<run>/<segment>/<name>, or a glob of the same three parts"
            )
            raise FixFirst(message)
    return pins


def is_pin(text: str) -> bool:
    """Three parts, none empty, on one line that is no comment."""
    parts = text.removeprefix("tinker://").split("/")
    return len(parts) == 3 and all(parts) and "\n" not in text and not text.startswith("#")


def write_pins(state: Path, pins: Iterable[str]) -> None:
    """Replace the file. Raises OSError."""
    replace_file(state / PINS_FILE, "".join(f"{pin}\n" for pin in dict.fromkeys(pins)).encode())
