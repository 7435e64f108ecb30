"""One writer per root: a kernel lock, released by death. The file is never unlinked."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

from tinker_sync.destination.mounts import filesystem_type
from tinker_sync.errors import FixFirst, RootBusy
from tinker_sync.model.moments import rfc3339

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

T = TypeVar("T")


class RootLock:
    """Context manager; raises RootBusy when another process holds the lock, FixFirst where none can be had.

    `flock` is inherited over fork: nothing in this program forks without exec, and the descriptor is close-on-exec.
    """

    def __init__(self, path: Path, *, command: str) -> None:
        self._path = path
        self._command = command
        self._descriptor = -1
        self._since = rfc3339(datetime.now(UTC))

    def __enter__(self) -> Self:
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            message = f"{self._path} cannot be opened: {error.strerror}; it must be writable by this user"
            raise FixFirst(message) from error
        try:
            _take(descriptor)
        except OSError as error:
            holder = _read_holder(descriptor)
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
                message = f"another tinker-sync{holder} holds {self._path}; wait for it to end, or stop it"
                raise RootBusy(message) from error
            message = (
                f"no lock can be had on {self._path} ({filesystem_type(self._path)}: {error.strerror}); "
                "put [mirror] state on a local disk"
            )
            raise FixFirst(message) from error
        self._descriptor = descriptor
        self._note(None)
        return self

    @property
    def is_held(self) -> bool:
        """Whether the file under the lock's name is still the one that is locked: else another process could lock its own."""
        try:
            there, mine = os.stat(self._path), os.fstat(self._descriptor)
        except OSError:
            return False
        return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)

    def announce(self, control: Path) -> None:
        """Say where the holder can be asked."""
        self._note(str(control))

    def _note(self, control: str | None) -> None:
        """What the file says of the holder. For people and commands: a full disk must not take the lock away."""
        note = {"pid": os.getpid(), "command": self._command, "since": self._since, "control": control}
        with suppress(OSError):
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, (json.dumps(note) + "\n").encode(), 0)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)
        self._descriptor = -1


def _take(descriptor: int) -> None:
    """The lock, with a second try: `status` and its like hold it for a moment when they look who has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(0.05)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def holder_of(path: Path) -> str | None:
    """Who holds a lock, without taking it: None when nobody does. Raises OSError."""
    return _ask_holder(path, _read_holder)


def control_of(path: Path) -> Path | None:
    """The control socket of the process that holds a lock; None when nobody does, or it has none. Raises OSError."""
    try:
        return _ask_holder(path, _read_control)
    except FileNotFoundError:
        return None


def _ask_holder(path: Path, read: Callable[[int], T]) -> T | None:
    """What the holder of a lock has noted; None when nobody holds it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return read(descriptor)
    finally:
        os.close(descriptor)
    return None


def _read_control(descriptor: int) -> Path | None:
    """Only a socket of the lock's own owner: the note is a file's text, and what is sent there is a request."""
    try:
        control = json.loads(os.pread(descriptor, 4096, 0))["control"]
        found = os.stat(control)
    except (ValueError, KeyError, TypeError, OSError):
        return None
    mine = stat.S_ISSOCK(found.st_mode) and found.st_uid == os.fstat(descriptor).st_uid
    return Path(control) if mine else None


def _read_holder(descriptor: int) -> str:
    try:
        note = json.loads(os.pread(descriptor, 4096, 0))
        return f" ({note['command']}, process {note['pid']}, since {note['since']})"
    except (ValueError, KeyError, TypeError, OSError):
        return ""
