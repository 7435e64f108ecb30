"""Pins and the stop flag: small files in the state directory, replaced atomically, read again before every delete.

They need no lock of the root and outlive the catalog. In the pins, lines that start with `#` are comments.
"""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from tinker_sync.destination.files import read_small, replace_file
from tinker_sync.errors import FixFirst
from tinker_sync.model.moments import rfc3339

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from datetime import datetime
    from pathlib import Path

PINS_FILE: Final = "pins"
STOP_FILE: Final = "stop"


class FileSafeguards:
    """A `ports.Safeguards`."""

    def __init__(self, state: Path) -> None:
        self._state = state

    def pins(self) -> tuple[str, ...]:
        """What is never let go. Raises FixFirst."""
        return read_pins(self._state)

    def stopped(self) -> str | None:
        """Why enforcement is stopped, or None; a flag that cannot be read stops too."""
        return read_stop(self._state)

    def stop(self, reason: str, now: datetime) -> None:
        """Stop enforcement until `tinker-sync resume`. Raises OSError."""
        document = {"since": rfc3339(now), "reason": reason}
        replace_file(self._state / STOP_FILE, (json.dumps(document) + "\n").encode())


def read_stop(state: Path) -> str | None:
    """The reason in the stop flag, or None where there is none."""
    path = state / STOP_FILE
    try:
        path.lstat()
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"the stop flag {path} cannot be looked at ({error.strerror}), so it stops"
    try:
        text = read_small(path).decode(errors="replace")
    except OSError as error:
        return f"the stop flag {path} cannot be read ({error.strerror}), so it stops"
    try:
        return str(json.loads(text)["reason"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return text.strip() or "somebody made the stop flag by hand"


def lift_stop(state: Path) -> None:
    """Remove the stop flag, whatever it is. Raises OSError."""
    path = state / STOP_FILE
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


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


@contextmanager
def pins_in_hand(state: Path) -> Iterator[tuple[str, ...]]:
    """What is pinned, for changing it: two commands at a time take turns. Raises FixFirst, OSError."""
    descriptor = os.open(state / f".{PINS_FILE}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield read_pins(state)
    finally:
        os.close(descriptor)


def write_pins(state: Path, pins: Iterable[str]) -> None:
    """Replace the file. Raises OSError."""
    replace_file(state / PINS_FILE, "".join(f"{pin}\n" for pin in dict.fromkeys(pins)).encode())
