"""The journal: what was meant and what became of it, as lines that are only ever added.

Each line is one JSON object with `time`, `event` and `prev`, the SHA-256 of the line before (64 zeros for the first).
An edit in the middle breaks the chain; a cut tail does not show, so copy the last hash elsewhere if that matters.
It rotates at 16 MiB to `journal-000001.jsonl` and so on; the first line of the next file goes on with the chain.

Written by the holder of the root's lock alone; read by anybody, who takes a last line without newline for one in
progress. It refuses to write after a failed fsync: then nothing proves what is on the disk.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Self

from tinker_sync.errors import DiskTrouble, FixFirst
from tinker_sync.model.moments import parse_time

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path
    from types import TracebackType

ACTIVE: Final = "journal.jsonl"
_ROTATED: Final = re.compile(r"journal-(\d{6,})\.jsonl")
ROTATE_AT: Final = 16 * 1024 * 1024
_LONGEST_LINE: Final = 65536
_TYPICAL_LINE: Final = 2048
FIRST: Final = "0" * 64
Position = tuple[int, int]
"""The file's number and the offset behind a line in it."""


class JournalBroken(DiskTrouble):
    """Nothing may be deleted when the journal cannot be written."""


@dataclass(slots=True)
class Examined:
    """What `history --check` found."""

    lines: int = 0
    files: int = 0
    last: str = FIRST
    """The hash of the last line: what to copy elsewhere."""
    problems: list[str] = field(default_factory=list)


