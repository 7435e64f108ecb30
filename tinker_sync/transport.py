"""The two HTTP clients.

One carries the credential, goes only to the API host and follows no redirect; the other fetches signed URLs and never
sees the credential.

httpx is the interface, aiohttp the engine under it: httpx's own pool does not survive thousands of cancelled requests
(httpcore #1093), and deadlines, stalls and reloads all cancel. URLs go out exactly as they are written: aiohttp would
requote them otherwise, which breaks signatures (`%20` in a query becomes `+`).

Exceptions of httpx, aiohttp and tenacity stop here.
"""

from __future__ import annotations

import asyncio
import email.utils
import functools
import http.cookiejar
import json
import logging
import os
import random
import re
import socket
import ssl
import time
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol, Self, TypeVar
from urllib.parse import quote, unquote_to_bytes

import aiohttp
import aiohttp.http_exceptions
import httpx
import tenacity
import yarl
from httpx_aiohttp import AiohttpTransport, HttpxAiohttpClient

from tinker_sync import errors
from tinker_sync.model.paths import SignedUrl

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence

    from tinker_sync.model.evidence import Span

T = TypeVar("T")

MAX_ANSWER: Final = 64 * 1024 * 1024
"""The most that is read of an answer of the API, in bytes."""
ATTEMPTS: Final = 5
RETRY_AFTER_MOST: Final = 60.0
_BUFFER: Final = 128 * 1024
"""Bytes that a connection reads ahead, twice that at the most."""
_REDIRECTS: Final = 5
_ROUTE_WORDS: Final = frozenset(
    (
        "archive", "auth", "checkpoints", "client", "config", "external_weights_upload_finish",
        "external_weights_upload_start", "external_weights_urls", "get_server_capabilities", "publish", "samplers",
        "sessions", "storage_usage", "token", "training_runs", "ttl", "usage", "weights_info",
    )
)  # fmt: skip
"""What makes a route, without the ids: a note about one is logged once."""
_LOCATION: Final = b"x-location-not-followed"
_RETRIED: Final = frozenset({408, 409, 429})


class Authorizer(Protocol):
    """Where the credential comes from; see `api.credentials`."""

    async def headers(self) -> Mapping[str, str]:
        """The headers that authorise a request. Raises CredentialMissing, CredentialRefused."""
        ...

    async def renew(self, used: Mapping[str, str], challenge: str) -> bool:
        """After a 401: whether there is another credential now, so that the request is worth one replay."""
        ...


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer of the API: status, headers with names in lower case, and the whole body."""

    status: int
    headers: Mapping[str, str]
    content: bytes
    url: str = ""
    """What was asked, for a relative `Location`."""

    def json(self) -> Any:
        """The body as JSON. Raises ProtocolBroken."""
        try:
            return json.loads(self.content)
        except (ValueError, RecursionError) as error:
            kind = self.headers.get("content-type", "no content type")
            message = f"the service answered {self.status} with {kind} where JSON was due: is base_url right?"
            raise errors.ProtocolBroken(message) from error

    @property
    def detail(self) -> str:
        """What the service says about an error, in one line: `detail` as text, list or object; not HTML."""
        try:
            document = json.loads(self.content)
        except (ValueError, RecursionError):
            text = self.content[:300].decode(errors="replace").strip()
            return "" if text.startswith("<") else _one_line(text)
        detail = document.get("detail", document.get("message", "")) if isinstance(document, dict) else document
        if isinstance(detail, list):
            detail = "; ".join(str(item.get("msg", item)) if isinstance(item, dict) else str(item) for item in detail)
        elif isinstance(detail, dict):
            detail = detail.get("message", detail.get("msg", json.dumps(detail)))
        return _one_line(str(detail))


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    printable = "".join(character for character in line if character.isprintable())
    return printable[:300]


class Throttle:
    """Holds everything that shares it to so many bytes per second; 0 is no limit.

    Bytes are counted when they were read, so that the kernel's buffers, and through them the sender, wait too. A pause
    earns at most a tenth of a second of credit.
    """

    _CREDIT: Final = 0.1

    def __init__(
        self,
        bytes_per_second: float,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._rate = bytes_per_second
        self._monotonic = monotonic
        self._sleep = sleep
        self._paid_until = float("-inf")

    async def take(self, size: int) -> None:
        """Wait until so many bytes may have come."""
        if not self._rate:
            return
        now = self._monotonic()
        self._paid_until = max(self._paid_until, now - self._CREDIT) + size / self._rate
        if self._paid_until > now:
            await self._sleep(self._paid_until - now)


UNLIMITED: Final = Throttle(0)


class StreamedBody:
    """A `ports.Body`: one response's bytes as they come, undecoded."""

    def __init__(self, response: httpx.Response, whence: str, throttle: Throttle = UNLIMITED) -> None:
        self._response = response
        self._whence = whence
        self._throttle = throttle
        self.status = response.status_code
        self.headers: Mapping[str, str] = {name.lower(): value for name, value in response.headers.items()}
        self.validator: str | None = None
        """One response knows of no other."""

    @property
    def ends_itself(self) -> bool:
        """Whether a length or chunking proves the end."""
        return _ends_itself(self.headers)

    async def chunks(self) -> AsyncIterator[bytes]:
        """The bytes. Raises StorageTrouble when they stop early or stall."""
        received = 0
        try:
            async for chunk in self._response.aiter_raw():
                received += len(chunk)
                await self._throttle.take(len(chunk))
                yield chunk
        except (httpx.HTTPError, httpx.StreamError, aiohttp.ClientError, OSError) as error:
            stalled = isinstance(error, httpx.TimeoutException)
            what = "stalled" if stalled else "was cut"
            message = f"the download {what} after {received:,} bytes from {self._whence} ({_reason(error)})"
            raise errors.StorageTrouble(message, stalled=stalled) from None

    async def close(self) -> None:
        """Give the connection back, or drop it when the body was not read to its end."""
        try:
            await self._response.aclose()
        except (httpx.HTTPError, aiohttp.ClientError, OSError):
            return


