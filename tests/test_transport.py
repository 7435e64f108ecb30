"""The two HTTP clients: exact URLs, no leaks, honest ends, retries by the rules, life after cancellation."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from tests.test_listing import KeyOnly
from tinker_sync.api.client import RestClient
from tinker_sync.errors import (
    AlreadySo,
    BadIdentifier,
    BillingBlocked,
    ConfigInvalid,
    CredentialRefused,
    NotAllowed,
    NotFound,
    NotServed,
    NotTransferable,
    Overloaded,
    ProtocolBroken,
    StorageTrouble,
    Unreachable,
)
from tinker_sync.model.paths import SignedUrl
from tinker_sync.sandbox import Fault, Sandbox
from tinker_sync.transport import Answer, ApiTransport, StorageTransport, retry_after

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

Handler = "Callable[[web.Request], Awaitable[web.StreamResponse]]"


@asynccontextmanager
async def serving(handler: Any, context: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """A server of one handler; gives its origin."""
    app = web.Application()
    app.router.add_route("*", "/{rest:.*}", handler)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.05)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    scheme = "http" if context is None else "https"
    try:
        yield f"{scheme}://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def body_of(storage: StorageTransport, url: str) -> bytes:
    """Everything that one GET brings."""
    async with storage.open(SignedUrl(url)) as body:
        return b"".join([chunk async for chunk in body.chunks()])


NAMES = [
    "000020",
    "000020#old",
    "x?y=1",
    "%41",
    "a b",
    "caf\u00e9",
    "..a",
    "~tilde",
    "a+b",
    "a;b,c",
    "\u202e",
    "a'b(c)*!",
]


@pytest.mark.parametrize("name", NAMES)
async def test_a_name_arrives_as_it_is_meant(sandbox: Sandbox, name: str) -> None:
    """The raw path decodes to the name, whatever is in it; nothing else is deleted."""
    run = sandbox.account.add_run("39aa5eb2:train:0")
    meant = sandbox.account.add(run, name)
    other = sandbox.account.add(run, name.split("#", maxsplit=1)[0].split("?", maxsplit=1)[0] + "-other")
    async with ApiTransport(sandbox.base_url, KeyOnly(sandbox.key)) as transport:
        await RestClient(transport).delete_checkpoint_from_tinker_path(str(meant.path))
    assert sandbox.account.deleted == [meant.path]
    assert other.path in sandbox.account.checkpoints
    assert "/39aa5eb2:train:0/checkpoints/weights/" in sandbox.requests[-1][1]


@pytest.mark.parametrize("name", [".", ".."])
async def test_dots_are_never_put_into_a_url(sandbox: Sandbox, name: str) -> None:
    """`weights/..` would delete from the wrong level: nothing is sent."""
    async with ApiTransport(sandbox.base_url, KeyOnly(sandbox.key)) as transport:
        with pytest.raises(BadIdentifier, match="never put into a URL"):
            await RestClient(transport).delete_checkpoint("run", f"weights/{name}")
    assert sandbox.requests == []


async def test_the_base_url_keeps_its_prefix() -> None:
    """Joined, never replaced; a slash at its end changes nothing."""
    seen: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append(request.raw_path)
        return web.json_response({"checkpoints": []})

    async with serving(handler) as origin:
        for base in (f"{origin}/services/tinker-prod", f"{origin}/services/tinker-prod/"):
            async with ApiTransport(base, KeyOnly("k")) as transport:
                await RestClient(transport).list_user_checkpoints(limit=5)
    assert seen == ["/services/tinker-prod/api/v1/checkpoints?limit=5&offset=0"] * 2


@pytest.mark.parametrize(
    "base", ["ftp://x", "nonsense", "https://", "https://u:p@h/x", "https://h/?q=1", "https://h/#f"]
)
def test_a_base_url_that_is_none_is_refused(base: str) -> None:
    """In words, before anything is sent; a password in it is not shown."""
    with pytest.raises(ConfigInvalid, match="base_url"):
        ApiTransport(base, None)


async def test_the_credential_never_follows_a_redirect(sandbox: Sandbox) -> None:
    """The API client does not follow; the storage client has no key, and follows with none."""
    seen: list[dict[str, str]] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        seen.append(dict(request.headers))
        return web.Response(body=b"bytes")

    async with serving(handler) as elsewhere:

        async def redirect(_: web.Request) -> web.StreamResponse:
            return web.Response(status=302, headers={"Location": f"{elsewhere}/x?sig=1", "Set-Cookie": "sid=1"})

        async with serving(redirect) as origin, ApiTransport(origin, KeyOnly("tml-secret")) as transport:
            with pytest.raises(ProtocolBroken, match=r"a redirect to 127\.0\.0\.1"):
                await transport.call("DELETE", ("api", "v1", "x"))
            assert seen == []
            async with StorageTransport() as storage:
                assert await body_of(storage, f"{origin}/a") == b"bytes"
                await body_of(storage, f"{elsewhere}/b")
    assert len(seen) == 2
    for headers in seen:
        assert "tml-secret" not in str(headers)
        assert "Cookie" not in headers
        assert headers["Accept-Encoding"] == "identity"


async def test_a_signed_query_goes_out_as_it_was_signed() -> None:
    """`%20`, `+`, `%2F`, `%7E` and lower-case hex stay: any other spelling breaks the signature."""
    seen: list[str] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        seen.append(request.raw_path)
        return web.Response(body=b"x")

    raw = "/bucket/a%2Fb%7Ec%e2%82%ac?X-Sig=a%2Fb%20c+d%2Be&name=%22x%22&p=a:b"
    async with serving(handler) as origin, StorageTransport() as storage:
        await body_of(storage, origin + raw)
    assert seen == [raw]


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://x", "javascript:1"])
async def test_storage_follows_http_alone(location: str) -> None:
    """A redirect to anything else is refused in words."""

    async def redirect(_: web.Request) -> web.StreamResponse:
        return web.Response(status=302, headers={"Location": location})

    async with serving(redirect) as origin, StorageTransport() as storage:
        with pytest.raises(NotTransferable, match="not followed"):
            await body_of(storage, origin)
        with pytest.raises(NotTransferable):
            await body_of(storage, location)


async def test_a_redirect_of_the_listing_to_what_is_no_url_is_words() -> None:
    """Not even a broken `Location` on an ordinary call is a traceback."""

    async def redirect(_: web.Request) -> web.StreamResponse:
        return web.Response(status=302, headers={"Location": "http://[bad"})

    async with serving(redirect) as origin, ApiTransport(origin, None) as transport:
        with pytest.raises(ProtocolBroken, match="a redirect to nowhere"):
            await RestClient(transport).list_user_checkpoints()


async def test_a_redirect_loop_ends() -> None:
    """A few hops, then words."""

    async def redirect(request: web.Request) -> web.StreamResponse:
        return web.Response(status=302, headers={"Location": request.path})

    async with serving(redirect) as origin, StorageTransport() as storage:
        with pytest.raises(StorageTrouble, match="redirects more than"):
            await body_of(storage, origin)


@pytest.mark.parametrize(
    ("kind", "said"),
    [("cut", "was cut after"), ("stall", "stalled"), ("bad-chunk", "cut|stalled"), ("drop", "cannot be reached|cut")],
)
async def test_a_body_that_does_not_end_well_says_so(sandbox: Sandbox, kind: Any, said: str) -> None:
    """A cut, a silence, a broken chunk, a reset: never taken for the end, and never a hang. No URL in the words."""
    made = sandbox.account.add("r:train:0", "a")
    sandbox.faults.append(Fault("storage", kind, at=5000, seconds=5))
    async with ApiTransport(sandbox.base_url, KeyOnly(sandbox.key)) as transport:
        url = (await RestClient(transport).get_checkpoint_archive_url_from_tinker_path(str(made.path))).url
    async with StorageTransport(stall_timeout=0.5) as storage:
        with pytest.raises(StorageTrouble, match=said) as caught:
            await body_of(storage, url)
    assert "X-Sig" not in str(caught.value)
    assert caught.value.__cause__ is None


async def test_a_reset_is_not_the_end_of_a_body_without_length() -> None:
    """Close-delimited and reset: an error. Closed properly: the end, without proof."""
    import socket
    import struct

    async def handler(request: web.Request) -> web.StreamResponse:
        transport = request.transport
        assert transport is not None
        transport.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + b"x" * 1000)
        await asyncio.sleep(0.1)
        if request.path == "/reset":
            raw = transport.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()
        else:
            transport.close()
        return web.Response()

    async with serving(handler) as origin, StorageTransport() as storage:
        assert await body_of(storage, f"{origin}/end") == b"x" * 1000
        with pytest.raises(StorageTrouble):
            await body_of(storage, f"{origin}/reset")


async def test_a_reset_behind_the_end_is_nothing() -> None:
    """All that was promised is here: how the server hangs up does not matter."""
    import socket
    import struct

    async def handler(request: web.Request) -> web.StreamResponse:
        transport = request.transport
        assert transport is not None
        ends = (
            b"Transfer-Encoding: chunked\r\n\r\n3e8\r\n"
            if request.path == "/chunked"
            else b"Content-Length: 1000\r\n\r\n"
        )
        rest = b"\r\n0\r\n\r\n" if request.path == "/chunked" else b""
        transport.write(b"HTTP/1.1 200 OK\r\n" + ends + b"x" * 500)
        await asyncio.sleep(0.05)
        transport.write(b"x" * 500 + rest)
        await asyncio.sleep(0.05)
        raw = transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
        return web.Response()

    async with serving(handler) as origin, StorageTransport() as storage:
        for path in ("length", "chunked"):
            async with storage.open(SignedUrl(f"{origin}/{path}")) as body:
                await asyncio.sleep(0.2)  # the reset is here before the last byte is read
                assert b"".join([chunk async for chunk in body.chunks()]) == b"x" * 1000


async def test_ten_thousand_cancelled_requests_leave_a_healthy_pool() -> None:
    """Deadlines, stalls and reloads all cancel: afterwards a pool of 8 still gives 8 answers."""

    async def handler(request: web.Request) -> web.StreamResponse:
        if request.path == "/slow":
            await asyncio.sleep(30)
        return web.Response(body=b"good")

    async with serving(handler) as origin, StorageTransport(connections=8) as storage:

        async def cancelled() -> None:
            task = asyncio.create_task(body_of(storage, f"{origin}/slow"))
            await asyncio.sleep(0)
            await asyncio.sleep(0.0005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        for _ in range(100):
            await asyncio.gather(*(cancelled() for _ in range(100)))
        async with asyncio.timeout(20):
            assert await asyncio.gather(*(body_of(storage, f"{origin}/x") for _ in range(8))) == [b"good"] * 8


def counting(statuses: list[int], headers: dict[str, str] | None = None) -> tuple[list[float], Any]:
    """A handler that answers with these statuses, then 200; and the times at which it was asked."""
    times: list[float] = []

    async def handler(_: web.Request) -> web.StreamResponse:
        times.append(asyncio.get_running_loop().time())
        if statuses:
            return web.json_response({"detail": "told to"}, status=statuses.pop(0), headers=headers)
        return web.json_response({"checkpoints": []})

    return times, handler


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503])
async def test_passing_trouble_is_tried_again(status: int) -> None:
    """The SDK's statuses, with its delay: half a second first."""
    times, handler = counting([status])
    async with serving(handler) as origin, ApiTransport(origin, None) as transport:
        await RestClient(transport).list_user_checkpoints()
    assert len(times) == 2
    assert times[1] - times[0] > 0.3


