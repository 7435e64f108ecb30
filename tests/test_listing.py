"""The listing proof: what was there all along is in it, or it is no listing."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.conftest import NOW
from tinker_sync.api import wire
from tinker_sync.api.client import RestClient
from tinker_sync.api.listing import AccountLister, Page, from_json, from_wire, prove
from tinker_sync.errors import CredentialRefused, ServiceTrouble, Unreachable
from tinker_sync.model.checkpoint import Checkpoint, Listing, Sighting
from tinker_sync.model.paths import PathInvalid
from tinker_sync.sandbox import Fault, Sandbox, adapter
from tinker_sync.transport import ApiTransport

if TYPE_CHECKING:
    from collections.abc import Callable

PAYLOAD = adapter(1)


async def no_sleep(_: float) -> None:
    """Nothing to wait for."""


@dataclass
class Rows:
    """An offset-paged list, newest first, that changes between pages as it is told."""

    rows: list[int]
    cap: int = 1_000_000
    total: Callable[[Rows], int | None] = lambda self: len(self.rows)
    before: Callable[[Rows, int], None] = lambda self, page: None
    pages: int = 0
    removed: set[int] = field(default_factory=set)

    async def fetch(self, limit: int, offset: int) -> Page[int]:
        """One page."""
        self.before(self, self.pages)
        self.pages += 1
        return Page(self.rows[offset : offset + min(limit, self.cap)], self.total(self))

    async def walk(self, page_size: int) -> Any:
        """Prove, as the account does."""
        return await prove(self.fetch, lambda row: row, page_size, sleep=no_sleep)


@given(st.integers(0, 400), st.integers(2, 60), st.integers(1, 100), st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
async def test_a_listing_never_lacks_what_was_there_all_along(count: int, page_size: int, cap: int, seed: int) -> None:
    """Random insertions at the top and deletions anywhere between pages: proven means complete."""
    chance = random.Random(seed)
    fresh = iter(range(10_000, 20_000))

    def churn(rows: Rows, _: int) -> None:
        if chance.random() < 0.3:
            rows.rows[:0] = [next(fresh) for _ in range(chance.randint(0, 4))]
        if chance.random() < 0.3:
            for _ in range(chance.randint(0, 40)):
                if rows.rows:
                    rows.removed.add(rows.rows.pop(chance.randrange(min(len(rows.rows), 80))))

    rows = Rows(list(range(count, 0, -1)), cap=max(cap, 2), before=churn)
    walk = await rows.walk(page_size)
    throughout = set(range(1, count + 1)) - rows.removed
    if not walk.doubts:
        assert throughout <= set(walk.rows)


@pytest.mark.parametrize("count", [0, 1, 2, 999, 1000, 1001, 2500])
@pytest.mark.parametrize("cap", [1_000_000, 100])
async def test_a_quiet_account_is_proven(count: int, cap: int) -> None:
    """Any size, also from a server that caps pages far below what was asked; few requests."""
    rows = Rows(list(range(count)), cap=cap)
    walk = await rows.walk(1000)
    assert not walk.doubts
    assert len(walk.rows) == count
    assert rows.pages <= count / (min(cap, 1000) - 20) + 2


async def test_a_busy_account_is_proven_too() -> None:
    """One new checkpoint before every page of a long walk: complete with them, in one walk."""
    fresh = iter(range(10_000, 20_000))
    rows = Rows(list(range(3000, 0, -1)), before=lambda rows, _: rows.rows.insert(0, next(fresh)))
    walk = await rows.walk(100)
    assert not walk.doubts
    assert set(range(1, 3001)) <= set(walk.rows)
    assert rows.pages < 60


async def test_a_thousand_pages() -> None:
    """No limit in the way, and no more requests than pages and their overlap need."""
    rows = Rows(list(range(100_000)))
    walk = await rows.walk(120)
    assert not walk.doubts
    assert rows.pages <= 1001


@pytest.mark.parametrize(
    ("total", "said"),
    [
        (lambda rows: len(rows.rows) + 1, "gives no rows beyond"),
        (lambda rows: len(rows.rows) - 1, "total_count is"),
        (lambda rows: 0, "total_count is"),
    ],
)
async def test_a_total_that_does_not_fit_proves_nothing(total: Any, said: str) -> None:
    """Rows and total_count must agree."""
    walk = await Rows(list(range(250)), total=total).walk(100)
    assert said in " ".join(walk.doubts)
    assert len(walk.rows) == 250 or total(Rows(list(range(250)))) < 250


async def test_without_a_total_two_walks_must_agree() -> None:
    """No cursor: the same rows twice are a listing; rows that keep changing are not."""
    quiet = Rows(list(range(250)), total=lambda _: None)
    assert not (await quiet.walk(100)).doubts
    fresh = iter(range(1000, 9000))
    busy = Rows(list(range(250)), total=lambda _: None, before=lambda rows, _: rows.rows.insert(0, next(fresh)))
    assert (await busy.walk(100)).doubts
    empty = Rows([], total=lambda _: None)
    assert not (await empty.walk(100)).doubts
    assert empty.pages == 2, "nothing is proven by one look"


async def test_a_server_that_ignores_the_offset_ends() -> None:
    """The same page again and again is no progress, and no endless loop."""

    class Stuck(Rows):
        async def fetch(self, limit: int, offset: int) -> Page[int]:
            self.pages += 1
            return Page(self.rows[:limit], 5000)

    stuck = Stuck(list(range(300)))
    walk = await stuck.walk(100)
    assert walk.doubts
    assert stuck.pages < 40


async def test_a_server_without_total_that_ignores_the_offset() -> None:
    """The same rows at another offset: a doubt after a few requests, not a proof by two equal walks."""

    class Stuck(Rows):
        async def fetch(self, limit: int, offset: int) -> Page[int]:
            self.pages += 1
            return Page(self.rows[:limit], None)

    stuck = Stuck(list(range(300)))
    assert (await stuck.walk(100)).doubts
    assert stuck.pages < 10


async def test_nothing_beyond_some_offset_and_no_total() -> None:
    """An empty page where rows must stand is a doubt, however often it comes."""

    class Wall(Rows):
        async def fetch(self, limit: int, offset: int) -> Page[int]:
            return Page([] if offset > 300 else self.rows[offset : offset + limit], None)

    assert (await Wall(list(range(1000))).walk(100)).doubts


async def test_one_row_at_a_time_proves_nothing() -> None:
    """Pages that cannot overlap cannot meet."""
    assert (await Rows(list(range(9)), cap=1).walk(100)).doubts


async def test_a_path_that_is_overwritten_all_the_time_does_not_prevent_a_proof() -> None:
    """Seen as two objects, it is one row of the count."""
    version = iter(range(1000))

    class Rolling(Rows):
        async def fetch(self, limit: int, offset: int) -> Any:
            self.pages += 1
            rows = [("rolling", next(version)), *((f"p{n}", 0) for n in self.rows)]
            return Page(rows[offset : offset + limit], len(rows))

    rolling = Rolling(list(range(500)))
    walk = await prove(rolling.fetch, lambda row: row, 100, place=lambda row: row[0], sleep=no_sleep)
    assert not walk.doubts
    assert rolling.pages < 20


async def test_an_empty_page_in_the_middle_is_no_end() -> None:
    """The server says that there is more: a sighting."""

    class Hole(Rows):
        async def fetch(self, limit: int, offset: int) -> Page[int]:
            return Page([] if offset else self.rows[:limit], len(self.rows))

    assert "empty page" in " ".join((await Hole(list(range(300))).walk(100)).doubts)


# Through the API


async def listed(sandbox: Sandbox, mode: Any = "auto", page_size: int = 1000) -> Listing | Sighting:
    """The account's list through the real client."""
    async with ApiTransport(sandbox.base_url, KeyOnly(sandbox.key), timeout=2.0) as transport:
        lister = AccountLister(RestClient(transport), mode=mode, page_size=page_size, now=lambda: NOW, sleep=no_sleep)
        return await lister.list()


