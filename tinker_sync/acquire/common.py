"""What all ways of acquiring share: the result, and the pump from a body to the writing thread."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final

from tinker_sync.errors import StorageTrouble

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from tinker_sync.model.evidence import Claim, Defect, SeenFile
    from tinker_sync.ports import Intake

_PIECE: Final = 1024 * 1024
"""Bytes per step of the writing thread: large enough that switching threads costs nothing."""


@dataclass(frozen=True, slots=True)
class Acquired:
    """What came into the stage, and what is wrong with it."""

    files: Sequence[SeenFile]
    defects: Sequence[Defect]
    source: str
    """`archive`, `files` or `directory`."""
    claims: Mapping[str, Claim] = field(default_factory=dict)
    by_bare_id: bool = False
    """Whether the server gave it only under the bare id, which can bring the other type."""


async def pump(
    chunks: AsyncIterator[bytes],
    intake: Intake,
    sink: Callable[[bytes], None],
    enough: Callable[[], bool] = lambda: False,
) -> None:
    """Bring a body to `sink` in the writing thread, reading on while it works; at most two pieces are in memory.

    `enough` ends it early. Raises what the body or the sink raises; the sink is never left running.
    """
    working: asyncio.Task[None] | None = None
    buffer = bytearray()

    async def hand_over() -> asyncio.Task[None]:
        piece = bytes(buffer)
        buffer.clear()
        if working is not None:
            await working
        return asyncio.create_task(intake.run(partial(sink, piece)))

    trouble: StorageTrouble | None = None
    try:
        async for chunk in chunks:
            buffer += chunk
            intake.advanced(len(chunk))
            if len(buffer) >= _PIECE:
                working = await hand_over()
                if enough():
                    break
    except StorageTrouble as error:
        trouble = error  # what came before the cut is handed over too: it can be all that there is
    finally:
        if working is not None:
            await asyncio.wait([working])
    if buffer:
        working = await hand_over()
    if working is not None:
        await working
    if trouble is not None:
        raise trouble
