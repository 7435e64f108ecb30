"""What all downloads share: connections to the storage, and memory for bytes that came before their turn.

Both are handed out by rank: what a consumer waits for now comes before what is fetched ahead, and within each the more
urgent transfer before the less urgent one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

Rank = Callable[[], tuple[int, int]]
"""(0 for what is waited for, 1 for what is fetched ahead; the transfer's priority): asked again whenever places come free."""

SEGMENT: Final = 2 * 1024 * 1024
"""Bytes of a span that is fetched ahead, all of which can have to wait in memory."""
AHEAD: Final = 17
"""How many such spans there are at a time, of all downloads together, counting for each download one for its next bytes."""


@dataclass(slots=True, eq=False)
class _Waiter:
    rank: Rank
    turn: asyncio.Future[None]


class Turns:
    """So many places, given to whoever ranks first, in the order of asking among equals.

    With `lends`, what is waited for gets one even where none is free: else it could wait for those who wait for it.
    """

    def __init__(self, places: int, *, lends: bool = False) -> None:
        self._free = places
        self._lends = lends
        self._waiting: list[_Waiter] = []

    @property
    def free(self) -> int:
        """Places that nobody holds or waits for; below zero where some are lent."""
        return self._free

    async def take(self, rank: Rank) -> None:
        """Wait for a place; give it back with `give`."""
        waiter = _Waiter(rank, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        self._hand_out()
        try:
            await waiter.turn
        except asyncio.CancelledError:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            elif not waiter.turn.cancelled():
                self.give()
            raise

    def give(self) -> None:
        """A place is free again."""
        self._free += 1
        self._hand_out()

    def look_again(self) -> None:
        """Somebody's rank has changed."""
        self._hand_out()

    def _hand_out(self) -> None:
        self._waiting = [waiter for waiter in self._waiting if not waiter.turn.done()]
        while self._waiting:
            first = min(self._waiting, key=lambda waiter: waiter.rank())
            if self._free <= 0 and not (self._lends and first.rank()[0] == 0):
                return
            self._waiting.remove(first)
            self._free -= 1
            first.turn.set_result(None)


class Lanes:
    """The limits, which are global."""

    def __init__(self, connections: int) -> None:
        self.connections = Turns(connections)
        self.ahead = Turns(AHEAD, lends=True)
