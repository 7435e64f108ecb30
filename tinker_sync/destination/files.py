"""Durable writes. A failed fsync is final: the kernel may have dropped the pages, so nothing here tries it again.

See https://wiki.postgresql.org/wiki/Fsync_Errors.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import threading
from concurrent.futures import wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tinker_sync.errors import DiskTrouble, NoSpace, TransferFailed
from tinker_sync.integrity import head_wanted, judge_file
from tinker_sync.model.evidence import SeenFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Executor, Future
    from pathlib import Path

    from tinker_sync.destination.space import Reservation
    from tinker_sync.model.paths import PayloadPath

_judging = threading.Lock()
"""One header is parsed at a time: parsed, a large one is many times its size."""
FLUSH_EVERY: Final = 64 * 1024 * 1024
"""So that the last fsync, and a stop, stay short."""

_QUICK: Final = 1024 * 1024
"""Fewer bytes than this are made durable at once, and stay in the page cache: more would cost more than it saves."""
_OTHERS: Final = 0o077
"""Permissions that a umask is there to take; what has none of them is created as it should be."""


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
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "is no regular file", str(path))
        content = bytearray()
        while piece := os.read(descriptor, max(4096, found.st_size + 1 - len(content))):
            content += piece
        return bytes(content)
    finally:
        os.close(descriptor)


def write_new(path: Path, content: bytes, *, mode: int) -> None:
    """Create a file that is not there yet, and fsync it. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        if mode & _OTHERS:
            os.fchmod(descriptor, mode)
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path, *, mode: int) -> None:
    """`mkdir` with `mode`, whatever the umask. Raises OSError."""
    os.mkdir(path, mode)
    if mode & _OTHERS:
        os.chmod(path, mode)


def make_directories(path: Path, *, mode: int) -> list[Path]:
    """`mkdir -p` with `mode`; returns the directories whose new entries must be made durable. Raises OSError."""
    missing: list[Path] = []
    current = path
    while not current.is_dir():
        missing.append(current)
        current = current.parent
    for directory in reversed(missing):
        with suppress(FileExistsError):
            make_directory(directory, mode=mode)
    return [directory.parent for directory in missing]


@dataclass(frozen=True, slots=True)
class Durable:
    """So many of a file's first bytes are on the device, with this SHA-256."""

    size: int
    sha256: str


class HashingWriter:
    """One payload file: hashed and counted as it is written, flushed every 64 MiB and at the end.

    Flushing much is the flusher's business, once at a time for each file, so that the wire does not wait for the device.
    What it meets is raised by the next flush, or by `settle`. `flushed` hears, from a flusher's thread, how many more bytes
    are durable. With `kept`, that much of the file is there already: it is hashed as it is given again, not written.
    """

    def __init__(
        self,
        path: PayloadPath,
        target: Path,
        *,
        size: int | None,
        mode: int,
        space: Reservation,
        flusher: Executor,
        flushed: Callable[[int], None] = lambda _: None,
        kept: Durable | None = None,
    ) -> None:
        self._path = path
        self._target = target
        self._declared = size
        self._space = space
        self._flusher = flusher
        self._flushed = flushed
        self._kept = 0 if kept is None else kept.size
        self._hash = hashlib.sha256()
        self._size = 0
        self._unflushed = 0
        self._flushing: Future[None] | None = None
        self._failed = False
        self._head = bytearray()
        self.durable: Durable | None = kept
        """What is on the device for certain."""
        self.is_durable = False
        """Whether that is all there will be."""
        flags = os.O_CREAT | os.O_EXCL if kept is None else 0
        with disk_errors("cannot create", target):
            self._descriptor = os.open(target, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | flags, mode)
            try:
                if kept is not None or mode & _OTHERS:
                    os.fchmod(self._descriptor, mode)
                if kept is not None:
                    os.ftruncate(self._descriptor, kept.size)
                    os.lseek(self._descriptor, 0, os.SEEK_END)
            except OSError:
                os.close(self._descriptor)
                raise

    def write(self, data: bytes | memoryview) -> None:
        """Append. Raises NoSpace, DiskTrouble."""
        self._keep_head(data)
        self._hash.update(data)
        view = memoryview(data)[max(0, self._kept - self._size) :]
        self._size += len(data)
        self._unflushed += len(view)
        with disk_errors("cannot write", self._target):
            while view:
                view = view[os.write(self._descriptor, view) :]
        if self._unflushed >= FLUSH_EVERY:
            self._flush(last=False)

    def close(self) -> SeenFile:
        """Say what went by; the rest is on its way to the device. Raises NoSpace, DiskTrouble."""
        with _judging:
            findings = judge_file(self._path, self._size, bytes(self._head))
        self._head.clear()
        self._flush(last=True)
        return SeenFile(self._path, self._size, self._hash.hexdigest(), findings)

    def settle(self) -> None:
        """Wait until everything is on the device. Raises NoSpace, DiskTrouble."""
        if self._flushing is not None:
            self._flushing.result()

    @property
    def failed(self) -> bool:
        """Whether something could not be made durable; waits for what is under way."""
        if self._flushing is not None:
            wait([self._flushing])
        return self._failed

    def discard(self) -> None:
        """Close without keeping promises; harmless when closed already."""
        if self._flushing is not None:
            wait([self._flushing])
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _flush(self, *, last: bool) -> None:
        self.settle()
        reached = Durable(self._size, self._hash.hexdigest())
        written, self._unflushed = self._unflushed, 0
        if written < _QUICK:
            self._make_durable(reached, written, last=last)
        else:
            self._flushing = self._flusher.submit(self._make_durable, reached, written, last=last)

    def _make_durable(self, reached: Durable, written: int, *, last: bool) -> None:
        try:
            with disk_errors("cannot flush", self._target):
                (os.fsync if last else os.fdatasync)(self._descriptor)
                if self._size >= _QUICK:
                    os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                if last:
                    descriptor, self._descriptor = self._descriptor, -1
                    os.close(descriptor)
            self._space.written(written)
            self.durable, self.is_durable = reached, last
            self._flushed(written)
        except BaseException:
            self._failed = True
            raise

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
