"""However often somebody says stop: what runs in a thread ends before anybody cleans up under it."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import NOW, Silent
from tests.test_destination import PATH, make_tree
from tinker_sync.acquire.common import pump
from tinker_sync.model.work import Transfer
from tinker_sync.stopping import outlast
from tinker_sync.transfer import _Intake

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path


@pytest.fixture
def writers() -> Iterator[ThreadPoolExecutor]:
    """One thread."""
    with ThreadPoolExecutor(1) as pool:
        yield pool


async def stop_often(task: asyncio.Task[Any], release: threading.Event) -> None:
    """Cancel it again and again; only then its thread can end."""
    await asyncio.sleep(0.02)
    for _ in range(5):
        task.cancel()
        await asyncio.sleep(0.01)
        assert not task.done()
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_work_is_outlasted_whatever_becomes_of_it(writers: ThreadPoolExecutor) -> None:
    """Its error is nobody's business, a cancellation goes on at the end."""
    release = threading.Event()

    def fail() -> None:
        release.wait(10)
        raise ValueError

    future = asyncio.get_running_loop().run_in_executor(writers, fail)
    await stop_often(asyncio.create_task(outlast(future)), release)  # type: ignore[arg-type]
    await outlast(future)
    assert isinstance(future.exception(), ValueError)


async def test_nobody_cleans_up_under_a_writing_thread(tmp_path: Path, writers: ThreadPoolExecutor) -> None:
    """The stage of a transfer that is cancelled twice goes when its last write is done, and what was made is undone."""
    tree = make_tree(tmp_path)
    intake = _Intake(tree, Transfer(PATH, NOW, None, 1), Silent(), writers)  # type: ignore[arg-type]
    await intake.begin(None)
    release, written = threading.Event(), []

    def sink(_: bytes) -> None:
        release.wait(10)
        written.append(len(list(tree.area("staging").iterdir())))

    async def body() -> AsyncIterator[bytes]:
        yield b"x" * 1_000_000
        await asyncio.sleep(30)

    async def attempt() -> None:
        try:
            await pump(body(), intake, sink, lambda _: None)
        finally:
            await intake.clean()

    task = asyncio.create_task(attempt())
    await asyncio.sleep(0.05)
    await stop_often(task, release)
    assert written == [1], "the stage was there while the thread wrote"
    assert list(tree.area("staging").iterdir()) == []


async def test_what_nobody_takes_any_more_is_undone(tmp_path: Path, writers: ThreadPoolExecutor) -> None:
    """Cancelled while a stage is opened, and again while it is removed."""
    tree = make_tree(tmp_path)
    release = threading.Event()
    opening = tree.open_stage

    def slowly(*given: Any) -> Any:
        release.wait(10)
        return opening(*given)

    tree.open_stage = slowly  # type: ignore[method-assign]
    intake = _Intake(tree, Transfer(PATH, NOW, None, 1), Silent(), writers)  # type: ignore[arg-type]
    await stop_often(asyncio.create_task(intake.begin(None)), release)
    assert list(tree.area("staging").iterdir()) == []
