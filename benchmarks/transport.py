"""HTTP clients side by side: what they cost, and whether they do what a mirror that runs for months needs.

    python benchmarks/transport.py [--size MB] [--requests N] [--rounds N] [--cancelled N]

Every figure comes from a process of its own. The speed is that of one large file, streamed and dropped, and of small GETs
on 8 connections, over TLS from nginx on loopback; rounds alternate. What is yes or no is tried, not read: cancelled
requests and a stalling server with aiohttp's server in the client's own loop, the proxy with one that counts its
CONNECTs. Clients are opened as they come, but for the limit of 8 connections and the read timeout.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import aiohttp
import httpx
from aiohttp import web
from httpx_aiohttp import HttpxAiohttpClient
from origin import Origin, program, version
from table import show

from tinker_sync.model.paths import SignedUrl
from tinker_sync.transport import StorageTransport

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    Fetch = Callable[[str], Awaitable[int]]

MB = 1_000_000
CONNECTIONS = 8
SMALL = 4096
LONGEST = 180.0
"""Seconds that one trial may take."""
GOOD_WITHIN = 20.0
"""Seconds that the good requests after the cancelled ones may take."""


class RefusedError(Exception):
    """Not a 200."""


# The clients: each gives a function that fetches a URL, drops what comes, and says how much it was


@asynccontextmanager
async def like_httpx(module: Any, client: Any, read: float) -> AsyncIterator[Fetch]:
    """What has httpx's interface."""
    timeout = module.Timeout(connect=20.0, read=read, write=read, pool=None)
    limits = module.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
    async with client(limits=limits, timeout=timeout) as opened:

        async def fetch(url: str) -> int:
            async with opened.stream("GET", url) as answer:
                _expect(answer.status_code)
                return sum([len(chunk) async for chunk in answer.aiter_raw()])

        yield fetch


@asynccontextmanager
async def ours(read: float) -> AsyncIterator[Fetch]:
    """As tinker-sync fetches signed URLs."""
    async with StorageTransport(connections=CONNECTIONS, stall_timeout=read) as storage:

        async def fetch(url: str) -> int:
            async with storage.open(SignedUrl(url)) as body:
                return sum([len(chunk) async for chunk in body.chunks()])

        yield fetch


