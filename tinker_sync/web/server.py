"""HTTP: `/healthz`, `/readyz`, `/metrics`, `/status.json`, and the page. It answers GET and HEAD, and changes nothing.

On loopback a request must name a loopback host (so that no web site can read it through a name that it points here);
anywhere else, and wherever a token is set, a request must carry the token: `Authorization: Bearer …`, or as the password
that a browser asks for. `/healthz` is open, and says nothing but that the process answers.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
import json
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import jinja2
import structlog
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from tinker_sync.errors import TinkerSyncError, place_of
from tinker_sync.overview import is_full
from tinker_sync.web import words
from tinker_sync.web.metrics import Metrics, age
from tinker_sync.web.views import STATES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from datetime import timedelta

    from tinker_sync.ports import Clock
    from tinker_sync.web.views import Views

log = structlog.get_logger()

CONNECTIONS_MOST: Final = 64
CONNECTION_LIFE: Final = 60.0
"""Seconds; a browser or a scraper opens another."""
KEEP_ALIVE: Final = 15.0
_TEMPLATES: Final = Path(__file__).parent / "templates"
_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}


class StatusSite:
    """The routes."""

    def __init__(
        self, views: Views, *, clock: Clock, version: str, token: str | None, recent: Callable[[], timedelta]
    ) -> None:
        self._views = views
        self._clock = clock
        self._token = token
        self._recent = recent
        self._metrics = Metrics(views.activity, views.vitals, version=version)
        self._version = version
        self._pages = jinja2.Environment(
            loader=jinja2.FileSystemLoader(_TEMPLATES),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._pages.filters |= words.FILTERS
        style, script = ((_TEMPLATES / name).read_text() for name in ("page.css", "page.js"))
        self._assets = {"style": style, "script": script}
        self._policy = (
            f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )

    def app(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(middlewares=[self._guard])
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._metrics_text)
        app.router.add_get("/status.json", self._status)
        app.router.add_get("/", self._page)
        app.router.add_get("/runs/{run_id:[^/]+}", self._run)
        return app

    # Who may ask

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            answer: web.StreamResponse = self._refusal(request) or await handler(request)
        except web.HTTPException as error:
            answer = web.Response(
                status=error.status, text=f"{error.status}: {error.reason}\n", headers=_allowed(error)
            )
        except TinkerSyncError as error:
            answer = web.Response(status=503, text=f"{error}\n")
        except Exception as error:  # noqa: BLE001 - the page's bug is no trouble of the mirror
            log.error(  # noqa: TRY400 - a traceback would show variables
                "status.failed", path=request.path, error=type(error).__name__, at=place_of(error)
            )
            answer = web.Response(status=500, text="500: this page has a bug, and the log says where\n")
        answer.headers.update(_HEADERS)
        return answer

    def _refusal(self, request: web.Request) -> web.Response | None:
        if request.path == "/healthz":
            return None
        if self._token is not None:
            if _carries(request, self._token):
                return None
            challenge = {"WWW-Authenticate": 'Basic realm="tinker-sync (any name, the token as password)"'}
            return web.Response(status=401, text="a token is needed: [status] token_file\n", headers=challenge)
        if _names_loopback(request.host):
            return None
        message = f"asked for {request.host!r}: without [status] token_file only loopback names are answered\n"
        return web.Response(status=421, text=message)

    # Probes and machines

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.Response(text="alive\n")

    async def _readyz(self, _: web.Request) -> web.Response:
        problems = await self._problems()
        return web.json_response({"ready": not problems, "problems": problems}, status=503 if problems else 200)

    async def _problems(self) -> list[str]:
        """Why it is not ready: credential, last listing, disk."""
        vitals, problems = self._views.vitals, []
        if vitals.credential_works is False:
            problems.append("the service refuses the credential")
        silent = age(vitals.listed_at, self._clock.now())
        if silent is None:
            problems.append("the account was not listed completely yet")
        elif silent > self._recent().total_seconds():
            problems.append(f"the account was last listed completely {silent:.0f} s ago")
        if is_full(await self._views.document()):
            problems.append("the disk has less room than [mirror] min_free")
        return problems

    async def _metrics_text(self, _: web.Request) -> web.Response:
        state = await self._views.state()
        body = self._metrics.render(state, waiting=state["service"]["waiting"], tasks=len(asyncio.all_tasks()))
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _status(self, _: web.Request) -> web.Response:
        return web.json_response(
            await self._views.state(), dumps=lambda document: json.dumps(document, indent=2) + "\n"
        )

    # People

    async def _page(self, request: web.Request) -> web.Response:
        model = await self._views.page(_number(request))
        return self._rendered("page.html", model=model, legend=STATES, base="")

    async def _run(self, request: web.Request) -> web.Response:
        model = await self._views.run(request.match_info["run_id"], _number(request))
        if model is None:
            raise web.HTTPNotFound
        return self._rendered("run.html", model=model, base="../")

    def _rendered(self, template: str, **values: object) -> web.Response:
        text = self._pages.get_template(template).render(
            **values, **self._assets, now=self._clock.now(), version=self._version
        )
        answer = web.Response(text=text, content_type="text/html", charset="utf-8")
        answer.headers["Content-Security-Policy"] = self._policy
        answer.enable_compression()
        return answer


@asynccontextmanager
async def listening(site: StatusSite, host: str, port: int) -> AsyncIterator[str]:
    """Answer on this address; gives the URL, with the port that it really is. Raises OSError."""
    runner = web.AppRunner(
        site.app(), access_log=None, shutdown_timeout=0.05, handle_signals=False, keepalive_timeout=KEEP_ALIVE
    )
    await runner.setup()
    connections: set[_Gate] = set()
    server = None
    try:
        answer = runner.server
        assert answer is not None  # noqa: S101 - it was set up
        server = await asyncio.get_running_loop().create_server(lambda: _Gate(answer(), connections), host, port)
        bound = server.sockets[0].getsockname()
        shown = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
        yield f"http://{shown}:{bound[1]}/"
    finally:
        if server is not None:
            server.close()
        await runner.cleanup()


class _Gate(asyncio.Protocol):
    """One connection to the page: at most so many at a time, and none for long, whatever comes over it.

    aiohttp waits for ever for a request that somebody began, and descriptors are needed for mirroring.
    """

    def __init__(self, inner: asyncio.Protocol, others: set[_Gate]) -> None:
        self._inner = inner
        self._others = others
        self._end: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if len(self._others) >= CONNECTIONS_MOST:
            transport.close()
            return
        self._others.add(self)
        self._end = asyncio.get_running_loop().call_later(CONNECTION_LIFE, transport.close)
        self._inner.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._end is not None:
            self._end.cancel()
            self._others.discard(self)
            self._inner.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._end is not None:
            self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received() if self._end is not None else None

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _number(request: web.Request) -> int:
    text = request.query.get("page", "1")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 9 else 1


def _allowed(error: web.HTTPException) -> dict[str, str]:
    return {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}


def _carries(request: web.Request, token: str) -> bool:
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "basic":
        try:
            given = base64.b64decode(given.strip(), validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return False
    elif scheme.lower() != "bearer":
        return False
    return hmac.compare_digest(given.strip().encode(), token.encode())


def _names_loopback(host: str) -> bool:
    name = host.rpartition(":")[0] if ":" in host.rpartition("]")[2] else host
    name = name.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
