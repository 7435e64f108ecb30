"""One object behind signed URLs, fetched over several connections, given in order.

**Spans**: where the storage serves ranges of an object with a strong ETag, spans of it are fetched side by side and
handed on in order; what comes early waits in memory, of which all downloads share a fixed amount. So a slow consumer
needs few connections and a slow wire gets many, without a setting. A busy storage gets one long span per object.

**Never two objects in one**: each answer must be the very span that was asked for, of the same length and ETag. A
storage that breaks this is not asked for spans again for an hour, nor for an object that changed twice while it came.

A cut costs what was not received of one span; an expired URL is signed again. Without ranges there is one connection,
and a cut ends the download.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from tinker_sync.acquire.lanes import SEGMENT
from tinker_sync.errors import ObjectChanged, StorageTrouble
from tinker_sync.integrity import headers_of_whole, served_span, strong_validator
from tinker_sync.model.evidence import Span
from tinker_sync.stopping import outlast

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping

    from tinker_sync.acquire.lanes import Lanes
    from tinker_sync.model.paths import SignedUrl
    from tinker_sync.ports import Body, Clock, StagedObject, Storage

    Sign = Callable[[SignedUrl | None], Awaitable[SignedUrl]]
    """Gives the object's URL: another one than the one that was refused."""

FIRST: Final = 4 * SEGMENT
"""Bytes that the first request asks for: small objects are whole with it."""
LONG: Final = 16 * SEGMENT
"""Bytes of a span while all connections are busy: it is consumed as it comes, and needs no memory."""
_BUFFERED: Final = SEGMENT // 4
"""How much waits in memory of a span that has none of its own, in bytes: enough to read on while it is written."""
_REAL_PROGRESS: Final = 64 * 1024
"""Bytes of one answer after which a cut is no reason to wait or to give up."""
_PATIENCE: Final = 4
"""How many times in a row one span may bring nothing; a stall counts as three."""
_PAUSE: Final = 0.05
"""Seconds before a span that was cut twice is asked for again."""
_DISTRUST: Final = 3600.0
_SAME_CHANGE: Final = 0.5
"""Seconds within which files that are fetched side by side meet one change of their checkpoint."""
_REFUSED: Final = frozenset({400, 401, 403})
"""How storages say that a signed URL has expired."""
_PASSING: Final = frozenset({0, 408, 429})


@dataclass(frozen=True, slots=True)
class Start:
    """Where to go on, of which object."""

    offset: int
    validator: str
    length: int
    """Of the whole object."""

    @classmethod
    def of(cls, staged: StagedObject) -> Start | None:
        """Behind what was kept of an object; None where nothing was, or nothing tells it from another."""
        length = staged.claim.length
        if not staged.kept or staged.validator is None or length is None:
            return None
        return cls(staged.kept, staged.validator, length)

    def span(self) -> Span:
        """What to ask for first; of an object that is whole already its last byte, to see the ETag."""
        first = min(self.offset, self.length - 1)
        return Span(first, min(first + FIRST, self.length))


@dataclass(slots=True, eq=False)
class _Piece:
    """One span on its way: a task fills it, the consumer empties it."""

    first: int
    end: int | None
    """None when only the body's end tells."""
    ahead: bool
    """Whether it was begun before its turn, with memory of its own."""
    position: int = 0
    chunks: deque[bytes] = field(default_factory=deque)
    buffered: int = 0
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    room: asyncio.Event = field(default_factory=asyncio.Event)
    over: bool = False
    trouble: BaseException | None = None

    def __post_init__(self) -> None:
        self.position = self.first

    async def put(self, chunk: bytes) -> None:
        self.position += len(chunk)
        self.chunks.append(chunk)
        self.buffered += len(chunk)
        self.arrived.set()
        while self.buffered >= _BUFFERED and not self.ahead:
            self.room.clear()
            await self.room.wait()

    async def drain(self) -> AsyncIterator[bytes]:
        while True:
            while self.chunks:
                chunk = self.chunks.popleft()
                self.buffered -= len(chunk)
                self.room.set()
                yield chunk
            if self.over:
                return
            self.arrived.clear()
            await self.arrived.wait()

    def finish(self, trouble: BaseException | None) -> None:
        self.trouble = trouble
        self.over = True
        self.arrived.set()