class KeyOnly:
    """An authorizer with one key."""

    def __init__(self, key: str) -> None:
        self._key = key

    async def headers(self) -> dict[str, str]:
        """The header."""
        return {"X-API-Key": self._key}

    async def renew(self, used: object, challenge: str) -> bool:
        """There is no other."""
        return False


def fill(sandbox: Sandbox, count: int = 30) -> None:
    """So many checkpoints in both types."""
    run = sandbox.account.add_run("r:train:0")
    for n in range(count // 2):
        for kind in ("training", "sampler"):
            sandbox.account.add(run, f"{n:06}", kind, payload=PAYLOAD, time=NOW + timedelta(minutes=n))


async def test_a_failed_page_is_a_sighting_and_never_a_fallback(sandbox: Sandbox) -> None:
    """What came is shown, the rest is doubt; the other way of listing is not asked."""
    fill(sandbox, 90)
    sandbox.faults.append(Fault("list", "status", match="offset=36;", status=400))
    found = await listed(sandbox, page_size=40)
    assert isinstance(found, Sighting)
    assert 0 < len(found.checkpoints) < 90
    assert not any("training_runs" in path for _, path in sandbox.requests)


async def test_only_a_missing_route_makes_it_list_by_runs(sandbox: Sandbox) -> None:
    """404 on /checkpoints: the runs' lists are merged. 500 there: an error, no fallback."""
    fill(sandbox)
    sandbox.quirks.no_user_listing = True
    found = await listed(sandbox)
    assert isinstance(found, Listing)
    assert len(found.checkpoints) == 30
    sandbox.quirks.no_user_listing = False
    sandbox.faults.append(Fault("list", "status", status=500, headers={"x-should-retry": "false"}))
    with pytest.raises(ServiceTrouble):
        await listed(sandbox)


async def test_both_views_are_merged(sandbox: Sandbox) -> None:
    """A server whose user listing leaves samplers out needs `both`."""
    fill(sandbox)
    sandbox.quirks.training_only_listing = True
    assert len((await listed(sandbox)).checkpoints) == 15
    assert len((await listed(sandbox, "both")).checkpoints) == 30


async def test_rows_of_other_servers_are_read(sandbox: Sandbox) -> None:
    """Naive times, no sizes, bare ids: run, type and name come from the tinker path."""
    fill(sandbox, 2)
    sandbox.quirks.naive_times = sandbox.quirks.no_sizes = sandbox.quirks.bare_ids = True
    found = await listed(sandbox)
    assert {row.checkpoint_type for row in found.checkpoints} == {"training", "sampler"}
    assert all(row.time == NOW and row.size_bytes is None and row.listed_id == "000000" for row in found.checkpoints)


async def test_a_row_that_cannot_be_read_makes_it_a_sighting(sandbox: Sandbox) -> None:
    """The good rows are there; what the bad one was, nobody knows."""
    fill(sandbox, 2)
    body = (
        b'{"checkpoints":[{"tinker_path":"tinker://r/weights/a","time":"never","size_bytes":-3,"user_metadata":7},'
        b'{"tinker_path":"nonsense"},5,{}],"cursor":{"offset":0,"limit":9,"total_count":4}}'
    )
    sandbox.faults.append(Fault("list", "body", body=body, status=200))
    found = await listed(sandbox)
    assert isinstance(found, Sighting)
    assert [row.path.name for row in found.checkpoints] == ["a"]


@pytest.mark.parametrize("kind", ["html", "drop", "body"])
async def test_an_answer_that_is_none_raises(sandbox: Sandbox, kind: Any) -> None:
    """HTML, a dropped connection, JSON of another shape: trouble of the service, in words."""
    sandbox.faults.append(Fault("list", kind, status=200, body=b'{"rows": []}'))
    with pytest.raises(ServiceTrouble):
        await listed(sandbox)


async def test_a_wrong_key_and_no_server(sandbox: Sandbox) -> None:
    """401 and 403 on the listing refuse the credential; a closed port is unreachable."""
    sandbox.key = "tml-other"
    async with ApiTransport(sandbox.base_url, KeyOnly("tml-wrong"), timeout=2.0) as transport:
        with pytest.raises(CredentialRefused, match="check"):
            await RestClient(transport).list_user_checkpoints()
    sandbox.faults.append(Fault("list", "status", status=403))
    with pytest.raises(CredentialRefused):
        await listed(sandbox)
    async with ApiTransport("http://127.0.0.1:1/x", KeyOnly("tml-x"), timeout=1.0) as transport:
        with pytest.raises(Unreachable, match="refused"):
            await RestClient(transport).list_user_checkpoints()


ROW = {
    "tinker_path": "tinker://r:train:0/weights/1",
    "checkpoint_id": "weights/1",
    "checkpoint_type": "training",
    "time": "2026-01-01T00:00:00.5Z",
    "size_bytes": 5,
    "public": False,
    "user_metadata": {"step": "1"},
    "expires_at": "2027-01-01T00:00:00+02:00",
}
ODD = st.sampled_from(
    [
        *(
            None,
            True,
            False,
            0,
            -1,
            1 << 63,
            1.7e9,
            float("inf"),
            10**400,
            "",
            "x",
            "é",
            "\ud800",
            " 2026-01-01T00:00:00Z ",
        ),
        *("2026-01-01", "2026-01-01T00:00:00", "9999-12-31T23:59:59-05:00", "0001-01-01T00:00:00+05:00"),
        *("tinker://r/weights/é", "tinker://r/x/\ud800", "tinker://r/weights", "tinker:///weights/a"),
        *([], ["a"], {}, {"a": "b"}, {"a": 1}, {"é": "b"}, {"a": "\ud800"}, {"a": None}),
    ]
)


@given(
    st.dictionaries(st.sampled_from([*ROW, "later", "é", "\ud800"]), ODD, max_size=3),
    st.lists(st.sampled_from([*ROW]), max_size=2),
)
def test_a_row_is_read_as_the_model_reads_it(odd: dict[str, Any], absent: list[str]) -> None:
    """The short way makes the same value as `wire`, and finds the same rows unreadable."""

    def read(how: Any) -> Checkpoint | None:
        try:
            return how({name: value for name, value in (ROW | odd).items() if name not in absent})
        except (PathInvalid, ValidationError):
            return None

    assert repr(read(from_json)) == repr(read(lambda row: from_wire(wire.Checkpoint.model_validate(row))))
