"""Downloads over several connections: in order, never two objects in one, cut at any place, within the limits."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from tests.test_transport import serving
from tinker_sync.acquire import download as module
from tinker_sync.acquire.download import Downloader, Start
from tinker_sync.acquire.lanes import AHEAD, Lanes, Turns
from tinker_sync.errors import ObjectChanged, StorageTrouble
from tinker_sync.integrity import headers_of_whole, served_span, strong_validator
from tinker_sync.model.evidence import Span
from tinker_sync.model.paths import SignedUrl
from tinker_sync.transport import StorageTransport, Throttle
from tinker_sync.wiring import SYSTEM_CLOCK

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

SEGMENT = 64 * 1024


@pytest.fixture(autouse=True)
def _small_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans of 64 KiB, so that a few megabytes are many of them."""
    monkeypatch.setattr(module, "SEGMENT", SEGMENT)
    monkeypatch.setattr(module, "_BUFFERED", SEGMENT)
    monkeypatch.setattr(module, "FIRST", 4 * SEGMENT)
    monkeypatch.setattr(module, "LONG", 16 * SEGMENT)
    monkeypatch.setattr(module, "_REAL_PROGRESS", 1024)
    monkeypatch.setattr(module, "_SAME_CHANGE", 0)


@dataclass
class Store:
    """An object storage of one object, and what it was asked."""

    body: bytes
    etag: str = '"one"'
    spans: list[tuple[int, int] | None] = field(default_factory=list)
    spoil: Callable[[int, web.Request, dict[str, Any]], None] = lambda number, request, answer: None
    """May change status, headers, body and `cut` of the nth answer (from 1)."""
    running: int = 0
    most: int = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer as object storage does, then as the test wants it."""
        asked = request.http_range
        first, end = asked.start, asked.stop
        self.spans.append(None if first is None else (first, end))
        body, headers, status = self.body, {"ETag": self.etag}, 200
        if first is not None and request.headers.get("If-Range", self.etag) == self.etag:
            if first >= len(body):
                return web.Response(status=416, headers={"Content-Range": f"bytes */{len(body)}"})
            end = min(end or len(body), len(body))
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(body)}"
            body, status = body[first:end], 206
        answer: dict[str, Any] = {"status": status, "headers": headers, "body": body, "cut": None, "wait": 0.0}
        self.spoil(len(self.spans), request, answer)
        response = web.StreamResponse(status=answer["status"], headers=answer["headers"])
        response.content_length = len(answer["body"])
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await response.prepare(request)
            await asyncio.sleep(answer["wait"])
            await response.write(answer["body"][: answer["cut"]])
            if answer["cut"] is not None:
                assert request.transport is not None
                await asyncio.sleep(0.01)  # what was written goes out first
                request.transport.abort()
        finally:
            self.running -= 1
        return response


@asynccontextmanager
async def downloading(store: Store, **options: Any) -> AsyncIterator[tuple[Downloader, Any, Lanes]]:
    """A downloader, a way to sign, and its lanes."""
    connections = options.pop("connections", 8)
    async with serving(store.handle) as origin, StorageTransport(stall_timeout=1, **options) as storage:
        lanes = Lanes(connections)

        async def sign(refused: SignedUrl | None) -> SignedUrl:
            del refused
            return SignedUrl(f"{origin}/object?sig=1")

        yield Downloader(storage, lanes, SYSTEM_CLOCK), sign, lanes
        assert lanes.connections.free == connections, "every connection was given back"
        assert lanes.ahead.free == AHEAD, "so was the memory"


async def fetch(downloader: Downloader, sign: Any, start: Start | None = None, urgency: int = 1) -> tuple[int, bytes]:
    """Where it begins, and all the bytes."""
    async with downloader.open(sign, name="object", urgency=urgency, start=start) as download:
        return download.begins, b"".join([chunk async for chunk in download.chunks()])


async def until(holds: Callable[[], bool]) -> None:
    """Wait for it, ten seconds at most."""
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110 - of a storage that knows no events
            await asyncio.sleep(0.01)


def some_bytes(size: int) -> bytes:
    """The same ones each time."""
    return random.Random(size).randbytes(size)


@pytest.mark.parametrize("size", [1, 4 * SEGMENT - 1, 4 * SEGMENT, 4 * SEGMENT + 1, 40 * SEGMENT + 17])
async def test_it_arrives_in_order_whatever_its_size(size: int) -> None:
    """Over several connections where it is large; a small one is whole with the first answer."""
    store = Store(some_bytes(size), spoil=lambda number, _, answer: answer.update(wait=0.02 if number > 1 else 0))
    async with downloading(store) as (downloader, sign, _):
        assert await fetch(downloader, sign) == (0, store.body)
    wanted = max(1, 1 + -(-(size - 4 * SEGMENT) // SEGMENT))
    assert len(store.spans) == wanted
    if wanted > 10:
        assert store.most > 4
    assert store.most <= 8


async def test_an_empty_object_is_one() -> None:
    """No span of it can be had."""
    store = Store(b"")
    async with downloading(store) as (downloader, sign, _):
        assert await fetch(downloader, sign) == (0, b"")


@pytest.mark.parametrize("etag", ["", 'W/"weak"'])
async def test_without_a_strong_etag_there_is_one_connection(etag: str) -> None:
    """Two spans could be of two objects; the storage is not asked for spans again."""
    store = Store(some_bytes(20 * SEGMENT), etag=etag)

    def no_etag(_: int, __: web.Request, answer: dict[str, Any]) -> None:
        answer["headers"] = {name: value for name, value in answer["headers"].items() if name != "ETag" or value}

    store.spoil = no_etag
    async with downloading(store) as (downloader, sign, _):
        assert await fetch(downloader, sign) == (0, store.body)
        assert await fetch(downloader, sign) == (0, store.body)
    assert store.spans == [(0, 4 * SEGMENT), None, None]


async def test_a_storage_without_ranges_sends_it_at_once() -> None:
    """One request, one connection."""
    store = Store(some_bytes(20 * SEGMENT))

    def whole(_: int, __: web.Request, answer: dict[str, Any]) -> None:
        answer.update(status=200, headers={"ETag": '"one"'}, body=store.body)

    store.spoil = whole
    async with downloading(store) as (downloader, sign, _):
        assert await fetch(downloader, sign) == (0, store.body)
    assert len(store.spans) == 1


def _shifted(answer: dict[str, Any]) -> None:
    answer["headers"]["Content-Range"] = f"bytes 1-{len(answer['body'])}/99999999"


def _whole(answer: dict[str, Any]) -> None:
    answer.update(status=200)
    del answer["headers"]["Content-Range"]


def _unnamed(answer: dict[str, Any]) -> None:
    del answer["headers"]["ETag"]


def _other_length(answer: dict[str, Any]) -> None:
    answer["headers"]["Content-Range"] = answer["headers"]["Content-Range"].rpartition("/")[0] + "/123456789"


@pytest.mark.parametrize("lie", [_shifted, _whole, _unnamed, _other_length])
async def test_a_storage_that_lies_about_ranges_is_asked_for_the_whole(lie: Callable[[dict[str, Any]], None]) -> None:
    """What a lie could have mixed is thrown away; the next attempt has one connection, and the right bytes."""
    store = Store(some_bytes(20 * SEGMENT), spoil=lambda number, _, answer: lie(answer) if number == 5 else None)
    async with downloading(store) as (downloader, sign, _):
        with pytest.raises(StorageTrouble, match="does not answer ranges as it should"):
            await fetch(downloader, sign)
        asked = len(store.spans)
        assert await fetch(downloader, sign) == (0, store.body)
    assert store.spans[asked:] == [None]


@pytest.mark.parametrize("guarded", [True, False])
async def test_an_object_that_changes_is_never_mixed(*, guarded: bool) -> None:
    """Whether the storage heeds `If-Range` or not; the next attempt has the new one alone."""
    store = Store(some_bytes(20 * SEGMENT))

    def change(number: int, request: web.Request, answer: dict[str, Any]) -> None:
        if number == 5:
            store.body, store.etag = some_bytes(21 * SEGMENT), '"two"'
        if number == 5 and guarded:
            answer.update(status=200, headers={"ETag": '"two"'}, body=store.body)
        elif number == 5:
            answer["headers"]["ETag"] = '"two"'
        del request

    store.spoil = change
    async with downloading(store) as (downloader, sign, _):
        with pytest.raises(StorageTrouble, match="changed while it was fetched"):
            await fetch(downloader, sign)
        assert await fetch(downloader, sign) == (0, store.body)


async def test_an_etag_that_means_nothing_is_found_out() -> None:
    """Another one with each answer: after the second change the object comes over one connection, others as ever."""
    store = Store(some_bytes(20 * SEGMENT))
    store.spoil = lambda number, _, answer: answer["headers"].update(ETag=f'"made-up-{number}"')
    async with downloading(store) as (downloader, sign, _):
        for _ in range(2):
            with pytest.raises(ObjectChanged, match="changed while it was fetched"):
                await fetch(downloader, sign)
        assert await fetch(downloader, sign) == (0, store.body)
        assert store.spans[-1] is None
        assert downloader.trusts("another object")


async def test_one_change_is_one_however_many_spans_meet_it() -> None:
    """A slow consumer: all that was fetched ahead is of the new object. It still comes over several connections."""
    store = Store(some_bytes(40 * SEGMENT))
    async with downloading(store) as (downloader, sign, _):
        async with downloader.open(sign, name="object", urgency=1) as download:
            store.etag, store.body = '"two"', some_bytes(41 * SEGMENT)
            await until(lambda: sum(piece.trouble is not None for piece in download._pieces) >= 5)
            with pytest.raises(ObjectChanged):
                assert [chunk async for chunk in download.chunks()]
        store.spans.clear()
        assert await fetch(downloader, sign) == (0, store.body)
    assert len(store.spans) > 10


async def still_there(store: Store, start: Start) -> bool:
    """What a look at the storage says."""
    async with downloading(store) as (downloader, sign, _):
        return await downloader.still_has(sign, start, name="object", urgency=1)


async def test_one_byte_tells_whether_the_object_is_still_there() -> None:
    """Before much is read of the disk in vain."""
    store = Store(some_bytes(20 * SEGMENT))
    assert await still_there(store, Start(5 * SEGMENT, '"one"', len(store.body)))
    assert store.spans == [(len(store.body) - 1, len(store.body))]
    for another in (Start(5 * SEGMENT, '"two"', len(store.body)), Start(5 * SEGMENT, '"one"', len(store.body) - 1)):
        with pytest.raises(ObjectChanged):
            await still_there(store, another)
    store.spoil = lambda number, _, answer: answer.update(status=503, body=b"")
    with pytest.raises(StorageTrouble, match="503"):
        await still_there(store, Start(5 * SEGMENT, '"one"', len(store.body)))


async def test_a_url_that_is_refused_whatever_is_signed_is_given_up() -> None:
    """Also while others of the object go on: it is not asked for without end."""
    store = Store(some_bytes(150 * SEGMENT))
    refused = 0

    def refuse_one(_: int, request: web.Request, answer: dict[str, Any]) -> None:
        nonlocal refused
        answer["wait"] = 0.1
        if request.http_range.start == 5 * SEGMENT:
            refused += 1
            answer.update(status=403, body=b"", wait=0)

    store.spoil = refuse_one
    async with downloading(store, connections=2) as (downloader, sign, _):
        with pytest.raises(StorageTrouble, match="403"):
            await fetch(downloader, sign)
    assert refused < 10


async def test_a_cut_costs_what_was_missing_of_one_span() -> None:
    """Every answer but each third is cut in its middle: no byte that came is asked for again."""
    store = Store(some_bytes(30 * SEGMENT + 5))

    def cut(number: int, _: web.Request, answer: dict[str, Any]) -> None:
        if number % 3:
            answer["cut"] = len(answer["body"]) // 2

    store.spoil = cut
    async with downloading(store) as (downloader, sign, _):
        assert await fetch(downloader, sign) == (0, store.body)
    asked = [span for span in store.spans if span is not None]
    assert len({first for first, _ in asked}) == len(asked)


async def test_a_storage_that_brings_nothing_more_is_given_up() -> None:
    """After a few seconds, with what was wrong; what came before it was handed on."""
    store = Store(some_bytes(20 * SEGMENT))

    def refuse(number: int, _: web.Request, answer: dict[str, Any]) -> None:
        if number > 3:
            answer.update(status=500, body=b"")

    store.spoil = refuse
    came: list[bytes] = []

    async def read() -> None:
        async with downloader.open(sign, name="object", urgency=1) as download:
            async for chunk in download.chunks():
                came.append(chunk)  # noqa: PERF401 - what came before the error counts

    async with downloading(store) as (downloader, sign, _):
        with pytest.raises(StorageTrouble, match="answered 500"):
            await read()
    assert len(b"".join(came)) >= 4 * SEGMENT


async def test_a_storage_that_takes_few_connections_is_no_failure() -> None:
    """Three at a time, the others are refused: while something comes, nothing is given up."""
    store = Store(some_bytes(150 * SEGMENT))

    def few(number: int, _: web.Request, answer: dict[str, Any]) -> None:
        answer["wait"] = 0.05
        if store.running >= 3:
            answer.update(status=503 if number % 2 else 429, body=b"", wait=0)

    store.spoil = few
    async with downloading(store) as (downloader, sign, _):
        assert await fetch(downloader, sign) == (0, store.body)


@pytest.mark.parametrize("seed", range(8))
async def test_whatever_goes_wrong_the_bytes_are_right(seed: int) -> None:
    """Cuts, refusals and trouble at random: every byte once, in order."""
    chance = random.Random(seed)
    size = chance.randrange(1, 50 * SEGMENT)
    store = Store(some_bytes(size))

    def spoil(number: int, _: web.Request, answer: dict[str, Any]) -> None:
        answer["wait"] = chance.random() * 0.01
        harm = chance.choice(["cut", "cut", "status", "none", "none", "none"]) if number > 1 else "none"
        if harm == "cut":
            answer["cut"] = chance.randrange(len(answer["body"]) + 1)
        elif harm == "status":
            answer.update(status=chance.choice([403, 500, 503, 429]), body=b"no")

    store.spoil = spoil
    async with downloading(store, connections=chance.choice([1, 2, 8])) as (downloader, sign, _):
        for _ in range(5):
            with suppress(StorageTrouble):
                assert await fetch(downloader, sign) == (0, store.body)
                return
    pytest.fail("five attempts were not enough")


async def test_an_urgent_newcomer_gets_the_next_connection() -> None:
    """A large download holds all of them; the small one need not wait for its end."""
    large, small = Store(some_bytes(100 * SEGMENT)), Store(some_bytes(100))
    large.spoil = lambda _, __, answer: answer.update(wait=0.05)
    async with downloading(large, connections=2) as (downloader, sign, _), serving(small.handle) as origin:

        async def sign_small(_: SignedUrl | None) -> SignedUrl:
            return SignedUrl(f"{origin}/small")

        running = asyncio.create_task(fetch(downloader, sign, urgency=5))
        await until(lambda: len(large.spans) >= 6)
        assert await fetch(downloader, sign_small, urgency=1) == (0, small.body)
        assert not running.done()
        assert len(large.spans) < 30
        assert await running == (0, large.body)


async def test_stalls_of_all_connections_end_it() -> None:
    """Nothing comes for `stall_timeout`, twice."""
    store = Store(some_bytes(20 * SEGMENT), spoil=lambda number, _, answer: answer.update(wait=30 if number > 2 else 0))
    async with downloading(store) as (downloader, sign, _):
        begun = time.monotonic()
        with pytest.raises(StorageTrouble, match="stalled") as raised:
            await fetch(downloader, sign)
        assert raised.value.stalled
        assert time.monotonic() - begun < 20


async def test_a_url_that_ends_is_signed_again_in_the_middle() -> None:
    """Each URL is good for three answers."""
    store = Store(some_bytes(30 * SEGMENT))
    signed = 0
    uses: dict[str, int] = {}

    def expire(_: int, request: web.Request, answer: dict[str, Any]) -> None:
        uses[request.query["n"]] = uses.get(request.query["n"], 0) + 1
        if uses[request.query["n"]] > 3:
            answer.update(status=403, body=b"<Error>ExpiredToken</Error>")

    store.spoil = expire
    async with serving(store.handle) as origin, StorageTransport(stall_timeout=1) as storage:
        current = [SignedUrl(f"{origin}/object?n=0")]

        async def sign(refused: SignedUrl | None) -> SignedUrl:
            nonlocal signed
            if refused == current[0]:
                signed += 1
                current[0] = SignedUrl(f"{origin}/object?n={signed}")
            return current[0]

        assert await fetch(Downloader(storage, Lanes(4), SYSTEM_CLOCK), sign) == (0, store.body)
    assert signed > 5


async def test_a_start_in_the_middle() -> None:
    """What follows it; nothing when all is there; an error when the object is another one, or shorter."""
    store = Store(some_bytes(20 * SEGMENT))
    size = len(store.body)
    async with downloading(store) as (downloader, sign, _):
        assert await fetch(downloader, sign, Start(12345, '"one"', size)) == (12345, store.body[12345:])
        assert await fetch(downloader, sign, Start(size, '"one"', size)) == (size, b"")
    for start in (Start(12345, '"old"', size), Start(5, '"one"', size + 9), Start(size + 5, '"one"', size + 9)):
        async with downloading(store) as (downloader, sign, _):
            with pytest.raises(ObjectChanged):
                await fetch(downloader, sign, start)


@pytest.mark.parametrize("size", [20 * SEGMENT, 1])
async def test_what_was_whole_is_confirmed_by_its_own_etag_alone(size: int) -> None:
    """A storage that does not heed `If-Range`: another object of the same length is not taken for the old one."""
    store = Store(some_bytes(size))

    def deaf(_: int, request: web.Request, answer: dict[str, Any]) -> None:
        asked = request.http_range
        first, end = asked.start or 0, min(asked.stop or size, size)
        span = f"bytes {first}-{end - 1}/{size}"
        answer.update(status=206, body=store.body[first:end], headers={"ETag": '"one"', "Content-Range": span})

    store.spoil = deaf
    async with downloading(store) as (downloader, sign, _):
        with pytest.raises(ObjectChanged):
            await fetch(downloader, sign, Start(size, '"old"', size))
    async with downloading(store) as (downloader, sign, _):
        with pytest.raises(ObjectChanged):
            await fetch(downloader, sign, Start(size, '"one"', 2 * size))
        assert await fetch(downloader, sign, Start(size, '"one"', size)) == (size, b"")


async def test_a_start_without_proof_begins_anew_over_several_connections() -> None:
    """A 200 without an ETag says only that the middle cannot be had: no change, and no reason to distrust."""
    store = Store(some_bytes(40 * SEGMENT))

    def no_etag(number: int, _: web.Request, answer: dict[str, Any]) -> None:
        if number == 1:
            answer.update(status=200, headers={}, body=store.body)

    store.spoil = no_etag
    async with downloading(store) as (downloader, sign, _):
        assert await fetch(downloader, sign, Start(12345, '"one"', len(store.body))) == (0, store.body)
    assert len(store.spans) > 10


async def test_an_answer_that_is_too_long_is_asked_for_as_a_whole() -> None:
    """It would come again; the next attempt has one connection, and the right bytes."""
    store = Store(some_bytes(20 * SEGMENT))

    def more(_: int, __: web.Request, answer: dict[str, Any]) -> None:
        if answer["status"] == 206:
            answer["body"] += b"more"

    store.spoil = more
    async with downloading(store) as (downloader, sign, _):
        with pytest.raises(StorageTrouble, match="longer than the span"):
            await fetch(downloader, sign)
        assert await fetch(downloader, sign) == (0, store.body)
    assert store.spans[-1] is None


async def test_silence_before_the_headers_is_a_stall() -> None:
    """Like any other."""

    async def mute(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(10)
        return web.Response()

    async with serving(mute) as origin, StorageTransport(stall_timeout=0.3) as storage:
        with pytest.raises(StorageTrouble) as raised:
            async with storage.open(SignedUrl(f"{origin}/x")):
                pass
    assert raised.value.stalled


async def test_a_consumer_that_waits_fills_no_memory() -> None:
    """Whatever its size, and however many downloads: what came early is bounded."""
    store = Store(some_bytes(200 * SEGMENT))
    async with (
        downloading(store, connections=16) as (downloader, sign, _),
        downloader.open(sign, name="object", urgency=1) as one,
        downloader.open(sign, name="object", urgency=1) as two,
    ):

        def buffered() -> int:
            return sum(piece.buffered for download in (one, two) for piece in download._pieces)

        await until(lambda: buffered() >= 15 * SEGMENT)
        waiting = 0
        while waiting < buffered():  # as long as more comes
            waiting = buffered()
            await asyncio.sleep(0.1)
        # 15 spans ahead, and the first of each, which stops at one span and what was under way
        assert 15 * SEGMENT <= waiting <= (15 + 2 * 2) * SEGMENT + 2 * 1024 * 1024
        assert b"".join([chunk async for chunk in one.chunks()]) == store.body
        assert b"".join([chunk async for chunk in two.chunks()]) == store.body


async def test_cancelled_downloads_give_everything_back() -> None:
    """At whatever moment."""
    store = Store(some_bytes(60 * SEGMENT), spoil=lambda _, __, answer: answer.update(wait=0.005))
    chance = random.Random(1)
    async with downloading(store) as (downloader, sign, _):
        for _ in range(40):
            task = asyncio.create_task(fetch(downloader, sign))
            await asyncio.sleep(chance.random() * 0.03)
            task.cancel()
            await asyncio.wait([task])
        assert await fetch(downloader, sign) == (0, store.body)


async def test_a_bug_in_a_span_ends_the_download() -> None:
    """Nobody waits for ever for what a dead task would have brought."""
    store = Store(some_bytes(20 * SEGMENT))
    async with downloading(store) as (downloader, sign, _):

        async def broken(refused: SignedUrl | None) -> SignedUrl:
            if refused is not None:
                message = "a bug"
                raise KeyError(message)
            return await sign(None)

        store.spoil = lambda number, _, answer: answer.update(status=403, body=b"") if number > 4 else None
        with pytest.raises(KeyError):
            async with asyncio.timeout(10):
                await fetch(downloader, broken)


async def test_turns_go_to_who_ranks_first() -> None:
    """What is waited for before what is fetched ahead, the more urgent first, in the order of asking; ranks can change."""
    turns = Turns(1)
    await turns.take(lambda: (0, 0))
    order: list[str] = []
    ranks = {"ahead": (1, 0), "later": (0, 5), "urgent": (0, 1), "same": (0, 5), "promoted": (1, 9)}

    async def wait(name: str) -> None:
        await turns.take(lambda: ranks[name])
        order.append(name)
        await asyncio.sleep(0)
        turns.give()

    tasks = [asyncio.create_task(wait(name)) for name in ranks]
    await asyncio.sleep(0)
    ranks["promoted"] = (0, 0)
    left = asyncio.create_task(wait("ahead"))
    await asyncio.sleep(0)
    left.cancel()
    turns.give()
    await asyncio.wait(tasks)
    assert order == ["promoted", "urgent", "later", "same", "ahead"]
    assert turns.free == 1


@pytest.mark.parametrize("sizes", [[262_144] * 200, [100] * 50_000, [1_000_000, 1, 1, 1] * 30])
async def test_a_limit_holds_within_five_per_cent(sizes: list[int]) -> None:
    """However the bytes come, side by side or one after the other, with pauses between."""
    now = 0.0

    async def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    throttle = Throttle(1_000_000, lambda: now, sleep)
    for size in sizes:
        await throttle.take(size)
    assert now == pytest.approx(sum(sizes) / 1_000_000, rel=0.05)
    now += 3600
    before = now
    await throttle.take(1_000_000)
    assert now - before >= 0.9, "an hour of rest is no credit"


async def test_a_limit_is_of_all_downloads_together() -> None:
    """Three at a time, one limit: 3 MB at 2 MB/s."""
    store = Store(some_bytes(1_000_000))
    async with downloading(store, throttle=Throttle(2_000_000)) as (downloader, sign, _):
        begun = time.monotonic()
        await asyncio.gather(*(fetch(downloader, sign) for _ in range(3)))
        assert time.monotonic() - begun >= 1.3


def test_what_a_range_answer_says() -> None:
    """`Content-Range` in its one form; strong tags alone; digests of a part are not of the whole."""
    assert served_span({"content-range": "bytes 5-9/10"}) == (Span(5, 10), 10)
    for odd in ("bytes 5-9/*", "bytes */10", "bytes 9-5/10", "bytes 5-10/10", "items 5-9/10", ""):
        assert served_span({"content-range": odd}) is None
    assert strong_validator({"etag": '"x"'}) == '"x"'
    for weak in ('W/"x"', "x", '"', '"a"b"', ""):
        assert strong_validator({"etag": weak}) is None
    headers = {"content-length": "5", "content-md5": "x", "x-amz-checksum-crc32": "y", "x-goog-hash": "z"}
    assert headers_of_whole(headers, Span(0, 5), 10) == {"content-length": "10", "x-goog-hash": "z"}
    assert headers_of_whole(headers, Span(0, 5), 5) == headers
