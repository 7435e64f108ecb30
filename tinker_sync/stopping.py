"""A stop waits for what must not be left half-done."""

from __future__ import annotations

import asyncio
from typing import Any


async def outlast(work: asyncio.Future[Any]) -> None:
    """Wait until it is over, whatever becomes of it. A cancellation waits too, however often it comes, then goes on.

    For work in threads, which cannot be cancelled: nobody may clean up under it. It must be bounded.
    """
    stopped: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError as error:
            stopped = error
    if not work.cancelled():
        work.exception()  # who wants it asks for the result; asyncio need not complain that nobody did
    if stopped is not None:
        raise stopped