class Downloader:
    """Opens downloads. All of them share its lanes, and what it learnt about storages."""

    def __init__(self, storage: Storage, lanes: Lanes, clock: Clock) -> None:
        self._storage = storage
        self._lanes = lanes
        self._clock = clock
        self._distrusted: dict[str, float] = {}
        """By host or object until when no spans of it are asked for, of `Clock.monotonic`."""
        self._changed: dict[str, float] = {}
        """By object until when another change tells that its ETags mean nothing."""

    @asynccontextmanager
    async def open(self, sign: Sign, *, name: str, urgency: int, start: Start | None = None) -> AsyncIterator[Download]:
        """Begin one: from `start`, or from the first byte where the storage serves no ranges any more (`begins` says so).

        `name` is the object's, whatever its URL. Raises StorageTrouble (ObjectChanged where `start` is of another object),
        NotTransferable, and what `sign` raises; so does reading.
        """
        download = Download(self, self._storage, self._lanes, self._clock, sign, name, urgency)
        await self._lanes.ahead.take(lambda: (0, urgency))  # lent, if need be
        try:
            await download.begin(start)
            yield download
        finally:
            try:
                await download.close()
            finally:
                self._lanes.ahead.give()

    async def still_has(self, sign: Sign, start: Start, *, name: str, urgency: int) -> bool:
        """Whether the storage gives spans of that very object: its last byte is asked for. Raises as `open` does."""
        async with self.open(sign, name=name, urgency=urgency, start=replace(start, offset=start.length)) as download:
            return download.begins == start.length

    def trusts(self, *names: str) -> bool:
        """Whether spans may be asked for of that host, or object."""
        now = self._clock.monotonic()
        return all(self._distrusted.get(name, now) <= now for name in names)

    def distrust(self, name: str) -> None:
        """One connection, from the first byte, for a while."""
        _remember(self._distrusted, name, self._clock.monotonic())

    def note_change(self, name: str) -> None:
        """An object changed while it was fetched. Some storages make up another ETag each time."""
        now, before = self._clock.monotonic(), self._changed.get(name, 0) - _DISTRUST
        if now - before < _SAME_CHANGE:
            return
        if now - before < _DISTRUST:
            self.distrust(name)
        _remember(self._changed, name, now)


def _remember(names: dict[str, float], name: str, now: float) -> None:
    """Note it for a while, and forget what was long ago."""
    for old in [old for old, until in names.items() if until <= now]:
        del names[old]
    names[name] = now + _DISTRUST