async def test_what_the_server_asks_for_is_done() -> None:
    """`x-should-retry` and `retry-after-ms` rule; an empty 400 is the CDN's and tried again."""
    times, handler = counting([500], {"x-should-retry": "false"})
    async with serving(handler) as origin, ApiTransport(origin, None) as transport:
        with pytest.raises(Overloaded):
            await RestClient(transport).list_user_checkpoints()
    assert len(times) == 1
    times, handler = counting([404], {"x-should-retry": "true", "retry-after-ms": "50"})
    async with serving(handler) as origin, ApiTransport(origin, None) as transport:
        await RestClient(transport).list_user_checkpoints()
    assert times[1] - times[0] < 0.4

    asked = []

    async def cdn(_: web.Request) -> web.StreamResponse:
        asked.append(1)
        return web.Response(status=400) if len(asked) == 1 else web.json_response({"checkpoints": []})

    async with serving(cdn) as origin, ApiTransport(origin, None) as transport:
        await RestClient(transport).list_user_checkpoints()
    assert len(asked) == 2


def test_retry_after_in_all_its_spellings() -> None:
    """Milliseconds, seconds, an HTTP date; over 60 seconds or nonsense counts nothing."""
    assert retry_after({"retry-after-ms": "1500"}) == 1.5
    assert retry_after({"retry-after": "7"}) == 7
    assert retry_after({"retry-after": "61"}) is None
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) is None
    assert retry_after({}) is None