@asynccontextmanager
async def plain_aiohttp(read: float) -> AsyncIterator[Fetch]:
    """The session of aiohttp itself."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=20.0, sock_read=read)
    connector = aiohttp.TCPConnector(limit=CONNECTIONS)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def fetch(url: str) -> int:
            async with session.get(url) as answer:
                _expect(answer.status)
                return sum([len(chunk) async for chunk in answer.content.iter_any()])

        yield fetch


def _expect(status: int) -> None:
    if status != 200:
        raise RefusedError(status)


def _httpx2(read: float) -> contextlib.AbstractAsyncContextManager[Fetch]:
    module = importlib.import_module("httpx2")
    return like_httpx(module, module.AsyncClient, read)


CLIENTS: dict[str, Callable[[float], contextlib.AbstractAsyncContextManager[Fetch]]] = {
    "httpx": lambda read: like_httpx(httpx, httpx.AsyncClient, read),
    "httpx2": _httpx2,
    "httpx-aiohttp": lambda read: like_httpx(httpx, HttpxAiohttpClient, read),
    "tinker-sync": ours,
    "aiohttp": plain_aiohttp,
}


# The trials: each runs in a process of its own and prints one JSON document


async def stream(name: str, url: str, _: int) -> dict[str, float]:
    """One large file."""
    async with CLIENTS[name](60.0) as fetch:
        return await _timed(fetch(f"{url}/large"))


async def small(name: str, url: str, count: int) -> dict[str, float]:
    """Many small ones, as many at a time as there are connections."""
    left = iter(range(count))
    async with CLIENTS[name](60.0) as fetch:

        async def worker() -> int:
            return sum([await fetch(f"{url}/small") for _ in left])

        async def everything() -> int:
            return sum(await asyncio.gather(*(worker() for _ in range(CONNECTIONS))))

        return await _timed(everything())


async def _timed(work: Awaitable[int]) -> dict[str, float]:
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
    received = await work
    wall, after = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": wall, "cpu": cpu, "bytes": received}


async def cancelled(name: str, _: str, count: int) -> dict[str, str]:
    """Requests that end at any moment, then as many good ones as there are connections."""
    chance = random.Random(1)
    async with _serving(_sometimes_slow) as origin, CLIENTS[name](60.0) as fetch:

        async def one() -> None:
            task = asyncio.ensure_future(fetch(f"{origin}/slow"))
            await asyncio.sleep(chance.choice((0, 0.0005, 0.001, 0.002)))
            task.cancel()
            await asyncio.wait([task])

        try:
            async with asyncio.timeout(LONGEST * 0.75):
                for _ in range(count // 100):
                    await asyncio.gather(*(one() for _ in range(100)))
        except TimeoutError:
            return {"verdict": "NO: cancelling itself hangs"}
        good = [asyncio.ensure_future(fetch(f"{origin}/good")) for _ in range(CONNECTIONS)]
        done, _ = await asyncio.wait(good, timeout=GOOD_WITHIN)
        whole = sum(1 for task in done if task.exception() is None and task.result() == 4)
        for task in good:
            task.cancel()
    return {"verdict": "yes" if whole == CONNECTIONS else f"NO: {whole} of {CONNECTIONS} good ones answered"}


async def proxied(name: str, url: str, _: int) -> dict[str, str]:
    """HTTPS_PROXY, seen from the proxy."""
    seen: list[bytes] = []
    server = await asyncio.start_server(lambda reader, writer: _tunnel(reader, writer, seen), "127.0.0.1", 0)
    os.environ["HTTPS_PROXY"] = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        async with CLIENTS[name](10.0) as fetch:
            received = await fetch(f"{url}/small")
    finally:
        server.close()
    return {"verdict": "yes" if seen and received == SMALL else "NO: it went straight there"}


async def trusted(name: str, url: str, _: int) -> dict[str, str]:
    """The authority that SSL_CERT_FILE names, and none without it."""
    async with CLIENTS[name](10.0) as fetch:
        with_it = await fetch(f"{url}/small") == SMALL
    return {"verdict": "yes" if with_it else "NO"}


async def stalled(name: str, _: str, __: int) -> dict[str, str]:
    """A server that sends half and then nothing, with a read timeout of one second."""
    async with _serving(_stalling) as origin, CLIENTS[name](1.0) as fetch:
        begun = time.monotonic()
        task = asyncio.ensure_future(fetch(origin))
        done, _ = await asyncio.wait([task], timeout=10)
        waited = time.monotonic() - begun
        if not done:
            task.cancel()
            return {"verdict": "NO: not within 10 s"}
        error = task.exception()
    return {"verdict": "NO: taken for the end" if error is None else f"yes, {waited:.1f} s"}


TRIALS: dict[str, Callable[[str, str, int], Awaitable[dict[str, Any]]]] = {
    trial.__name__: trial for trial in (stream, small, cancelled, proxied, trusted, stalled)
}


# The other ends


@asynccontextmanager
async def _serving(handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_route("*", "/{rest:.*}", handler)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.05, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def _sometimes_slow(request: web.Request) -> web.StreamResponse:
    if request.path == "/slow":
        await asyncio.sleep(30)
    return web.Response(body=b"good")


async def _stalling(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "1000"})
    await response.prepare(request)
    await response.write(bytes(500))
    await asyncio.sleep(30)
    return response


async def _tunnel(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seen: list[bytes]) -> None:
    """One CONNECT, noted and done."""
    line = (await reader.readuntil(b"\r\n\r\n")).partition(b"\r\n")[0]
    method, target, _ = line.split()
    if method == b"CONNECT":
        seen.append(target)
        host, _, port = target.decode().rpartition(":")
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await asyncio.gather(_pour(reader, far_writer), _pour(far_reader, writer))
    writer.close()


async def _pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


# All of it


def tried(name: str, trial: str, url: str, count: int, variables: dict[str, str]) -> dict[str, Any]:
    """One trial in a process of its own; an error's name where it ends with one."""
    kept = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    kept = {key: value for key, value in kept.items() if not key.startswith("SSL_CERT_")}
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", __file__, "--one", name, trial, url, str(count)],
            env={**kept, **variables},
            capture_output=True,
            text=True,
            timeout=LONGEST,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"verdict": f"NO: not done after {LONGEST:g} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        return {"verdict": f"NO: {last.partition(':')[0].rpartition('.')[2]}"}
    return json.loads(done.stdout)


