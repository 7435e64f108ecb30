"""Reading replicas back from the disk, to compare them with their manifests."""

from __future__ import annotations

import hashlib
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tinker_sync.destination.files import read_small
from tinker_sync.integrity import judge_replica
from tinker_sync.model.evidence import Defect, Kind, SeenFile
from tinker_sync.model.manifest import Manifest
from tinker_sync.model.paths import MANIFEST_NAME, PathInvalid, PayloadPath

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_PIECE: Final = 1024 * 1024


def read_manifest(directory: Path) -> tuple[Manifest, str]:
    """A replica's manifest and the SHA-256 of its file. Raises OSError, ManifestInvalid."""
    content = read_small(directory / MANIFEST_NAME)
    return Manifest.from_bytes(content), hashlib.sha256(content).hexdigest()


def check_replica(directory: Path, manifest: Manifest, advanced: Callable[[int], None]) -> list[Defect]:
    """Read every file of a replica and compare. Returns all defects; raises nothing for what is on the disk."""
    defects: list[Defect] = []
    seen: list[SeenFile] = []
    expected = {entry.path: entry.size for entry in manifest.files}
    for relative, entry in _walk(directory, defects):
        try:
            path = PayloadPath.parse(relative)
        except PathInvalid as error:
            defects.append(Defect(Kind.CONTENT, f"is not in the manifest ({error})", relative))
            continue
        wrong_size = path in expected and entry.stat(follow_symlinks=False).st_size != expected[path]
        if path not in expected or wrong_size:
            seen.append(SeenFile(path, entry.stat(follow_symlinks=False).st_size, ""))
            continue
        try:
            seen.append(_read_file(Path(entry.path), path, advanced))
        except OSError as error:
            seen.append(SeenFile(path, expected[path], ""))
            defects.append(Defect(Kind.CONTENT, f"cannot be read: {error.strerror}", relative))
    return [*defects, *judge_replica(manifest, seen)]


def _walk(directory: Path, defects: list[Defect], below: str = "") -> Iterator[tuple[str, os.DirEntry[str]]]:
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except OSError as error:
        defects.append(Defect(Kind.CONTENT, f"cannot be read: {error.strerror}", below or directory.name))
        return
    for entry in entries:
        relative = f"{below}{entry.name}"
        if relative == MANIFEST_NAME:
            continue
        mode = entry.stat(follow_symlinks=False).st_mode
        if stat.S_ISDIR(mode):
            yield from _walk(Path(entry.path), defects, f"{relative}/")
        elif stat.S_ISREG(mode):
            yield relative, entry
        else:
            defects.append(Defect(Kind.CONTENT, "is no regular file", relative))


def _read_file(target: Path, path: PayloadPath, advanced: Callable[[int], None]) -> SeenFile:
    digest, size = hashlib.sha256(), 0
    buffer = bytearray(_PIECE)
    view = memoryview(buffer)
    descriptor = os.open(target, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        with suppress(OSError):
            # What the page cache holds proves nothing about the disk.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while count := os.readv(descriptor, [buffer]):
            digest.update(view[:count])
            size += count
            advanced(count)
        with suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return SeenFile(path, size, digest.hexdigest())