@pytest.mark.parametrize(
    ("status", "error", "advice"),
    [
        (400, BadIdentifier, ""),
        (401, CredentialRefused, "TINKER_API_KEY"),
        (402, BillingBlocked, "billing"),
        (403, NotAllowed, "key of the owner"),
        (404, NotFound, "not yours"),
        (405, NotServed, "does not offer"),
        (410, NotServed, ""),
        (501, NotServed, ""),
        (422, BadIdentifier, ""),
        (500, Overloaded, "in trouble"),
        (429, Overloaded, ""),
    ],
)
async def test_every_status_says_what_to_do(status: int, error: type[Exception], advice: str) -> None:
    """One error for each thing that the caller does about it, with the server's own words."""

    async def handler(_: web.Request) -> web.StreamResponse:
        return web.json_response({"detail": "the server's words"}, status=status, headers={"x-should-retry": "false"})

    async with serving(handler) as origin, ApiTransport(origin, None) as transport:
        with pytest.raises(error, match="the server's words") as caught:
            await RestClient(transport).list_user_checkpoints()
    assert advice in str(caught.value)


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        (b'{"detail": "no\\nsuch"}', "no such"),
        (b'{"detail": [{"msg": "a", "loc": []}, {"msg": "b"}]}', "a; b"),
        (b'{"detail": {"message": "m"}}', "m"),
        (b"<html><body>502</body></html>", ""),
        (b"plain\x1b[31m words", "plain[31m words"),
        (b"", ""),
        (b"[1]", "1"),
        (b"\xff\xfe", "\ufffd\ufffd"),
    ],
)
def test_detail_in_all_its_shapes(content: bytes, detail: str) -> None:
    """A string, a list of objects, HTML, nothing: one printable line."""
    assert Answer(500, {}, content).detail == detail


