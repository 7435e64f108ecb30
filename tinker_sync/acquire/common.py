"""What all ways of acquiring share: the result, and the pump from a body to the writing thread."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Final, TypeVar

from tinker_sync.errors import StorageTrouble
from tinker_sync.stopping import outlast

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from tinker_sync.model.evidence import Claim, Defect, SeenFile
    from tinker_sync.ports import Intake, StagedObject

T = TypeVar("T")
_PIECE: Final = 512 * 1024
"""Bytes per step of the writing thread: large enough that switching threads costs nothing."""
_REPLAYED_AT_ONCE: Final = 8
"""Pieces of at most 1 MiB per step of the writing thread."""


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
    finish: Callable[[StorageTrouble | None], T],
    enough: Callable[[], bool] = lambda: False,
) -> T:
    """Bring a body to `sink` in the writing thread, reading on while it works; at most two pieces are in memory.

    `finish` is called there after the last piece, with what cut the body short, which it may raise. `enough` ends it
    early. Raises what the body or the sink raises; the sink is never left running.
    """
    working: asyncio.Task[None] | None = None
    piece: list[bytes] = []
    size = 0

    async def hand_over() -> asyncio.Task[None]:
        if working is not None:
            await working
        return asyncio.create_task(intake.run(partial(_feed, sink, piece)))

    def end() -> T:
        _feed(sink, piece)  # what came before a cut, too: it can be all that there is
        return finish(trouble)

    trouble: StorageTrouble | None = None
    try:
        async for chunk in chunks:
            piece.append(chunk)
            size += len(chunk)
            intake.advanced(len(chunk))
            if size >= _PIECE:
                working = await hand_over()
                piece, size = [], 0
                if enough():
                    break
    except StorageTrouble as error:
        trouble = error
    finally:
        if working is not None:
            await outlast(working)
    if working is not None:
        await working
    return await intake.run(end)


def _feed(sink: Callable[[bytes], None], piece: list[bytes]) -> None:
    for chunk in piece:
        sink(chunk)


async def replay(staged: StagedObject, intake: Intake, sink: Callable[[bytes], None]) -> None:
    """Feed what an earlier attempt kept of an object, in steps that a stop need not wait for long. Raises DiskTrouble."""
    pieces = staged.replay()

    def some() -> bool:
        fed = False
        for piece in islice(pieces, _REPLAYED_AT_ONCE):
            sink(piece)
            fed = True
        return fed

    while await intake.run(some):
        pass
