"""Durable writes. A failed fsync is final: the kernel may have dropped the pages, so nothing here tries it again.

See https://wiki.postgresql.org/wiki/Fsync_Errors.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from tinker_sync.errors import DiskTrouble, NoSpace, TransferFailed
from tinker_sync.integrity import head_wanted, judge_file
from tinker_sync.model.evidence import SeenFile

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tinker_sync.destination.space import Reservation
    from tinker_sync.model.paths import PayloadPath

_judging = threading.Lock()
"""One header is parsed at a time: parsed, a large one is many times its size."""
FLUSH_EVERY: Final = 64 * 1024 * 1024
"""So that the last fsync, and a stop, stay short."""


@contextmanager
def disk_errors(what: str, where: Path) -> Iterator[None]:
    """Turn OSError into NoSpace or DiskTrouble, with words."""
    try:
        yield
    except OSError as error:
        raise as_disk_error(error, what, where) from error


def as_disk_error(error: OSError, what: str, where: Path) -> TransferFailed:
    """The error as ours: who must do what."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"{what} {where}: {reason}; free space there or set [mirror] max_bytes and retention")
    if error.errno == errno.EROFS:
        return DiskTrouble(f"{what} {where}: {reason}; the filesystem may have gone read-only after an error")
    if error.errno == errno.EIO:
        return DiskTrouble(f"{what} {where}: {reason}; look at the disk (dmesg, SMART) before trusting it again")
    return DiskTrouble(f"{what} {where}: {reason}")


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Replace a small file atomically and durably. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.new")
    try:
        write_new(temporary, content, mode=mode)
        os.rename(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    fsync_directory(path.parent)


def read_small(path: Path) -> bytes:
    """The content of a regular file; a FIFO in its place does not hold us up. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "is no regular file", str(path))
        return file.read()


def write_new(path: Path, content: bytes, *, mode: int) -> None:
    """Create a file that is not there yet, and fsync it. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        os.fchmod(descriptor, mode)
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directories(path: Path, *, mode: int) -> list[Path]:
    """`mkdir -p` with `mode`; returns the directories whose new entries must be made durable. Raises OSError."""
    missing: list[Path] = []
    current = path
    while not current.is_dir():
        missing.append(current)
        current = current.parent
    for directory in reversed(missing):
        with suppress(FileExistsError):
            directory.mkdir(mode=mode)
            directory.chmod(mode)
    return [directory.parent for directory in missing]


class HashingWriter:
    """One payload file: hashed and counted as it is written, flushed every 64 MiB, fsynced at the end."""

    def __init__(self, path: PayloadPath, target: Path, *, size: int | None, mode: int, space: Reservation) -> None:
        self._path = path
        self._target = target
        self._declared = size
        self._space = space
        self._hash = hashlib.sha256()
        self._size = 0
        self._unflushed = 0
        self._head = bytearray()
        with disk_errors("cannot create", target):
            self._descriptor = os.open(
                target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode
            )
            os.fchmod(self._descriptor, mode)

    def write(self, data: bytes | memoryview) -> None:
        """Append. Raises NoSpace, DiskTrouble."""
        self._keep_head(data)
        self._hash.update(data)
        view = memoryview(data)
        with disk_errors("cannot write", self._target):
            while view:
                view = view[os.write(self._descriptor, view) :]
        self._size += len(data)
        self._unflushed += len(data)
        if self._unflushed >= FLUSH_EVERY:
            self._flush()

    def close(self) -> SeenFile:
        """fsync, and say what went by. Raises NoSpace, DiskTrouble."""
        with disk_errors("cannot flush", self._target):
            os.fsync(self._descriptor)
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        self._space.written(self._unflushed)
        self.discard()
        with _judging:
            findings = judge_file(self._path, self._size, bytes(self._head))
        self._head.clear()
        return SeenFile(self._path, self._size, self._hash.hexdigest(), findings)

    def discard(self) -> None:
        """Close without keeping promises; harmless when closed already."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _flush(self) -> None:
        with disk_errors("cannot flush", self._target):
            os.fdatasync(self._descriptor)
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        self._space.written(self._unflushed)
        self._unflushed = 0

    def _keep_head(self, data: bytes | memoryview) -> None:
        size = self._declared if self._declared is not None else 1 << 62
        while True:
            wanted = head_wanted(self._path, size, bytes(self._head[:8]))
            missing = wanted - len(self._head)
            if missing <= 0:
                return
            offset = len(self._head) - self._size
            if not 0 <= offset < len(data):
                return
            self._head += data[offset : offset + missing]