async def test_a_call_has_a_deadline() -> None:
    """A server that accepts and says nothing, or answers without end, does not hold a caller."""

    async def silent(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(30)
        return web.Response()

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        for _ in range(300):
            await response.write(b" ")
            await asyncio.sleep(0.1)
        return response

    for handler in (silent, endless):
        async with serving(handler) as origin, ApiTransport(origin, None, timeout=0.4) as transport:
            begun = asyncio.get_running_loop().time()
            with pytest.raises(Unreachable):
                await RestClient(transport).list_user_checkpoints()
            assert asyncio.get_running_loop().time() - begun < 5


async def test_an_answer_of_another_shape_is_said_to_be_one() -> None:
    """No JSON, or other JSON: the words ask whether base_url is right."""

    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(text="<html>" if "runs" in request.path else '{"a": 1}', content_type="application/json")

    async with serving(handler) as origin, ApiTransport(origin, None) as transport:
        with pytest.raises(ProtocolBroken, match="base_url"):
            await RestClient(transport).list_training_runs()
        with pytest.raises(ProtocolBroken, match="checkpoints"):
            await RestClient(transport).list_user_checkpoints()


async def test_a_cut_answer_is_asked_for_again() -> None:
    """Half an answer is no answer: one more request, within the same deadline."""
    asked = []

    async def handler(request: web.Request) -> web.StreamResponse:
        asked.append(1)
        response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": "20"})
        await response.prepare(request)
        await response.write(b'{"checkpoints":')
        if len(asked) == 1:
            assert request.transport is not None
            request.transport.abort()
        else:
            await response.write(b" [] }")
        return response

    async with serving(handler) as origin, ApiTransport(origin, None) as transport:
        await RestClient(transport).list_user_checkpoints()
    assert len(asked) == 2


async def test_publish_says_already_so(sandbox: Sandbox) -> None:
    """409 there is no conflict to wait for, and one request is enough to know."""
    made = sandbox.account.add("r:train:0", "a")
    async with ApiTransport(sandbox.base_url, KeyOnly(sandbox.key)) as transport:
        client = RestClient(transport)
        await client.publish_checkpoint_from_tinker_path(str(made.path))
        with pytest.raises(AlreadySo, match="public already"):
            await client.publish_checkpoint_from_tinker_path(str(made.path))
        await client.unpublish_checkpoint_from_tinker_path(str(made.path))
        assert transport.requests == 3


async def test_a_custom_ca_and_proxy_variables_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SSL_CERT_FILE is honoured, an untrusted certificate is named as such, and HTTP_PROXY is used."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    async def handler(_: web.Request) -> web.StreamResponse:
        return web.json_response({"checkpoints": []})

    async with serving(handler, context) as origin:
        async with ApiTransport(origin, None, timeout=2) as transport:
            with pytest.raises(Unreachable, match="not trusted"):
                await RestClient(transport).list_user_checkpoints()
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        async with ApiTransport(origin, None, timeout=2) as transport:
            await RestClient(transport).list_user_checkpoints()
    monkeypatch.delenv("SSL_CERT_FILE")

    seen: list[str] = []

    async def proxy(request: web.Request) -> web.StreamResponse:
        seen.append(str(request.url))
        return web.json_response({"checkpoints": []})

    async with serving(proxy) as origin:
        monkeypatch.setenv("HTTP_PROXY", origin)
        async with ApiTransport("http://tinker.invalid/x", None, timeout=2) as transport:
            await RestClient(transport).list_user_checkpoints()
    assert "tinker.invalid" in seen[0]