class Download:
    """A `ports.Body` of the whole object, or of what follows `begins`."""

    status = 200

    def __init__(
        self, downloader: Downloader, storage: Storage, lanes: Lanes, clock: Clock, sign: Sign, name: str, urgency: int
    ) -> None:
        self._downloader = downloader
        self._storage = storage
        self._lanes = lanes
        self._clock = clock
        self._sign = sign
        self._name = name
        self._urgency = urgency
        self._url: SignedUrl | None = None
        self._pieces: deque[_Piece] = deque()
        """Begun and not consumed, in order."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._next: int | None = None
        """The first byte that no span was begun for; None when there are no spans."""
        self._total = 0
        self._received = 0
        """Bytes that came, over all connections."""
        self._bug: BaseException | None = None
        self._met_change = False
        self._changed = asyncio.Event()
        self._opened = AsyncExitStack()
        """The first answer, while it is read."""
        self.headers: Mapping[str, str] = {}
        self.ends_itself = True
        self.validator: str | None = None
        """The object's strong ETag, where spans of it can be had."""
        self.begins = 0
        """The first byte that `chunks` gives."""

    async def begin(self, start: Start | None) -> None:
        """The first request: what can be had, and how."""
        await self._lanes.connections.take(self._rank)
        try:
            body, span = await self._first_answer(start)
        except BaseException:
            self._lanes.connections.give()
            raise
        piece = _Piece(0, None, ahead=False)
        if span is None:
            self.headers, self.ends_itself = body.headers, body.ends_itself
        elif start is not None and start == Start(self._total, self.validator or "", self._total):
            self.begins = self._next = self._total
            try:
                await self._opened.aclose()
            finally:
                self._lanes.connections.give()
            return
        else:
            self.begins, self._next = span.first, span.end
            piece = _Piece(span.first, span.end, ahead=False)
        self._fill_piece(piece, self._go_on_with(piece, body))
        if span is not None and span.end < self._total:
            self._start(self._fetch_ahead()).add_done_callback(self._note_end)

    async def chunks(self) -> AsyncIterator[bytes]:
        """The bytes in order. Raises what ended a span before its end, after what came of it."""
        while (piece := await self._head()) is not None:
            async for chunk in piece.drain():
                yield chunk
            if piece.trouble is not None:
                raise piece.trouble
            if piece.end is not None and piece.position != piece.end:
                message = f"an answer ended {piece.end - piece.position:,} bytes early"
                raise StorageTrouble(message)
            self._pieces.popleft()
            if piece.ahead:
                self._lanes.ahead.give()
            self._changed.set()

    async def close(self) -> None:
        """End everything that runs."""
        for task in self._tasks:
            task.cancel()
        try:
            await outlast(asyncio.gather(*self._tasks, return_exceptions=True))
        finally:
            try:
                await self._opened.aclose()
            finally:
                for piece in self._pieces:
                    if piece.ahead:
                        self._lanes.ahead.give()
                self._pieces.clear()

    # The order of spans

    def _rank(self) -> tuple[int, int]:
        return (1 if self._is_ahead() else 0, self._urgency)

    def _is_ahead(self) -> bool:
        """Whether something is on its way already that comes before the next span."""
        return any(not piece.over for piece in self._pieces)

    def _note_end(self, task: asyncio.Task[None]) -> None:
        """Nobody waits for spans that will not be begun."""
        self._bug = None if task.cancelled() else task.exception()
        self._changed.set()

    async def _head(self) -> _Piece | None:
        while not self._pieces:
            if self._bug is not None:
                raise self._bug
            if self._next is None or self._next >= self._total:
                return None
            self._changed.clear()
            await self._changed.wait()
        return self._pieces[0]

    def _fill_piece(self, piece: _Piece, filling: Coroutine[None, None, None]) -> None:
        """Fill it in a task of its own, to which the connection that was taken belongs."""

        def ended(task: asyncio.Task[None]) -> None:
            piece.finish(StorageTrouble("the download was stopped") if task.cancelled() else task.exception())
            self._lanes.connections.give()
            self._lanes.ahead.look_again()

        self._pieces.append(piece)
        self._start(filling).add_done_callback(ended)
        self._changed.set()

    def _start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _fetch_ahead(self) -> None:
        """Begin one span after the other, each as soon as there is a connection, and memory unless it is its turn."""
        while self._next is not None and self._next < self._total:
            ahead = self._is_ahead()
            if ahead:
                await self._lanes.ahead.take(self._rank)
            try:
                await self._lanes.connections.take(self._rank)
            except BaseException:
                if ahead:
                    self._lanes.ahead.give()
                raise
            if ahead and not self._is_ahead():  # its turn came meanwhile
                self._lanes.ahead.give()
                ahead = False
            size = SEGMENT if ahead or self._lanes.connections.free > 0 else LONG
            first, self._next = self._next, min(self._next + size, self._total)
            piece = _Piece(first, self._next, ahead=ahead)
            self._fill_piece(piece, self._fill(piece, self._next))

    # Requests

    async def _first_answer(self, start: Start | None) -> tuple[Body, Span | None]:
        """A body, and which span of the object it is; None when it is the whole, over one connection.

        A URL that is refused is signed again, once; everything else is the next attempt's business.
        """
        spans = fresh = True
        while True:
            url = self._url = self._url or await self._sign(None)
            spans = spans and self._downloader.trusts(url.host, self._name)
            start = start if spans else None
            asked = None if not spans else self._first_span() if start is None else start.span()
            opening = self._storage.open(url, asked, None if start is None else start.validator)
            try:
                body = await self._opened.enter_async_context(opening)
            except StorageTrouble as trouble:
                if trouble.status == 416 and start is not None:
                    raise _changed(url) from None  # shorter than it was
                if trouble.status == 416 and spans:
                    spans = False  # empty
                    continue
                if trouble.status not in _REFUSED or not fresh:
                    raise
                fresh = False
                await self._sign_again(url, trouble)
                continue
            if body.status == 200 and start is None:
                return body, None
            span = None if body.status == 200 else self._understand(body, asked, start)
            if span is not None:
                return body, span
            if start is not None and _is_another(body, start):
                raise _changed(url)
            await self._opened.aclose()
            if start is None:
                self._downloader.distrust(url.host)
            start = None  # nothing tells: from the first byte

    def _first_span(self) -> Span:
        return Span(0, FIRST if self._lanes.connections.free > 0 else LONG)

    async def _sign_again(self, refused: SignedUrl, trouble: StorageTrouble) -> None:
        if trouble.status in _REFUSED:
            self._url = await self._sign(refused)

    def _understand(self, body: Body, asked: Span | None, start: Start | None) -> Span | None:
        """The span that the first answer is; None where it cannot be gone on with."""
        served = served_span(body.headers)
        if served is None or asked is None:
            return None
        span, total = served
        validator = strong_validator(body.headers)
        if span != Span(asked.first, min(asked.end, total)) or (validator is None and span != Span(0, total)):
            return None
        if start is not None and (validator, total) != (start.validator, start.length):
            return None
        self._total, self.validator = total, validator
        self.headers = headers_of_whole(body.headers, span, total)
        return span

    async def _go_on_with(self, piece: _Piece, body: Body) -> None:
        """From the answer that is open already; what it does not bring of a span is asked for anew."""
        trouble: StorageTrouble | None = None
        try:
            await self._receive(piece, body)
        except StorageTrouble as error:
            trouble = error
        finally:
            await self._opened.aclose()
        if piece.end is None or self.validator is None:
            if trouble is not None:
                raise trouble
            return
        await self._fill(piece, piece.end, trouble)

    async def _fill(self, piece: _Piece, end: int, trouble: StorageTrouble | None = None) -> None:
        """Bring a span, in as many requests as it takes."""
        failures = _Failures(self._clock, lambda: self._received)
        if trouble is not None:
            await failures.consider(trouble, progress=piece.position - piece.first)
        while piece.position < end:
            await self._ask(piece, Span(piece.position, end), failures)

    async def _ask(self, piece: _Piece, asked: Span, failures: _Failures) -> None:
        used = self._url = self._url or await self._sign(None)
        try:
            async with self._storage.open(used, asked, self.validator) as body:
                self._check(body, asked, used)
                await self._receive(piece, body)
        except StorageTrouble as trouble:
            await failures.consider(trouble, progress=piece.position - asked.first)
            await self._sign_again(used, trouble)
        else:
            if piece.position < asked.end:
                early = StorageTrouble(f"an answer ended {asked.end - piece.position:,} bytes early")
                await failures.consider(early, progress=piece.position - asked.first)

    def _check(self, body: Body, asked: Span, url: SignedUrl) -> None:
        """Whether it is what was asked for, of the same object."""
        if body.status == 206:
            served = served_span(body.headers)
            tag = strong_validator(body.headers)
            if served == (asked, self._total) and tag == self.validator:
                return
            changed = tag is not None and tag != self.validator
        else:
            changed = strong_validator(body.headers) not in (None, self.validator)
        if changed:
            if not self._met_change:  # once, however many spans meet it
                self._met_change = True
                self._downloader.note_change(self._name)
            raise _changed(url)
        self._downloader.distrust(url.host)
        message = f"{url.host} does not answer ranges as it should: it is fetched anew, over one connection"
        raise _Mixed(message)

    async def _receive(self, piece: _Piece, body: Body) -> None:
        async for chunk in body.chunks():
            if piece.end is not None and piece.position + len(chunk) > piece.end:
                if self._url is not None:
                    self._downloader.distrust(self._url.host)
                message = (
                    "an answer is longer than the span that was asked for: it is fetched anew, over one connection"
                )
                raise _Mixed(message)
            self._received += len(chunk)
            await piece.put(chunk)