def _ends_itself(headers: Mapping[str, str]) -> bool:
    """Whether a length or chunking proves where a body ends, by headers with names in lower case."""
    return "content-length" in headers or "chunked" in headers.get("transfer-encoding", "").lower()


class _RawStream(httpx.AsyncByteStream):
    """A body as it comes, with an honest end: a silence longer than the read timeout and a reset are errors.

    aiohttp alone waits for ever after a malformed chunk, and takes a reset for the end of a body without length. A reset
    behind the end of a body that has one is nothing.
    """

    def __init__(self, response: aiohttp.ClientResponse, read_timeout: float | None) -> None:
        self._response = response
        self._read_timeout = read_timeout
        connection = response.connection
        protocol = None if connection is None else connection.protocol
        ends_itself = _ends_itself({name.lower(): value for name, value in response.headers.items()})
        self._closed = None if protocol is None or ends_itself else protocol.closed
        if self._closed is not None:
            # Looked at after the last byte; asyncio must not complain of it when the body ended with an error before.
            self._closed.add_done_callback(lambda future: future.cancelled() or future.exception())

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _own_errors():
            while True:
                async with asyncio.timeout(self._read_timeout):
                    chunk = await self._response.content.readany()
                if not chunk:
                    break
                yield chunk
            if self._closed is not None and self._closed.done() and not self._closed.cancelled():
                error = self._closed.exception()
                if error is not None:
                    raise error

    async def aclose(self) -> None:
        if self._response.content.at_eof():
            self._response.release()
        else:
            self._response.close()


@contextmanager
def _own_errors() -> Iterator[None]:
    """Aiohttp's exceptions as httpx's, most specific first; none of them escapes."""
    try:
        yield
    except (aiohttp.ServerTimeoutError, TimeoutError) as error:
        message = "timed out"
        raise httpx.ReadTimeout(message) from error
    except aiohttp.ClientProxyConnectionError as error:
        message = "the proxy cannot be reached"
        raise httpx.ProxyError(message) from error
    except aiohttp.ClientHttpProxyError as error:
        message = f"the proxy answered {error.status}"
        raise httpx.ProxyError(message) from error
    except aiohttp.ClientConnectorError as error:
        message = "no connection"
        raise httpx.ConnectError(message) from error
    except (aiohttp.ClientError, aiohttp.http_exceptions.HttpProcessingError, OSError) as error:
        raise httpx.RemoteProtocolError(type(error).__name__) from error


