"""One writer per root: a kernel lock, released by death. The file is never unlinked."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Self

from tinker_sync.destination.mounts import filesystem_type
from tinker_sync.errors import FixFirst, RootBusy
from tinker_sync.model.moments import rfc3339

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType


class RootLock:
    """Context manager; raises RootBusy when another process holds the lock, FixFirst where none can be had.

    `flock` is inherited over fork: nothing in this program forks without exec, and the descriptor is close-on-exec.
    """

    def __init__(self, path: Path, *, command: str) -> None:
        self._path = path
        self._command = command
        self._descriptor = -1

    def __enter__(self) -> Self:
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            message = f"{self._path} cannot be opened: {error.strerror}; it must be writable by this user"
            raise FixFirst(message) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
        note = {"pid": os.getpid(), "command": self._command, "since": rfc3339(datetime.now(UTC)), "control": None}
        with suppress(OSError):  # the note is for people; a full disk must not take the lock away
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, (json.dumps(note) + "\n").encode(), 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)
        self._descriptor = -1


def holder_of(path: Path) -> str | None:
    """Who holds a lock, without taking it: None when nobody does. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read_holder(descriptor)
    finally:
        os.close(descriptor)
    return None


def _read_holder(descriptor: int) -> str:
    try:
        note = json.loads(os.pread(descriptor, 4096, 0))
        return f" ({note['command']}, process {note['pid']}, since {note['since']})"
    except (ValueError, KeyError, TypeError, OSError):
        return ""