def _changed(url: SignedUrl) -> ObjectChanged:
    return ObjectChanged(f"the object at {url.host} changed while it was fetched: it is fetched anew")


def _is_another(body: Body, start: Start) -> bool:
    """Whether an answer is of another object than the one that was begun, for certain."""
    tag, served = strong_validator(body.headers), served_span(body.headers)
    return tag not in (None, start.validator) or (served is not None and served[1] != start.length)


class _Mixed(StorageTrouble):
    """Going on could mix two objects: the download ends."""


class _Failures:
    """How often in a row one span brought nothing, and how long to wait before it is asked for again.

    `received` tells what all spans of the object brought: while others go on (a storage can take few connections), this
    one waits longer and is not given up, unless its URL is refused although it was signed again.
    """

    def __init__(self, clock: Clock, received: Callable[[], int]) -> None:
        self._clock = clock
        self._received = received
        self._before = received()
        self._count = 0
        self._cuts = 0

    async def consider(self, trouble: StorageTrouble, *, progress: int) -> None:
        """Wait, where another request can help. Raises the trouble where none does."""
        refused = trouble.status in _REFUSED
        passing = refused or trouble.status in _PASSING or trouble.status >= 500
        if isinstance(trouble, _Mixed | ObjectChanged) or not passing:
            raise trouble
        before, self._before = self._before, self._received()
        if progress >= _REAL_PROGRESS:
            self._count = 0
            self._cuts += 1
            if self._cuts > 1:
                await self._clock.sleep(_PAUSE)
            return
        self._count += 3 if trouble.stalled else 1
        if self._before - before >= _REAL_PROGRESS and not refused:
            self._count = min(self._count, _PATIENCE)
        if self._count > _PATIENCE:
            raise trouble
        if not (refused and self._count == 1):  # the first time another URL is all that it takes
            await self._clock.sleep(0.25 * 2**self._count)