_SECRET_LEAST: Final = 6
_URLS: Final = re.compile(r"\b(https?://[^\s/?#\"'<>@]+)[/?#][^\s\"'<>]*")
_TOKENS: Final = re.compile(r"\b(?:tml-|eyJ)[\w.~+/=-]{4,}|\b(?:X-(?:Amz|Goog)-[\w-]+|X-Sig\w*|Signature)=[^\s&\"']+")


class _ExactTransport(AiohttpTransport):
    """httpx-aiohttp's transport, sending URLs as they are written and keeping no cookies.

    The session is made on first use, inside the loop.
    """

    _session: aiohttp.ClientSession | None = None
    _changing: aiohttp.ClientSession | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        timeout = request.extensions.get("timeout", {})
        content = await request.aread()
        with _own_errors():
            response = await self._opened(changes=request.method not in ("GET", "HEAD")).request(
                request.method,
                yarl.URL(str(request.url), encoded=True),
                headers=request.headers.multi_items(),
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
                data=content or None,
                allow_redirects=False,
                auto_decompress=False,
                timeout=aiohttp.ClientTimeout(
                    total=None,
                    connect=timeout.get("pool"),
                    sock_connect=timeout.get("connect"),
                    sock_read=timeout.get("read"),
                ),
                proxy=None if self.proxy is None else str(self.proxy.url),
                proxy_auth=None if self.proxy is None or self.proxy.auth is None else _basic(self.proxy.auth),
                proxy_headers=None if self.proxy is None else self.proxy.headers.multi_items() or None,
            )
        # httpx parses `Location` even where it does not follow, and fails on what is no URL: it does not see it.
        headers = [(_LOCATION if name.lower() == b"location" else name, value) for name, value in response.raw_headers]
        return httpx.Response(
            status_code=response.status,
            headers=headers,
            stream=_RawStream(response, timeout.get("read")),
            request=request,
        )

    async def aclose(self) -> None:
        for session in (self._changing, self._session):
            if session is not None:
                await session.close()
        self._session = self._changing = None

    def _opened(self, *, changes: bool) -> aiohttp.ClientSession:
        """Two sessions on the same connections.

        aiohttp sends PUT and DELETE once more by itself when a kept connection ends; what changes something is sent
        again only by those who looked first.
        """
        if self._session is None:
            connector = aiohttp.TCPConnector(
                limit=self.limits.max_connections or 0,
                ssl=self.ssl_context,
                keepalive_timeout=self.limits.keepalive_expiry or 15.0,
            )
            self._session = _session(connector, owner=True)
            self._changing = _session(connector, owner=False)
            self._changing._retry_connection = False  # noqa: SLF001 - it has no public switch; a test watches it
        return self._changing if changes and self._changing is not None else self._session


def _session(connector: aiohttp.TCPConnector, *, owner: bool) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=connector,
        connector_owner=owner,
        cookie_jar=aiohttp.DummyCookieJar(),
        read_bufsize=_BUFFER,
        max_line_size=65536,
        max_field_size=65536,
    )


def _basic(auth: tuple[str, str]) -> aiohttp.BasicAuth:
    return aiohttp.BasicAuth(auth[0], auth[1])


class _Client(HttpxAiohttpClient):
    """The client class decides about proxies from the environment; a bare `transport=` would ignore them."""

    def _init_transport(self, **options: Any) -> httpx.AsyncBaseTransport:  # type: ignore[override]
        options.pop("transport", None)
        return _ExactTransport(**options)

    def _init_proxy_transport(  # type: ignore[override]
        self, proxy: httpx.Proxy, **options: Any
    ) -> httpx.AsyncBaseTransport:
        return _ExactTransport(proxy=proxy, **options)


def _quiet() -> None:
    """Httpx logs every URL at INFO: a signed one would be in the log of whoever turns INFO on."""
    logger = logging.getLogger("httpx")
    if _drop_urls not in logger.filters:
        logger.addFilter(_drop_urls)


