"""From offset pages to a proof, or to the honest absence of one.

Rows come newest first and shift while one reads: new checkpoints push rows down (seen twice), deletions and expiries
pull them up (skipped). **Each page must contain a row of the page before it**: rows keep their order, so whatever was
there throughout the walk was then seen. On top of that the number of distinct rows must be the server's
`total_count`, with what is known to have expired on the way taken into account; else the walk is taken again, and
after the third the answer is a sighting. A server without `total_count` must give the same rows twice.

A failed page, an unreadable row, a walk that makes no progress: a sighting, never a listing, and never a reason to ask
in another way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, TypeVar

from pydantic import ValidationError

from tinker_sync.api import wire
from tinker_sync.errors import (
    CredentialRefused,
    NotAllowed,
    NotFound,
    NotServed,
    RequestRefused,
    ServiceTrouble,
    TinkerSyncError,
)
from tinker_sync.model.checkpoint import Checkpoint, Listing, Sighting
from tinker_sync.model.moments import UNKNOWN_TIME, parse_time, to_micros
from tinker_sync.model.paths import PathInvalid, TinkerPath

if TYPE_CHECKING:
    from datetime import datetime

    from tinker_sync.api.client import RestClient

Mode = Literal["auto", "user", "runs", "both"]
CLOCK_LIMIT: Final = timedelta(minutes=10)
"""A clock that is further off proves no listing: expiry and age are judged by it."""
WALKS: Final = 3
OVERLAP: Final = 20
"""Rows of the page before that are asked for again: more than ever share a time, fewer than cost."""
MOST_PAGES: Final = 20_000
_IDLE_PAGES: Final = 5
"""Pages in a row without a new row: rows shift, but not for ever."""
_NO_SUCH_ROUTE: Final = (404, 405, 501)
"""Only these mean that `/checkpoints` is not there; anything else is a failed listing."""
_RUNS_AT_A_TIME: Final = 8
_RUNS_PAGE: Final = 100

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Page(Generic[Row]):
    """One answer: its rows, the total where the server says it, and how many rows could not be read."""

    rows: Sequence[Row]
    total: int | None
    unreadable: int = 0

    @property
    def length(self) -> int:
        """Rows that the server gave, readable or not."""
        return len(self.rows) + self.unreadable


@dataclass(slots=True)
class Walk(Generic[Row]):
    """All rows that were seen, newest sight of each, and every doubt about their completeness."""

    rows: dict[Hashable, Row] = field(default_factory=dict)
    doubts: list[str] = field(default_factory=list)
    totals: list[int] = field(default_factory=list)
    unreadable: int = 0
    failure: TinkerSyncError | None = None
    pages: int = 0


Fetch = Callable[[int, int], Awaitable[Page[Row]]]
Key = Callable[[Row], Hashable]


async def walk_pages(fetch: Fetch[Row], key: Key[Row], page_size: int) -> Walk[Row]:
    """Walk from the first row to the last, each page overlapping the one before.

    A first page that fails raises what `fetch` raised; a later one ends the walk with its doubt.
    """
    walk: Walk[Row] = Walk()
    page = await fetch(page_size, 0)
    tail = _take(walk, page, key)
    offset = idle = 0
    while page.length:
        reached = offset + page.length
        if page.total is not None and reached >= page.total:
            return walk
        if walk.pages >= MOST_PAGES:
            walk.doubts.append(f"no end after {MOST_PAGES:,} pages")
            return walk
        before = len(walk.rows)
        found = await _next_page(fetch, key, walk, page_size, reached, tail)
        if found is None:
            return walk
        page, keys, offset = found
        if page.length and keys == tail and offset:
            walk.doubts.append(f"the same rows again at {offset:,}: does the server look at the offset?")
            return walk
        tail = keys or tail
        idle = 0 if len(walk.rows) > before else idle + 1
        if page.length and (idle >= _IDLE_PAGES or (idle and offset + page.length <= reached)):
            # Nothing but what was seen already: the end, unless the server says that there is more.
            if page.total is not None and offset + page.length < page.total:
                walk.doubts.append(f"the server gives no rows beyond {reached:,}, and says there are {page.total:,}")
            return walk
    if walk.rows:
        walk.doubts.append(f"an empty page at {offset:,}, where rows must be")
    return walk


async def _next_page(
    fetch: Fetch[Row], key: Key[Row], walk: Walk[Row], page_size: int, reached: int, tail: AbstractSet[Hashable]
) -> tuple[Page[Row], AbstractSet[Hashable], int] | None:
    """The page behind `reached` that contains a row of the page before, and its keys; None when the walk ends here."""
    overlap = min(OVERLAP, max(1, len(tail) // 10))
    if len(tail) < 2:
        walk.doubts.append("the server gives one row at a time: no page can meet the one before")
        return None
    while True:
        offset = max(0, reached - overlap)
        try:
            page = await fetch(page_size, offset)
        except TinkerSyncError as error:
            walk.failure = error
            walk.doubts.append(f"the page at {offset:,} failed: {error}")
            return None
        keys = _take(walk, page, key)
        if not page.length or not keys.isdisjoint(tail):
            return page, keys, offset
        if offset == 0 or overlap >= max(page_size, 10_000):
            walk.doubts.append(f"rows were skipped at {offset:,}: the pages do not meet")
            return page, keys, offset
        overlap *= 4  # more was deleted above than the overlap covers: step further back


def _take(walk: Walk[Row], page: Page[Row], key: Key[Row]) -> AbstractSet[Hashable]:
    """Take up a page; the keys of its rows."""
    walk.pages += 1
    walk.unreadable += page.unreadable
    if page.total is not None and (page.total or page.length):
        walk.totals.append(page.total)
    rows = {key(row): row for row in page.rows}
    walk.rows.update(rows)
    return rows.keys()


async def prove(
    fetch: Fetch[Row],
    key: Key[Row],
    page_size: int,
    *,
    expired: Callable[[Row], bool] = lambda _: False,
    place: Callable[[Row], Hashable] | None = None,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> Walk[Row]:
    """Walk until the walk proves itself, three times at most; the last walk has its doubts.

    `place` tells which rows can only be one at a time (a path that is overwritten is seen as two), for the count.
    Rows of earlier walks stay in the answer of an unproven one: a sighting is enough to transfer.
    """
    seen: dict[Hashable, Row] = {}
    previous: frozenset[Hashable] | None = None
    walk: Walk[Row] = Walk()
    for attempt in range(WALKS):
        if attempt:
            await sleep(1.0)
        try:
            walk = await walk_pages(fetch, key, page_size)
            await _look_again_at_the_top(fetch, key, page_size, walk)
        except TinkerSyncError as error:
            if not attempt:
                raise
            walk.doubts.append(str(error))
            break
        seen |= walk.rows
        if walk.unreadable:
            walk.doubts.append(f"{walk.unreadable} rows could not be read")
            break
        if not walk.doubts:
            doubt = _count_doubt(walk, previous, expired, place or key)
            if doubt is None:
                return walk
            walk.doubts.append(doubt)
        previous = frozenset(walk.rows)
        if walk.failure is not None:
            break
    walk.rows = seen
    return walk


async def _look_again_at_the_top(fetch: Fetch[Row], key: Key[Row], page_size: int, walk: Walk[Row]) -> None:
    """Rows that came while one walked stand at the top: with them, the last total is the one that counts."""
    if walk.doubts or len(set(walk.totals)) < 2:
        return
    known = frozenset(walk.rows)
    walk.totals.clear()
    if not _take(walk, await fetch(page_size, 0), key) & known:
        walk.doubts.append("more came on the way than one page holds")


def _count_doubt(
    walk: Walk[Row],
    previous: frozenset[Hashable] | None,
    expired: Callable[[Row], bool],
    place: Callable[[Row], Hashable],
) -> str | None:
    if not walk.totals:
        if previous is not None and previous == frozenset(walk.rows):
            return None
        return "the server gives no total_count, and two walks did not agree"
    total = walk.totals[-1]
    distinct = len({place(row) for row in walk.rows.values()})
    if total == distinct:
        return None
    gone = len({place(row) for row in walk.rows.values() if expired(row)})
    if distinct - gone <= total < distinct:
        return None
    return f"{distinct:,} distinct rows were seen, total_count is {total:,}"


class AccountLister:
    """Lists the whole account in the configured way."""

    def __init__(
        self,
        client: RestClient,
        *,
        mode: Mode,
        page_size: int,
        now: Callable[[], datetime],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        service_time: Callable[[], datetime | None] = lambda: None,
    ) -> None:
        self._service_time = service_time
        self._client = client
        self._mode: Mode = mode
        self._page_size = page_size
        self._now = now
        self._sleep = sleep

    async def list(self) -> Listing | Sighting:
        """Everything that the account shows. Raises ServiceTrouble when not even the first page came."""
        seen_at = self._now()
        try:
            walk = await self._walk()
        except NotAllowed as error:
            message = f"the credential may not list checkpoints ({error}): is it a key of this account?"
            raise CredentialRefused(message) from error
        except RequestRefused as error:
            message = f"the account cannot be listed: {error}"
            raise ServiceTrouble(message) from error
        rows = _newest_of_each_path(walk.rows.values())
        skew = self._skew()
        if abs(skew) > CLOCK_LIMIT:
            side = "ahead of" if skew > timedelta(0) else "behind"
            walk.doubts.append(
                f"this host's clock is {timedelta(seconds=round(abs(skew).total_seconds()))} {side} the service's: set it (NTP), ages are read by it"
            )
        if walk.doubts:
            return Sighting(rows, seen_at, tuple(walk.doubts))
        return Listing(rows, seen_at)

    async def peek(self) -> Sighting:
        """The newest rows alone, where one call gives those; else everything, as a sighting. Raises ServiceTrouble."""
        if self._mode not in ("auto", "user"):
            found = await self.list()
            return Sighting(found.checkpoints, found.seen_at, ("a look",))
        seen_at = self._now()
        try:
            page = _as_page(await self._client.user_checkpoint_rows(self._page_size, 0))
        except RequestRefused as error:
            message = f"the account cannot be listed: {error}"
            raise ServiceTrouble(message) from error
        return Sighting(_newest_of_each_path(page.rows), seen_at, ("only the first page",))

    def _skew(self) -> timedelta:
        """How far this host's clock is ahead of the service's."""
        theirs = self._service_time()
        return timedelta(0) if theirs is None else self._now() - theirs

    async def _walk(self) -> Walk[Checkpoint]:
        if self._mode == "runs":
            return await self._by_runs()
        if self._mode == "user":
            return await self._by_user()
        if self._mode == "both":
            mine, theirs = await self._by_user(), await self._by_runs()
            mine.rows |= theirs.rows
            mine.doubts += theirs.doubts
            return mine
        try:
            return await self._by_user()
        except (NotFound, NotServed) as error:
            if error.status not in _NO_SUCH_ROUTE:
                raise
            return await self._by_runs()

    async def _by_user(self) -> Walk[Checkpoint]:
        async def fetch(limit: int, offset: int) -> Page[Checkpoint]:
            return _as_page(await self._client.user_checkpoint_rows(limit, offset))

        return await self._prove(fetch, self._page_size)

    async def _prove(self, fetch: Fetch[Checkpoint], page_size: int) -> Walk[Checkpoint]:
        return await prove(fetch, _key, page_size, expired=self._expired, place=lambda row: row.path, sleep=self._sleep)

    def _expired(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.expires_at is not None and checkpoint.expires_at <= self._now()

    async def _by_runs(self) -> Walk[Checkpoint]:
        async def fetch(limit: int, offset: int) -> Page[str]:
            answer = await self._client.list_training_runs(limit, offset)
            runs = [run.training_run_id for run in answer.training_runs]
            total = None if answer.cursor is None else answer.cursor.total_count
            return Page(runs, total, len(answer.unreadable))

        runs = await prove(fetch, lambda run: run, _RUNS_PAGE, sleep=self._sleep)
        merged: Walk[Checkpoint] = Walk(doubts=[f"training runs: {doubt}" for doubt in runs.doubts])
        turn = asyncio.Semaphore(_RUNS_AT_A_TIME)

        async def one(run: str) -> None:
            async with turn:
                walk = await self._of_run(run)
            merged.rows.update(walk.rows)
            merged.doubts += [f"run {run}: {doubt}" for doubt in walk.doubts]

        async with asyncio.TaskGroup() as group:
            for run in runs.rows.values():
                group.create_task(one(run))
        return merged

    async def _of_run(self, run: str) -> Walk[Checkpoint]:
        async def fetch(limit: int, offset: int) -> Page[Checkpoint]:
            del limit  # documented as unpaginated: the first request is the documented one
            if offset:
                return _as_page(await self._client.checkpoint_rows(run, self._page_size, offset))
            return _as_page(await self._client.checkpoint_rows(run))

        try:
            first = await fetch(self._page_size, 0)
            if first.total is None and not first.unreadable:
                return Walk(rows={_key(row): row for row in first.rows})
            if first.total is not None and first.total == len(first.rows):
                return Walk(rows={_key(row): row for row in first.rows}, totals=[first.total])
            return await self._prove(fetch, self._page_size)
        except TinkerSyncError as error:
            return Walk(doubts=[str(error)], failure=error)


def _as_page(answer: wire.CheckpointRows) -> Page[Checkpoint]:
    rows: list[Checkpoint] = []
    for row in answer.checkpoints:
        try:
            rows.append(from_json(row))
        except (PathInvalid, ValidationError):
            continue
    total = None if answer.cursor is None else answer.cursor.total_count
    return Page(rows, total, len(answer.checkpoints) - len(rows))


def from_json(row: Any) -> Checkpoint:
    """A listed row as a value. Raises PathInvalid, ValidationError.

    What is as documented is read here, at a fifth of the cost; everything else by `wire`, with all that it bears.
    """
    return _as_documented(row) or from_wire(wire.Checkpoint.model_validate(row))


def _as_documented(row: Any) -> Checkpoint | None:
    """What `wire` would make of a row in which nothing is odd; None for any other."""
    if not isinstance(row, dict):
        return None
    field: Callable[..., Any] = row.get
    path, listed_id, kind = field("tinker_path"), field("checkpoint_id", ""), field("checkpoint_type", "")
    time, expires_at, metadata = field("time"), field("expires_at"), field("user_metadata")
    size_bytes, public = field("size_bytes"), field("public")
    try:
        if (
            not "".join((*row, path, listed_id, kind)).isascii()
            or not (metadata is None or "".join((*metadata, *metadata.values())).isascii())
            or not (size_bytes is None or (type(size_bytes) is int and 0 <= size_bytes < 1 << 63))
            or not (public is None or public is False or public is True)
        ):
            return None
        made, ends = parse_time(time), None if expires_at is None else parse_time(expires_at)
    except (TypeError, ValueError, AttributeError):
        return None
    return Checkpoint(TinkerPath.parse(path), made, size_bytes, public is True, metadata, ends, listed_id)


def from_wire(row: wire.Checkpoint) -> Checkpoint:
    """A listed row as a value; run, type and name from its tinker path. Raises PathInvalid."""
    return Checkpoint(
        path=TinkerPath.parse(row.tinker_path),
        time=row.time or UNKNOWN_TIME,
        size_bytes=row.size_bytes,
        public=row.public,
        user_metadata=row.user_metadata,
        expires_at=row.expires_at,
        listed_id=row.checkpoint_id,
    )


def _key(checkpoint: Checkpoint) -> Hashable:
    return checkpoint.path, to_micros(checkpoint.time), checkpoint.size_bytes  # a number hashes faster than a moment


def _newest_of_each_path(rows: Iterable[Checkpoint]) -> tuple[Checkpoint, ...]:
    """A path that was overwritten during the walk was seen twice: the newer object is the one that is there."""
    chosen: dict[TinkerPath, Checkpoint] = {}
    for row in rows:
        other = chosen.setdefault(row.path, row)
        if other is not row and other.time <= row.time:
            chosen[row.path] = row
    return tuple(chosen.values())
