"""The directory way: a server on this host that answers with `file://`, taken only below a configured directory."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote, urlsplit

from tinker_sync.acquire.common import Acquired
from tinker_sync.acquire.names import NameRegister
from tinker_sync.errors import NotTransferable, StorageTrouble
from tinker_sync.model.evidence import Defect, Kind, SeenFile
from tinker_sync.model.paths import PathInvalid, PayloadPath

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tinker_sync.model.paths import SignedUrl
    from tinker_sync.ports import Intake, Stage

_PIECE: Final = 1024 * 1024


class DirectorySource:
    """Copies a directory of the server's into a stage. `below` is None when none is allowed."""

    def __init__(self, below: Path | None) -> None:
        self._below = None if below is None else Path(os.path.realpath(below.expanduser()))

    async def acquire(self, url: SignedUrl, intake: Intake) -> Acquired:
        """Copy once. Raises NotTransferable for a directory that may not be read, NoSpace, DiskTrouble."""
        source = await intake.run(lambda: self._resolve(url))
        members, defects, total = await intake.run(lambda: _look(source))
        if defects:
            return Acquired((), defects, "directory")
        stage = await intake.begin(total)
        files: list[SeenFile] = []
        for path, origin in members:
            seen, fault = await intake.run(lambda path=path, origin=origin: _copy(stage, path, origin))  # type: ignore[misc]
            intake.advanced(seen.size)
            files.append(seen)
            defects += fault
        return Acquired(files, defects, "directory")

    def _resolve(self, url: SignedUrl) -> Path:
        if self._below is None:
            message = (
                "the server hands out a directory on its own host (file://); "
                "set [tinker] file_urls_below to the directory that may be read, if this is that host"
            )
            raise NotTransferable(message)
        parts = urlsplit(url.reveal())
        if parts.netloc not in ("", "localhost"):
            message = f"file:// URL of another host ({parts.netloc})"
            raise NotTransferable(message)
        if "%00" in parts.path or "\0" in parts.path:
            message = "the server's directory has a NUL in its name"
            raise NotTransferable(message)
        source = Path(os.path.realpath(unquote(parts.path, errors="surrogateescape")))
        if not source.is_relative_to(self._below) or source == self._below:
            message = f"the server's directory is not below [tinker] file_urls_below ({self._below})"
            raise NotTransferable(message)
        if not source.is_dir():
            message = "the server's directory is not there"
            raise NotTransferable(message)
        return source


def _look(source: Path) -> tuple[list[tuple[PayloadPath, Path]], list[Defect], int]:
    try:
        return _members(source)
    except OSError as error:
        message = f"the server's directory cannot be read: {error.strerror}"
        raise NotTransferable(message) from error


def _members(source: Path) -> tuple[list[tuple[PayloadPath, Path]], list[Defect], int]:
    members: list[tuple[PayloadPath, Path]] = []
    defects: list[Defect] = []
    names = NameRegister()
    total = 0
    for relative, entry in _walk(source, ""):
        mode = entry.stat(follow_symlinks=False).st_mode
        if not stat.S_ISREG(mode):
            what = "is no regular file; only regular files and directories are taken"
            defects.append(Defect(Kind.STRUCTURE, what, relative))
            continue
        try:
            path = PayloadPath.parse(relative)
        except PathInvalid as error:
            defects.append(Defect(Kind.STRUCTURE, str(error)))
            continue
        clash = names.add(path)
        if clash is not None:
            defects.append(Defect(Kind.STRUCTURE, clash, relative))
            continue
        members.append((path, Path(entry.path)))
        total += entry.stat(follow_symlinks=False).st_size
    return members, defects, total


def _walk(directory: Path, below: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path), f"{below}{entry.name}/")
        else:
            yield f"{below}{entry.name}", entry


def _copy(stage: Stage, path: PayloadPath, origin: Path) -> tuple[SeenFile, list[Defect]]:
    try:
        descriptor = os.open(origin, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        message = f"{path} cannot be read in the server's directory: {error.strerror}"
        raise StorageTrouble(message) from error
    try:
        before = os.fstat(descriptor)
        writer = stage.write(path, before.st_size)
        while piece := os.read(descriptor, _PIECE):
            writer.write(piece)
        after = os.fstat(descriptor)
    except OSError as error:
        message = f"{path} cannot be read in the server's directory: {error.strerror}"
        raise StorageTrouble(message) from error
    finally:
        os.close(descriptor)
    seen = writer.close()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns) or seen.size != after.st_size:
        return seen, [Defect(Kind.TRANSPORT, "changed while it was copied", str(path))]
    return seen, []