def _drop_urls(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING


def _make_client(*, connections: int, connect: float, read: float, user_agent: str) -> _Client:
    _quiet()
    return _Client(
        verify=ssl_context(),
        follow_redirects=False,
        cookies=http.cookiejar.CookieJar(http.cookiejar.DefaultCookiePolicy(allowed_domains=[])),
        headers={"User-Agent": user_agent, "Accept-Encoding": "identity"},
        limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=15.0),
        timeout=httpx.Timeout(connect=connect, read=read, write=read, pool=None),
    )


def ssl_context() -> ssl.SSLContext:
    """Certifi's roots, or those of `SSL_CERT_FILE` / `SSL_CERT_DIR`. Raises ConfigInvalid when these are unusable."""
    try:
        return _ssl_context(*(os.environ.get(name) for name in ("SSL_CERT_FILE", "SSL_CERT_DIR")))
    except (OSError, ssl.SSLError) as error:
        message = f"SSL_CERT_FILE or SSL_CERT_DIR cannot be used: {error}"
        raise errors.ConfigInvalid(message) from error


@functools.lru_cache(maxsize=1)
def _ssl_context(*_: str | None) -> ssl.SSLContext:
    """One for all clients: to read the roots costs 20 ms each time."""
    return httpx.create_ssl_context(trust_env=True)


@dataclass(frozen=True, slots=True)
class _Question:
    """One request of the API, before it has a credential."""

    method: str
    segments: Sequence[str]
    params: Mapping[str, str | int] | None = None
    body: object = None
    authorized: bool = True
    headers: Mapping[str, str] = field(default_factory=dict)
    final: frozenset[int] = frozenset()
    """Statuses that are an answer, and no reason to try again."""
    once: bool = False
    """Whether it is sent a single time, whatever comes of it."""


