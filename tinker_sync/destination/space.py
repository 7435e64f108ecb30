"""Free space: what the filesystem has, less what running transfers will still need."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Final

from tinker_sync.errors import NoSpace

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


_LOOK_EVERY: Final = 1_000_000
"""Bytes of one transfer between two looks at the filesystem."""


def free_bytes(path: Path) -> int:
    """What an unprivileged process can still write on that filesystem. Raises OSError."""
    stat = os.statvfs(path)
    return stat.f_bavail * stat.f_frsize


class Reservation:
    """One transfer's share of the free space; give it back with `release`."""

    def __init__(self, ledger: SpaceLedger, expected: int) -> None:
        self._ledger = ledger
        self._left = expected
        self._unchecked = 0
        self._lock = threading.Lock()  # files of one checkpoint are written by several threads

    def written(self, size: int) -> None:
        """So much is on disk now and no longer reserved. Raises NoSpace below `min_free`, to within a megabyte."""
        self._take(size)
        with self._lock:
            self._unchecked += size
            if self._unchecked < _LOOK_EVERY:
                return
            self._unchecked = 0
        self._ledger.check()

    def release(self) -> None:
        """The transfer is over; harmless when repeated."""
        self._take(None)

    def _take(self, size: int | None) -> None:
        with self._lock:
            taken = self._left if size is None else min(size, self._left)
            self._left -= taken
        self._ledger.give_back(taken)


class SpaceLedger:
    """Keeps `min_free` on one filesystem, thread-safe."""

    def __init__(self, root: Path, min_free: int, free: Callable[[Path], int] = free_bytes) -> None:
        self._root = root
        self._min_free = min_free
        self._free = free
        self.reclaim: Callable[[int], bool] = lambda _: False
        """Asked to free so many bytes before a transfer is refused; True when it freed some and may be asked again."""
        self._reserved = 0
        self._lock = threading.Lock()

    def reserve(self, expected: int | None) -> Reservation:
        """Set `expected` bytes aside. Raises NoSpace when they would not fit above `min_free`."""
        wanted = expected or 0
        with self._lock:
            free = self._with_room(self._reserved + wanted)
            left = free - self._reserved - wanted
            if left < self._min_free:
                running = f", {self._reserved:,} reserved by running transfers" if self._reserved else ""
                message = (
                    f"no space: {wanted:,} bytes would leave {max(left, 0):,} free below {self._root} "
                    f"({free:,} free{running}); [mirror] min_free is {self._min_free:,}. "
                    "Free space there, or lower min_free"
                )
                raise NoSpace(message)
            self._reserved += wanted
        return Reservation(self, wanted)

    def nothing(self) -> Reservation:
        """Of no bytes, which is never refused."""
        return Reservation(self, 0)

    def fits(self, expected: int) -> bool:
        """Whether `reserve` would accept so much now."""
        return self._free(self._root) - self._reserved - expected >= self._min_free  # no lock: asked by the event loop

    def check(self) -> None:
        """Raises NoSpace when the filesystem fell below `min_free` while a transfer was writing."""
        with self._lock:
            free = self._with_room(0)
        if free < self._min_free:
            message = (
                f"no space: {free:,} bytes free below {self._root}, [mirror] min_free is {self._min_free:,}. "
                "Free space there, or lower min_free"
            )
            raise NoSpace(message)

    def _with_room(self, wanted: int) -> int:
        """Free bytes, after reclaiming what is needed for `wanted` where that can be had."""
        free = self._free(self._root)
        while free - wanted < self._min_free and self.reclaim(self._min_free + wanted - free):
            free = self._free(self._root)
        return free

    def give_back(self, size: int) -> None:
        """Part of a reservation is written or not needed."""
        with self._lock:
            self._reserved -= size
