"""The control socket: commands that need the lock hand their work to the service that holds it. HTTP over a Unix socket.

`POST /fetch {"paths": […]}` and `POST /verify {"paths": […]}` answer with one JSON document a line: what goes on, and at
last `{"result": …}` or `{"error": …, "exit_code": …}`. Only the socket's owner can connect. Work that was handed over goes on when the one
who asked has gone.
"""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import structlog
from aiohttp import web

from tinker_sync.errors import TinkerSyncError
from tinker_sync.model.paths import PathInvalid, TinkerPath
from tinker_sync.passes import as_bug

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence

    from tinker_sync.activity import Reporters
    from tinker_sync.model.events import Event
    from tinker_sync.model.work import Transfer

log = structlog.get_logger()

_EVERY: Final = 0.25
"""Seconds between two lines about bytes."""
_LONGEST_ADDRESS: Final = 100
"""Bytes; a Unix socket's address has 108."""
_MOST: Final = 16 * 1024 * 1024
"""Bytes of a request: some hundred thousand paths."""


class Work(Protocol):
    """What can be asked for. `say` hears what goes on; the answer is the command's JSON."""

    async def fetch(self, paths: Sequence[TinkerPath], say: Callable[[Mapping[str, Any]], None]) -> Mapping[str, Any]:
        """Transfer these now. Raises TinkerSyncError."""
        ...

    async def verify(self, paths: Sequence[TinkerPath], say: Callable[[Mapping[str, Any]], None]) -> Mapping[str, Any]:
        """Read these back, all when there are none, and repair what is damaged. Raises TinkerSyncError."""
        ...


class Control:
    """The routes."""

    def __init__(self, work: Work, reporters: Reporters, group: asyncio.TaskGroup) -> None:
        self._work = work
        self._reporters = reporters
        self._group = group

    def app(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(client_max_size=_MOST)
        app.router.add_post("/fetch", self._fetch)
        app.router.add_post("/verify", self._verify)
        return app

    async def _fetch(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, self._work.fetch)

    async def _verify(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, self._work.verify)

    async def _answer(
        self, request: web.Request, work: Callable[..., Coroutine[Any, Any, Mapping[str, Any]]]
    ) -> web.StreamResponse:
        try:
            document = await request.json()
            paths = [TinkerPath.parse(text) for text in document["paths"]]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, PathInvalid) as error:
            said = str(error)[:300]
            return web.json_response({"error": f"no list of tinker paths: {said}", "exit_code": 2}, status=400)
        log.info("control.asked", what=request.path.strip("/"), checkpoints=len(paths))
        answer = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        feed = Feed()
        self._reporters.add(feed)
        # In the service's own group: it goes on when the one who asked has gone.
        doing = self._group.create_task(_outcome(work(paths, feed.say)))
        try:
            await answer.prepare(request)
            while not doing.done():
                await asyncio.wait([doing], timeout=_EVERY)
                await _write(answer, feed.take())
            await _write(answer, [*feed.take(), doing.result()])
            await answer.write_eof()
        except (ConnectionError, OSError):
            log.info("control.left", what=request.path.strip("/"))
        finally:
            self._reporters.remove(feed)
        return answer


class Feed:
    """A `ports.Reporter` that makes lines for one listener; bytes are added up between two lines."""

    def __init__(self) -> None:
        self._lines: list[Mapping[str, Any]] = []
        self._received: dict[str, int] = {}

    def say(self, line: Mapping[str, Any]) -> None:
        """One line."""
        self._lines.append(line)

    def take(self) -> list[Mapping[str, Any]]:
        """What came since."""
        bytes_came = [{"event": "advanced", "path": path, "received": size} for path, size in self._received.items()]
        found = [*self._lines, *bytes_came]
        self._lines, self._received = [], {}
        return found

    def planned(self, transfers: int, total_bytes: int) -> None:
        """The loop's own plan: not this listener's."""

    def started(self, transfer: Transfer, expected_bytes: int | None) -> None:
        """A transfer begins to receive."""
        self.say({"event": "started", "path": str(transfer.path), "expected": expected_bytes})

    def advanced(self, transfer: Transfer, received: int) -> None:
        """More bytes came."""
        path = str(transfer.path)
        self._received[path] = self._received.get(path, 0) + received

    def ended(self, transfer: Transfer, error: str | None) -> None:
        """It is done, or failed."""
        self.say({"event": "ended", "path": str(transfer.path), "error": error})

    def happened(self, event: Event) -> None:
        """Nothing."""


async def _outcome(work: Awaitable[Mapping[str, Any]]) -> Mapping[str, Any]:
    try:
        return {"result": await work}
    except TinkerSyncError as error:
        return {"error": str(error), "exit_code": error.exit_code}
    except Exception as error:  # noqa: BLE001 - a bug that one request meets ends no transfer
        bug = as_bug(error)
        log.error("control.failed", error=str(bug))  # noqa: TRY400 - told in words
        return {"error": str(bug), "exit_code": bug.exit_code}


async def _write(answer: web.StreamResponse, lines: Sequence[Mapping[str, Any]]) -> None:
    if lines:
        await answer.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))


def control_address(state: Path, root_id: str) -> Path | None:
    """Where the socket goes: the service manager's runtime directory, the user's, else beside the state.

    None where every address is longer than a socket's may be.
    """
    runtime = os.environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
    if runtime:
        return _fitting(Path(runtime) / "control")
    name = f"tinker-sync-{root_id[:12]}.control"
    user = os.environ.get("XDG_RUNTIME_DIR", "")
    if user and Path(user).is_dir():
        return _fitting(Path(user) / name)
    return _fitting(state / "control")


def _fitting(address: Path) -> Path | None:
    return address if len(os.fsencode(address)) <= _LONGEST_ADDRESS else None


@asynccontextmanager
async def controlled(control: Control, address: Path) -> AsyncIterator[None]:
    """Listen on the socket, which is its owner's alone. Raises OSError."""
    runner = web.AppRunner(control.app(), access_log=None, shutdown_timeout=0.05, handle_signals=False)
    await runner.setup()
    try:
        await web.UnixSite(runner, address).start()  # takes the place of one that a killed service left
        os.chmod(address, 0o600)  # noqa: PTH101 - one system call; its directory is private already
        yield
    finally:
        await runner.cleanup()
        _remove(address)


def _remove(address: Path) -> None:
    with suppress(OSError):
        address.unlink(missing_ok=True)