def honours_the_authority(name: str, url: str, variables: dict[str, str]) -> str:
    """With SSL_CERT_FILE it must work, and without it must not."""
    without = tried(name, "trusted", url, 0, {})["verdict"]
    if without == "yes":
        return "NO: trusts anybody"
    return tried(name, "trusted", url, 0, variables)["verdict"]


def speeds(names: list[str], url: str, options: argparse.Namespace, variables: dict[str, str]) -> dict[str, list[str]]:
    """MB/s, CPU ms per MB, requests/s, CPU ms per request: medians of the rounds."""
    taken: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for turn in range(options.rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            for trial in ("stream", "small"):
                taken.setdefault((name, trial), []).append(tried(name, trial, url, options.requests, variables))
    return {name: _figures(taken[name, "stream"], taken[name, "small"], options) for name in names}


def _figures(streams: list[dict[str, Any]], smalls: list[dict[str, Any]], options: argparse.Namespace) -> list[str]:
    failed = next((run["verdict"] for run in streams + smalls if "verdict" in run), None)
    if failed is not None:
        return [failed, "", "", ""]
    large, count = options.size, options.requests
    if any(run["bytes"] != large * MB for run in streams) or any(run["bytes"] != count * SMALL for run in smalls):
        return ["NO: bytes are missing", "", "", ""]
    return [
        f"{large / statistics.median(run['wall'] for run in streams):,.0f}",
        f"{1000 * statistics.median(run['cpu'] for run in streams) / large:.2f}",
        f"{count / statistics.median(run['wall'] for run in smalls):,.0f}",
        f"{1000 * statistics.median(run['cpu'] for run in smalls) / count:.2f}",
    ]


def compare(options: argparse.Namespace) -> None:
    """All clients that are installed."""
    names = [name for name in CLIENTS if name != "httpx2" or importlib.util.find_spec("httpx2")]
    if "httpx2" not in names:
        print("httpx2: skipped, not installed")
    with Origin(room=options.size * MB) as origin:
        block = os.urandom(MB)
        with (origin.content / "large").open("wb") as file:
            file.writelines(block for _ in range(options.size))
        (origin.content / "small").write_bytes(block[:SMALL])
        variables = {"SSL_CERT_FILE": str(origin.ca)}
        rows = speeds(names, origin.url, options, variables)
        for name, row in rows.items():
            row.append(tried(name, "cancelled", origin.url, options.cancelled, variables)["verdict"])
            row.append(tried(name, "proxied", origin.url, 0, variables)["verdict"])
            row.append(honours_the_authority(name, origin.url, variables))
            row.append(tried(name, "stalled", origin.url, 0, variables)["verdict"])
    heads = ["", "MB/s", "CPU ms/MB", "GET/s", "CPU ms/GET", f"after {options.cancelled:,} cancelled"]
    heads += ["HTTPS_PROXY", "SSL_CERT_FILE", "read timeout of 1 s"]
    show(heads, [[name, *row] for name, row in rows.items()])


def main() -> None:
    """The table; or one trial, for itself."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=512, metavar="MB")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cancelled", type=int, default=10_000)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, trial, url, count = options.one
        print(json.dumps(asyncio.run(TRIALS[trial](name, url, int(count)))))
        return
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}", end=", ")
    print(f"{version(program('nginx') or 'nginx', '-v')}; {', '.join(_versions())}")
    compare(options)


def _versions() -> list[str]:
    found = [name for name in ("httpx", "httpx2", "httpx-aiohttp", "aiohttp") if _installed(name)]
    return [f"{name} {importlib.metadata.version(name)}" for name in found]


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