class ApiTransport:
    """Calls of the API, with the credential, retries by the SDK's rules, and a deadline for each call.

    `timeout` is for one attempt, in seconds; a call with its retries ends after twice that. Async context manager.
    """

    def __init__(
        self,
        base_url: str,
        authorizer: Authorizer | None,
        *,
        timeout: float = 60.0,
        user_agent: str = "tinker-sync",
        extra_headers: Mapping[str, str] | None = None,
        connections: int = 16,
        deprecated: Callable[[str, str], None] | None = None,
        observed: Callable[[str, str], None] | None = None,
        throttle: Throttle = UNLIMITED,
    ) -> None:
        self._base = _checked_base(base_url)
        self._throttle = throttle
        self._authorizer = authorizer
        self._timeout = timeout
        self._extra = dict(extra_headers or {})
        self._client = _make_client(
            connections=connections, connect=min(timeout, 15.0), read=timeout, user_agent=user_agent
        )
        self._deprecated = deprecated
        self._observed = observed or _nobody
        self._noted: set[str] = set()
        self._sent: set[str] = set()
        """Secrets that the service has seen, and could repeat in an error."""
        self.last_date = ""
        """The `Date` header of the last answer."""
        self.requests = 0
        """Requests sent so far, retries too."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    @property
    def host(self) -> str:
        """Where the API is, for messages."""
        return self._base.netloc.decode()

    @property
    def base_url(self) -> str:
        """Where paths are joined to, without a slash at the end."""
        return str(self._base).rstrip("/")

    def use(self, authorizer: Authorizer) -> None:
        """Set the source of the credential; it may need this very transport for its exchange."""
        self._authorizer = authorizer

    async def call(
        self,
        method: str,
        segments: Sequence[str],
        *,
        params: Mapping[str, str | int] | None = None,
        body: object = None,
        authorized: bool = True,
        headers: Mapping[str, str] | None = None,
        final: frozenset[int] = frozenset(),
        once: bool = False,
    ) -> Answer:
        """One call; returns the answer of any status below 400.

        `segments` are the decoded parts of the path after the base URL. `final` are statuses that are an answer and
        not a reason to try again; with `once` nothing is. Raises ServiceTrouble and RequestRefused with words for every other outcome.
        """
        question = _Question(method, segments, params, body, authorized, headers or {}, final, once)

        async def read() -> Answer:
            response = await self._attempt(question, url)
            try:
                content = await self._read_whole(response)
            finally:
                await _close(response)
            return Answer(response.status_code, _lower(response.headers), content, str(response.url))

        url = self._url_of(question)
        answer = await self._persist(question, read)
        if answer.status >= 400:
            raise self._refusal(answer, method, segments)
        if answer.status >= 300:
            where = SignedUrl(answer.headers.get("location", "")).host or "nowhere"
            message = f"{self.host} answered {answer.status}, a redirect to {where}: is [tinker] base_url right?"
            raise errors.ProtocolBroken(message)
        return answer

    @asynccontextmanager
    async def stream(
        self, method: str, segments: Sequence[str], *, headers: Mapping[str, str], final: frozenset[int]
    ) -> AsyncIterator[tuple[Answer, StreamedBody | None]]:
        """Like `call`, but a 200 that is no JSON is given as a body that was not read yet."""
        question = _Question(method, segments, headers=headers, final=final)
        url = self._url_of(question)

        async def attempt() -> httpx.Response:
            return await self._attempt(question, url)

        response = await self._persist(question, attempt)
        try:
            kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
            if response.status_code == 200 and kind != "application/json" and not kind.startswith("text/"):
                yield Answer(200, _lower(response.headers), b""), StreamedBody(response, self.host, self._throttle)
                return
            content = await self._read_whole(response)
        finally:
            await _close(response)
        answer = Answer(response.status_code, _lower(response.headers), content, str(response.url))
        if answer.status >= 400:
            raise self._refusal(answer, method, segments)
        yield answer, None

    def _url(self, segments: Sequence[str]) -> httpx.URL:
        """The URL of a path; what goes out is compared with what is meant.

        Only `:` of the run and our own `/` stand unescaped; `%`, `#`, `?` and the rest are UTF-8 percent-encoded.
        """
        if any(segment in ("", ".", "..") for segment in segments):
            message = "a name '.' or '..' is never put into a URL: on the way it would mean another object"
            raise errors.BadIdentifier(message, status=0)
        quoted = [
            quote(part, safe=":" if before == "training_runs" else "", errors="surrogateescape")
            for before, part in zip(("", *segments), segments, strict=False)
        ]
        raw = self._base.raw_path.rstrip(b"/") + b"/" + "/".join(quoted).encode()
        url = self._base.copy_with(raw_path=raw)
        decoded = [unquote_to_bytes(part) for part in url.raw_path.split(b"/")][-len(segments) :]
        if url.raw_path != raw or decoded != [segment.encode(errors="surrogateescape") for segment in segments]:
            message = f"the path of {segments[-1]!r} would not arrive as it is meant; nothing was sent"
            raise errors.BadIdentifier(message, status=0)
        return url

    def _url_of(self, question: _Question) -> httpx.URL:
        url = self._url(question.segments)
        return url.copy_merge_params(dict(question.params)) if question.params else url

    async def _persist(self, question: _Question, attempt: Callable[[], Awaitable[T]]) -> T:
        """Retry by the SDK's rules under one deadline; the last answer counts, whatever it is."""
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type((_TryAgain, errors.Unreachable)),
            stop=tenacity.stop_after_attempt(1 if question.once else ATTEMPTS)
            | tenacity.stop_before_delay(self._timeout),
            wait=_wait,
            reraise=True,
        )
        deadline = 2 * self._timeout
        try:
            async with asyncio.timeout(deadline):
                return await retrying(attempt)
        except _TryAgain as exhausted:
            raise self._refusal(exhausted.answer, question.method, question.segments) from None
        except TimeoutError as error:
            message = f"{self.host} gave no answer within {deadline:.0f} s"
            raise errors.Unreachable(message) from error

    async def _attempt(self, question: _Question, url: httpx.URL) -> httpx.Response:
        """One request. Raises _TryAgain for an answer that is worth another one."""
        response = await self._send_authorized(question, url)
        if response.status_code in question.final or not _worth_retrying(response):
            return response
        try:
            content = await self._read_whole(response)
        finally:
            await _close(response)
        raise _TryAgain(Answer(response.status_code, _lower(response.headers), content, str(response.url)))

    async def _send_authorized(self, question: _Question, url: httpx.URL) -> httpx.Response:
        if not question.authorized or self._authorizer is None:
            return await self._send(question, url, {})
        secret = await self._authorizer.headers()
        response = await self._send(question, url, secret)
        if response.status_code == 401:
            challenge = response.headers.get("www-authenticate", "")
            if await self._authorizer.renew(secret, challenge):
                await _close(response)
                response = await self._send(question, url, await self._authorizer.headers())
        return response

    async def _send(self, question: _Question, url: httpx.URL, secret: Mapping[str, str]) -> httpx.Response:
        headers = {"Accept": "application/json", **self._extra, **question.headers, **secret}
        request = self._client.build_request(question.method, url, json=question.body, headers=headers)
        if request.url.raw_path != url.raw_path:
            message = "the path on the wire would differ from the path that is meant; nothing was sent"
            raise errors.BadIdentifier(message, status=0)
        self.requests += 1
        self._sent.update(value for value in (*secret.values(), *self._extra.values()) if len(value) >= _SECRET_LEAST)
        try:
            response = await self._client.send(request, stream=True)
        except (httpx.HTTPError, aiohttp.ClientError, OSError) as error:
            self._observed(_route(url), "error")
            message = f"{self.host} cannot be reached ({_reason(error)})"
            raise errors.Unreachable(message) from None
        self._observed(_route(url), str(response.status_code))
        self.last_date = response.headers.get("date", "")
        self._note_deprecation(url, response)
        return response

    def _without_secrets(self, text: str) -> str:
        """An error's text goes to logs, journal and catalog: what a server repeats of URLs and keys does not."""
        for secret in self._sent:
            text = text.replace(secret, "…")
        return _TOKENS.sub("…", _URLS.sub(lambda found: f"{found.group(1)}/…", text))

    def _note_deprecation(self, url: httpx.URL, response: httpx.Response) -> None:
        note = response.headers.get("x-deprecation-note")
        route = _route(url)
        if note and self._deprecated is not None and route not in self._noted:
            self._noted.add(route)
            self._deprecated(route, _one_line(note))

    async def _read_whole(self, response: httpx.Response) -> bytes:
        content = bytearray()
        try:
            async with asyncio.timeout(self._timeout):
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > MAX_ANSWER:
                        message = f"{self.host} answered with more than {MAX_ANSWER:,} bytes"
                        raise errors.ProtocolBroken(message)
        except TimeoutError as error:
            message = f"the answer of {self.host} did not end within {self._timeout:.0f} s"
            raise errors.Unreachable(message) from error
        except (httpx.HTTPError, httpx.StreamError, aiohttp.ClientError, OSError) as error:
            message = f"the answer of {self.host} was cut ({_reason(error)})"
            raise errors.Unreachable(message) from None
        return bytes(content)

    def _refusal(self, answer: Answer, method: str, segments: Sequence[str]) -> errors.TinkerSyncError:
        """Every status as the error that says what to do about it."""
        status, detail = answer.status, self._without_secrets(answer.detail)
        said = f": {detail}" if detail else ""
        what = f"{method} {'/'.join(segments[2:])} at {self.host}"
        if status == 401:
            return errors.CredentialRefused(
                f"{self.host} refused the credential (401{said}): check $TINKER_API_KEY, [tinker] api_key_file or "
                "credential_cmd; a new key can be made in the Tinker console"
            )
        if status == 402:
            return errors.BillingBlocked(
                f"{what}: payment required (402{said}): settle the account's billing in the Tinker console", status=402
            )
        if status == 403:
            return errors.NotAllowed(
                f"{what}: not allowed with this credential (403{said}): it needs a key of the owner or of an admin",
                status=403,
            )
        if status == 404:
            return errors.NotFound(f"{what}: not found, or not yours (404{said})", status=404)
        if status in (405, 410, 501):
            return errors.NotServed(f"{what}: this server does not offer it ({status}{said})", status=status)
        if status in (400, 422):
            return errors.BadIdentifier(f"{what}: the server calls the request wrong ({status}{said})", status=status)
        if status == 429 or status >= 500:
            message = f"{what}: the server is in trouble ({status}{said})"
            return errors.Overloaded(message, status=status, retry_after=retry_after(answer.headers))
        message = f"{what}: refused ({status}{said})"
        return errors.RequestRefused(message, status=status, retry_after=retry_after(answer.headers))