class Journal:
    """The writer; context manager. Thread-safe."""

    def __init__(self, state: Path, *, rotate_at: int = ROTATE_AT) -> None:
        self._state = state
        self._path = state / ACTIVE
        self._rotate_at = rotate_at
        self._turn = threading.Lock()
        self._descriptor = -1
        self._size = 0
        self._number = 1
        self._last = FIRST
        self._broken = ""
        self.dropped = 0
        """Bytes of a torn last line that were removed when it was opened."""

    def __enter__(self) -> Self:
        """Open, and drop a torn last line. Raises FixFirst when it cannot be opened."""
        try:
            rotated = _rotated(self._state)
            self._number = rotated[-1][0] + 1 if rotated else 1
            self._open()
            whole = _whole_length(self._descriptor, self._size)
            if whole < self._size:
                self.dropped = self._size - whole
                self._set_aside(whole)
                os.ftruncate(self._descriptor, whole)
                os.fsync(self._descriptor)
                self._size = whole
            self._last = _last_hash(self._path) or (_last_hash(rotated[-1][1]) if rotated else None) or FIRST
        except OSError as error:
            if self._descriptor >= 0:
                os.close(self._descriptor)
            message = f"the journal {self._path} cannot be opened: {error.strerror}; without it nothing may be deleted"
            raise FixFirst(message) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
        self._descriptor = -1

    def _set_aside(self, whole: int) -> None:
        """What is no line, and more than a line can be, is kept beside: somebody may want to look at it."""
        if self.dropped > _LONGEST_LINE:
            torn = self._path.with_name(f"journal-torn-{self._size}")
            with torn.open("wb") as kept:
                for start in range(whole, self._size, 1 << 20):
                    kept.write(os.pread(self._descriptor, min(1 << 20, self._size - start), start))
            torn.chmod(0o600)

    def append(self, event: Mapping[str, Any]) -> Position:
        """Add one line and make it durable. `event` brings `time` and `event`. Raises JournalBroken."""
        with self._turn:
            if self._broken:
                raise JournalBroken(self._broken)
            try:
                if self._size >= self._rotate_at:
                    self._rotate()
                line = json.dumps({**event, "prev": self._last}, ensure_ascii=True, separators=(",", ":")).encode()
                self._write(line + b"\n")
            except OSError as error:
                message = f"the journal {self._path} cannot be written: {error.strerror}; nothing is deleted without it"
                raise JournalBroken(message) from error
            self._last = hashlib.sha256(line).hexdigest()
            return self._number, self._size

    def _write(self, line: bytes) -> None:
        """All of it, or none: a line that does not fit is taken back. A failed fsync is final."""
        try:
            view = memoryview(line)
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError:
            try:
                os.ftruncate(self._descriptor, self._size)
            except OSError:
                self._broken = f"the journal {self._path} holds half a line: free space, then start again"
            raise
        try:
            os.fsync(self._descriptor)
        except OSError:
            self._broken = f"the journal {self._path} could not be flushed: look at the disk, then start again"
            raise
        self._size += len(line)

    def _rotate(self) -> None:
        full, target = self._descriptor, self._state / f"journal-{self._number:06}.jsonl"
        if target.exists():
            raise FileExistsError(errno.EEXIST, f"{target.name} is there already", str(target))
        self._path.rename(target)
        self._broken = f"the journal {self._path} could not be begun anew: look at the disk, then start again"
        self._open()
        self._number, self._broken = self._number + 1, ""
        os.close(full)

    def _open(self) -> None:
        self._descriptor = os.open(
            self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
        self._size = os.fstat(self._descriptor).st_size
        directory = os.open(self._state, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def read_events(state: Path, after: Position = (0, 0)) -> Iterator[tuple[Position, dict[str, Any]]]:
    """Every readable event behind a position, in order. What cannot be read is passed over: `examine` names it.

    Raises OSError.
    """
    for number, path in _files(state):
        if number < after[0]:
            continue
        offset = after[1] if number == after[0] else 0
        for end, line in _lines(path, offset):
            with suppress(ValueError, RecursionError):
                event = json.loads(line)
                if isinstance(event, dict) and isinstance(event.get("event"), str):
                    yield (number, end), event


def last_events(state: Path, most: int) -> list[dict[str, Any]]:
    """The last events, newest first, from the end of the files: it costs the same however long they are."""
    found: list[dict[str, Any]] = []
    for _, path in reversed(_files(state)):
        with suppress(OSError), path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            begin = max(0, size - most * _TYPICAL_LINE)
            file.seek(begin)
            lines = file.read().split(b"\n")[1 if begin else 0 : -1]
            for line in reversed(lines):
                with suppress(ValueError, RecursionError):
                    event = json.loads(line)
                    if isinstance(event, dict) and isinstance(event.get("event"), str):
                        parse_time(str(event.get("time")))
                        found.append(event)
        if len(found) >= most:
            break
    return found[:most]


def end_of(state: Path) -> Position:
    """Where the journal ends. Raises OSError."""
    files = _files(state)
    return (files[-1][0], files[-1][1].stat().st_size) if files else (0, 0)


def examine(state: Path) -> Examined:
    """Follow the chain through all files. Raises OSError."""
    found = Examined()
    expected: str | None = None
    files = _files(state)
    if files and files[0][0] > 1:
        found.problems.append(f"{files[0][1].name} is the oldest file here: {files[0][0] - 1} before it are missing")
    for place, (number, path) in enumerate(files):
        if place and number != files[place - 1][0] + 1:
            found.problems.append(f"{path.name}: the file before it is missing")
            expected = None
        found.files += 1
        if place == 0 and number == 1:
            expected = FIRST
        for count, (_, line) in enumerate(_lines(path, 0), start=1):
            found.lines += 1
            try:
                event = json.loads(line)
                previous = event["prev"]
            except (ValueError, KeyError, TypeError, RecursionError):
                found.problems.append(f"{path.name}, line {count}: is no event")
            else:
                if expected is not None and previous != expected:
                    found.problems.append(
                        f"{path.name}, line {count}: does not follow the line before it: something was changed or taken"
                    )
            expected = hashlib.sha256(line).hexdigest()
            found.last = expected
    return found


def _files(state: Path) -> list[tuple[int, Path]]:
    """Number and path of every file, oldest first; the active one last."""
    found = _rotated(state)
    if (state / ACTIVE).is_file():
        found.append((found[-1][0] + 1 if found else 1, state / ACTIVE))
    return found


def _rotated(state: Path) -> list[tuple[int, Path]]:
    try:
        names = [path.name for path in state.iterdir()]
    except FileNotFoundError:
        return []
    return sorted((int(match.group(1)), state / name) for name in names if (match := _ROTATED.fullmatch(name)))


def _lines(path: Path, offset: int) -> Iterator[tuple[int, bytes]]:
    """Whole lines with the offset behind each."""
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield offset, line[:-1]


def _whole_length(descriptor: int, size: int) -> int:
    """How long the file is up to its last newline."""
    end = size
    while end > 0:
        start = max(0, end - 65536)
        piece = os.pread(descriptor, end - start, start)
        at = piece.rfind(b"\n")
        if at >= 0:
            return start + at + 1
        end = start
    return 0


def _last_hash(path: Path) -> str | None:
    """The hash of a file's last whole line; None for an empty one."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = 65536
        while True:
            start = max(0, size - length)
            file.seek(start)
            lines = file.read(size - start).split(b"\n")
            if len(lines) > 2 or (start == 0 and len(lines) > 1):
                return hashlib.sha256(lines[-2]).hexdigest()
            if start == 0:
                return None
            length *= 4
