"""Programs that run after a commit, a delete or a failure. One at a time, in order; their end changes nothing here.

A program gets the facts as `TINKER_SYNC_*` in its environment, no credential, no input, and `timeout` seconds.
"""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Self

import structlog

from tinker_sync.stopping import outlast

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tinker_sync.model.events import Event
    from tinker_sync.model.work import Transfer

log = structlog.get_logger()

WAITING_MOST: Final = 10_000
"""Events that wait for their program; more are dropped, and that is said."""
_OUTPUT: Final = 2000
"""Bytes of a failing program's last words that are logged."""
_LAST_WORDS: Final = 0.5
"""Seconds between being asked to end and being killed."""
_PRIVATE: Final = ("TINKER_", "CLOUDFLARE_", "CREDENTIALS_DIRECTORY", "NOTIFY_SOCKET", "WATCHDOG_")
"""How variables begin that are this program's own, secrets among them."""


class Hooks:
    """A `ports.Reporter` that runs programs. Async context manager.

    Leaving it waits for what is queued, at most `patience` seconds, whatever ended the work; a cancellation ends the
    program that runs, and drops the rest.
    """

    def __init__(
        self, programs: Mapping[str, Sequence[str]], *, timeout: float, root: str, patience: float | None = None
    ) -> None:
        self._patience = patience
        self._queue: asyncio.Queue[Event] = asyncio.Queue(WAITING_MOST)
        self._root = root
        self._worker: asyncio.Task[None] | None = None
        self.configure(programs, timeout=timeout)

    def configure(self, programs: Mapping[str, Sequence[str]], *, timeout: float) -> None:
        """Other programs from now on."""
        self._programs = {kind: tuple(program) for kind, program in programs.items() if program}
        self._timeout = timeout

    async def __aenter__(self) -> Self:
        self._worker = asyncio.create_task(self._work(), name="hooks")
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        worker = self._worker
        if worker is None:
            return
        try:
            if kind is None or issubclass(kind, Exception):
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._patience):
                        await self._queue.join()
        finally:
            worker.cancel()
            await outlast(worker)
            if not worker.cancelled():
                worker.result()  # a bug is not hidden
            if not self._queue.empty():
                log.warning("hooks.dropped", events=self._queue.qsize())

    # As a reporter

    def planned(self, transfers: int, total_bytes: int) -> None:
        """Nothing."""

    def started(self, transfer: Transfer, expected_bytes: int | None) -> None:
        """Nothing."""

    def advanced(self, transfer: Transfer, received: int) -> None:
        """Nothing."""

    def ended(self, transfer: Transfer, error: str | None) -> None:
        """Nothing."""

    def happened(self, event: Event) -> None:
        """Queue it, when there is a program for it."""
        if event.kind not in self._programs:
            return
        try:
            self._queue.put_nowait(event)
        except asyncio.QueueFull:
            log.warning("hook.dropped", hook=event.kind, checkpoint=str(event.path), waiting=WAITING_MOST)

    # Running

    async def _work(self) -> None:
        while True:
            event = await self._queue.get()
            try:
                program = self._programs.get(event.kind)
                if program is not None:
                    await self._run(program, event)
            except OSError as error:  # no descriptors left, say
                log.warning("hook.failed", hook=event.kind, checkpoint=str(event.path), error=error.strerror)
            finally:
                self._queue.task_done()

    async def _run(self, program: Sequence[str], event: Event) -> None:
        about = {"hook": event.kind, "program": program[0], "checkpoint": str(event.path)}
        # A pipe of our own: with asyncio's, `wait` also waits for every child of the program that holds it open.
        reading, writing = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *program,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=writing,
                env=self._environment(event),
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            os.close(reading)
            log.warning("hook.failed", **about, error=f"cannot be started: {getattr(error, 'strerror', None) or error}")
            return
        finally:
            os.close(writing)
        words = asyncio.create_task(_last_words(reading))
        try:
            async with asyncio.timeout(self._timeout):
                code = await process.wait()
        except TimeoutError:
            await _end(process)
            log.warning("hook.failed", **about, error=f"it took more than {self._timeout:g} s and was ended")
        except asyncio.CancelledError:
            await _end(process)
            raise
        else:
            if code != 0:
                await asyncio.wait([words], timeout=0.5)
                said = words.result() if words.done() else ""
                log.warning("hook.failed", **about, error=f"it ended with {code}", said=said)
        finally:
            words.cancel()
            await outlast(words)

    def _environment(self, event: Event) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(_PRIVATE)}
        facts = {
            "event": event.kind,
            "tinker_path": str(event.path),
            "run": event.path.run_id,
            "type": event.path.checkpoint_type,
            "name": event.path.name,
            "root": self._root,
            **event.facts,
        }
        if "directory" in facts:
            facts["directory"] = os.path.join(self._root, facts["directory"])  # noqa: PTH118 - text, exactly
        told = {f"TINKER_SYNC_{name.upper()}": value.replace("\0", "") for name, value in facts.items()}
        return kept | told


async def _last_words(reading: int) -> str:
    """The end of what a program says, in bounded memory. Closes the pipe."""
    stream, kept = asyncio.StreamReader(), b""
    pipe = os.fdopen(reading, "rb", 0)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(stream), pipe
    )
    try:
        while piece := await stream.read(65536):
            kept = (kept + piece)[-_OUTPUT:]
    finally:
        transport.close()
    return kept.decode(errors="replace").strip()


async def _end(process: asyncio.subprocess.Process) -> None:
    """The program and what it started: asked first, then killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS):
                await process.wait()
                if number == signal.SIGTERM:
                    with suppress(ProcessLookupError, PermissionError):
                        os.killpg(process.pid, signal.SIGKILL)  # what it left behind
                return