class StorageTransport:
    """Fetches signed URLs. Never carries a credential; follows a few redirects, each checked.

    `connections` is how many are kept; how many are used at a time is the business of `acquire`. `stall_timeout` is the
    longest silence, in seconds.
    """

    def __init__(
        self,
        *,
        connections: int = 16,
        stall_timeout: float = 60.0,
        user_agent: str = "tinker-sync",
        observed: Callable[[str, str], None] | None = None,
        throttle: Throttle = UNLIMITED,
    ) -> None:
        self._observed = observed or _nobody
        self._throttle = throttle
        self._client = _make_client(
            connections=connections, connect=min(stall_timeout, 20.0), read=stall_timeout, user_agent=user_agent
        )
        self.requests = 0
        """Requests sent so far."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    @asynccontextmanager
    async def open(
        self, url: SignedUrl, span: Span | None = None, validator: str | None = None
    ) -> AsyncIterator[StreamedBody]:
        """Start one GET, of a span of the object where one is named; the body's status says whether that came, or all.

        With `validator`, a strong ETag, the span is asked for of that very object alone. Raises StorageTrouble for
        anything but a 200 or a 206 that was asked for, NotTransferable for a URL that is not http(s).
        """
        headers = {} if span is None else {"Range": f"bytes={span.first}-{span.end - 1}"}
        if span is not None and validator is not None:
            headers["If-Range"] = validator
        response, host = await self._follow(url, headers)
        try:
            yield StreamedBody(response, host, self._throttle)
        finally:
            await _close(response)

    async def _follow(self, url: SignedUrl, headers: Mapping[str, str]) -> tuple[httpx.Response, str]:
        for _ in range(_REDIRECTS + 1):
            if url.scheme not in ("http", "https") or not url.host:
                message = f"the storage URL is not http(s) but {url.scheme or 'no URL at all'!r}: not followed"
                raise errors.NotTransferable(message)
            response = await self._get(url, headers)
            status = response.status_code
            location = _lower(response.headers).get("location")
            if status not in (301, 302, 303, 307, 308) or location is None:
                break
            target = SignedUrl.joined(url.reveal(), location)
            await _close(response)
            if url.scheme == "https" and target.scheme != "https":
                message = f"{url.host} redirects from https to {target.scheme or 'no URL'}: not followed"
                raise errors.NotTransferable(message)
            url = target
        else:
            message = f"{url.host} redirects more than {_REDIRECTS} times"
            raise errors.StorageTrouble(message)
        if status == 200 or (status == 206 and "Range" in headers):
            return response, url.host
        await _close(response)
        hint = " (the signed URL has expired, or was refused)" if status in (400, 401, 403) else ""
        message = f"the storage at {url.host} answered {status}{hint}"
        raise errors.StorageTrouble(message, status=status)

    async def _get(self, url: SignedUrl, headers: Mapping[str, str]) -> httpx.Response:
        self.requests += 1
        try:
            request = self._client.build_request("GET", url.reveal(), headers=dict(headers))
            response = await self._client.send(request, stream=True)
        except (httpx.HTTPError, httpx.InvalidURL, aiohttp.ClientError, OSError, ValueError) as error:
            self._observed("storage", "error")
            message = f"the storage at {url.host} cannot be reached ({_reason(error)})"
            raise errors.StorageTrouble(message, stalled=isinstance(error, httpx.ReadTimeout)) from None
        self._observed("storage", str(response.status_code))
        return response


class Pinger:
    """Asks one URL now and then, without credential; what it answers does not matter. Async context manager."""

    def __init__(self, user_agent: str) -> None:
        self._client = _make_client(connections=1, connect=10.0, read=10.0, user_agent=user_agent)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def ping(self, url: str) -> None:
        """GET it. Raises ServiceTrouble for no answer, or one that is no success; never shows the URL."""
        try:
            async with asyncio.timeout(20.0):
                response = await self._client.send(self._client.build_request("GET", url), stream=True)
                await _close(response)
        except (httpx.InvalidURL, ValueError):
            message = "the heartbeat URL is none"
            raise errors.Unreachable(message) from None
        except (httpx.HTTPError, aiohttp.ClientError, OSError, TimeoutError) as error:
            message = f"the heartbeat URL cannot be reached ({_reason(error)})"
            raise errors.Unreachable(message) from None
        if not response.is_success:
            message = f"the heartbeat URL answered {response.status_code}"
            raise errors.Overloaded(message, status=response.status_code)


def _route(url: httpx.URL) -> str:
    """The fixed words of a path: what is asked, without what it is asked about."""
    return "/".join(part for part in url.path.split("/") if part in _ROUTE_WORDS)


def _nobody(route: str, status: str) -> None:
    """Nobody counts requests."""


class _TryAgain(Exception):
    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer


def _worth_retrying(response: httpx.Response) -> bool:
    """The SDK's rule: `x-should-retry` decides, else 408, 409, 429, 5xx; and the CDN's 400 without a body."""
    verdict: str | None = response.headers.get("x-should-retry")
    if verdict in ("true", "false"):
        return verdict == "true"
    status = response.status_code
    if status == 400:
        return response.headers.get("content-length", "0") == "0" and "transfer-encoding" not in response.headers
    return status in _RETRIED or (status >= 500 and status != 501)


def _wait(state: tenacity.RetryCallState) -> float:
    """What the server asks for, up to 60 s; else 0.5 s doubling to 10 s, less up to a quarter of jitter."""
    error = state.outcome.exception() if state.outcome is not None else None
    if isinstance(error, _TryAgain):
        asked = retry_after(error.answer.headers)
        if asked is not None:
            return asked
    delay = min(0.5 * 2.0 ** (state.attempt_number - 1), 10.0)
    return float(delay * (1 - 0.25 * random.random()))  # noqa: S311 - spreading load, not a secret


def retry_after(headers: Mapping[str, str]) -> float | None:
    """`retry-after-ms`, or `retry-after` in seconds or as an HTTP date; None when absent or over 60 s."""
    text = headers.get("retry-after-ms")
    scale = 1000.0
    if text is None:
        text, scale = headers.get("retry-after"), 1.0
    if text is None:
        return None
    try:
        seconds = float(text) / scale
    except ValueError:
        parsed = email.utils.parsedate_tz(text)
        try:
            seconds = email.utils.mktime_tz(parsed) - time.time() if parsed is not None else 0.0
        except (ValueError, OverflowError):
            return None
    return seconds if 0 < seconds <= RETRY_AFTER_MOST else None


async def _close(response: httpx.Response) -> None:
    try:
        await response.aclose()
    except (httpx.HTTPError, aiohttp.ClientError, OSError):
        return


def _lower(headers: httpx.Headers) -> dict[str, str]:
    lowered = {name.lower(): value for name, value in headers.items()}
    if _LOCATION.decode() in lowered:
        lowered["location"] = lowered.pop(_LOCATION.decode())
    return lowered


def _checked_base(base_url: str) -> httpx.URL:
    try:
        url = httpx.URL(base_url)
    except (httpx.InvalidURL, TypeError) as error:
        message = f"[tinker] base_url {base_url!r} is no URL ({error})"
        raise errors.ConfigInvalid(message) from error
    if url.scheme not in ("http", "https") or not url.host:
        message = f"[tinker] base_url {base_url!r} must start with https:// (or http:// for a server of your own)"
        raise errors.ConfigInvalid(message)
    if url.query or url.fragment or url.userinfo:
        message = "[tinker] base_url must have no query, fragment, user or password"
        raise errors.ConfigInvalid(message)
    return url


def _reason(error: BaseException) -> str:
    """What a library's exception says, without its text: that can hold a URL."""
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, ssl.SSLCertVerificationError):
            why = getattr(current, "verify_message", "") or "verification failed"
            return f"its certificate is not trusted: {why}; see SSL_CERT_FILE"
        if isinstance(current, socket.gaierror) or (isinstance(current, OSError) and (current.errno or 0) < 0):
            return "its name cannot be resolved"
        if isinstance(current, OSError) and current.errno and not isinstance(current, ssl.SSLError):
            return os.strerror(current.errno)
        current = current.__cause__ or current.__context__
    if isinstance(error, httpx.TimeoutException | TimeoutError):
        return "timed out"
    return type(error).__name__
