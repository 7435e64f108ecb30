"""What an interrupted transfer leaves, and what the next attempt makes of it."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import io
import json
import os
import random
import re
import signal
import subprocess
import tarfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import NOW, Site, command, run
from tests.test_destination import OBJECT, PATH, make_manifest, make_tree
from tests.test_sync import expected
from tinker_sync.acquire import download
from tinker_sync.acquire.archive import _Signing as Signing
from tinker_sync.acquire.tar import Limits
from tinker_sync.acquire.unpack import Unpacker
from tinker_sync.api.account import SignedArchive
from tinker_sync.catalog.store import CatalogUnusable
from tinker_sync.destination import files as durable
from tinker_sync.destination import local, progress
from tinker_sync.errors import DiskTrouble, NoSpace, StorageTrouble
from tinker_sync.model.checkpoint import Identity, Sighting
from tinker_sync.model.evidence import Claim
from tinker_sync.model.manifest import FileEntry
from tinker_sync.model.moments import rfc3339
from tinker_sync.model.paths import PayloadPath, SignedUrl, TinkerPath
from tinker_sync.model.work import Transfer
from tinker_sync.sandbox import Fault, Payload, adapter
from tinker_sync.sandbox.adapters import PayloadFile, safetensors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from datetime import datetime


RUN = "39aa5eb2-e234-5a95-ab68-896e4cac8c45:train:0"
SIZE = 3_000_000
OTHER = TinkerPath("run:train:0", "weights", "other")


@pytest.fixture
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushed and noted every 200 kB instead of every 64 MiB, spans of 64 KiB."""
    monkeypatch.setattr(durable, "FLUSH_EVERY", 200_000)
    monkeypatch.setattr(durable, "_QUICK", 0)
    monkeypatch.setattr(local, "FLUSH_EVERY", 200_000)
    monkeypatch.setattr(download, "SEGMENT", 65_536)
    monkeypatch.setattr(download, "FIRST", 4 * 65_536)


@contextmanager
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What is logged, as dictionaries."""
    with structlog.testing.capture_logs() as events:
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(0))
        monkeypatch.setattr("tinker_sync.transfer.log", structlog.get_logger())
        yield events


def training(*, seed: int = 1) -> Payload:
    """Configuration, weights, a directory with optimizer state, marker: the weights in the middle of it."""
    made = adapter(seed, pad_to=SIZE, optimizer=True).files
    state = safetensors("optimizer/state.safetensors", {"m": ("U8", [SIZE // 2])}, seed)
    return Payload((*made[:2], state, PayloadFile.of("empty", b""), *made[2:]))


class After:
    """A reporter that does something once so many bytes have come."""

    def __init__(self, size: int, do: Callable[[], object]) -> None:
        self._left = size
        self._do = do

    def advanced(self, _: object, received: int) -> None:
        """More came."""
        before, self._left = self._left, self._left - received
        if before > 0 >= self._left:
            self._do()

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


async def interrupt(site: Site, after: int) -> None:
    """A pass that is cancelled after so many bytes, as SIGTERM does."""
    reached = asyncio.Event()
    task = asyncio.create_task(site.sync(After(after, reached.set)))
    async with asyncio.timeout(20):
        await reached.wait()
    task.cancel()
    await asyncio.wait([task])


def edit_note(home: Path, change: Callable[[dict[str, Any]], object], *, seal: bool = True) -> None:
    """Change a note; sealed anew, as nobody but a program would."""
    path = home / "progress.json"
    note = json.loads(path.read_text())
    change(note)
    if seal:
        note.pop("note_sha256")
        note["note_sha256"] = progress._digest(note)
    path.write_text(json.dumps(note))


def first_bytes(site: Site) -> list[int]:
    """Where each storage request began."""
    spans = [re.match(r"bytes=(\d+)-", found.get("range", "")) for found in site.sandbox.storage_requests]
    return [int(span.group(1)) for span in spans if span is not None]


@pytest.mark.usefixtures("_often")
@pytest.mark.parametrize("prefix", ["", "big/"])
async def test_a_pass_goes_on_where_the_last_one_was_stopped(
    site: Site, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    """What is durable is not fetched again; the files are the same as ever, and staging is empty at the end."""
    payload = Payload(training().files, prefix=prefix)
    made = site.sandbox.account.add(RUN, "big", payload=payload)
    site.transfer = {"bandwidth": 3_000_000, "stall_timeout": "5s"}
    await interrupt(site, 2_500_000)
    note = json.loads((site.staging()[0] / "progress.json").read_text())
    assert note["tinker_path"] == str(made.path)
    said = await asyncio.to_thread(partial(run, ["--config", str(site.write_config()), "status"], check=0))
    assert re.search(r"1 is partly here \(2(\.\d)? MB\): the next attempt goes on from there", said.stdout)
    site.sandbox.storage_requests.clear()
    site.transfer = {}
    with logged(monkeypatch) as events:
        result = await site.sync()
    assert result.transferred == [made.path]
    assert site.payload(made.path) == expected(payload)
    assert min(first_bytes(site)) >= 2_000_000
    (resumed,) = [event for event in events if event["event"] == "transfer.resumed"]
    assert resumed["bytes"] >= 2_000_000
    assert site.staging() == []
    directory = site.directory(made.path)
    assert not list(directory.rglob("progress.json"))


@pytest.mark.usefixtures("_often")
async def test_again_and_again(site: Site) -> None:
    """Stopped many times, each time a little further; nothing is fetched twice but what was not durable."""
    payload = training()
    made = site.sandbox.account.add(RUN, "big", payload=payload)
    site.transfer = {"bandwidth": 4_000_000, "stall_timeout": "5s"}
    for _ in range(3):
        await interrupt(site, 1_400_000)
    site.transfer = {}
    assert (await site.sync()).transferred == [made.path]
    assert site.payload(made.path) == expected(payload)
    assert first_bytes(site).count(0) == 1


@pytest.mark.usefixtures("_often")
async def test_a_storage_that_fails_in_the_middle_is_gone_on_with(site: Site) -> None:
    """Not only a dead process: a failed attempt leaves what is durable for the next one."""
    payload = training()
    made = site.sandbox.account.add(RUN, "big", payload=payload)
    gone = Fault("storage", "status", times=1, status=404)
    result = await site.sync(After(2_500_000, lambda: site.sandbox.faults.append(gone)))
    assert result.transferred == [made.path]
    assert site.payload(made.path) == expected(payload)
    assert len([raw for _, raw in site.sandbox.requests if raw.endswith("/archive")]) == 2
    assert first_bytes(site).count(0) == 1


@pytest.mark.usefixtures("_often")
@pytest.mark.parametrize("how", ["etag", "identity"])
async def test_another_object_is_fetched_from_its_first_byte(
    site: Site, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Packed again upstream, or overwritten: no byte of the old one is in the new one."""
    site.sandbox.account.add(RUN, "big", payload=training(), time=NOW)
    site.transfer = {"bandwidth": 3_000_000, "stall_timeout": "5s"}
    await interrupt(site, 2_500_000)
    site.transfer = {}
    fresh = training(seed=2)
    made = site.sandbox.account.add(RUN, "big", payload=fresh, time=NOW if how == "etag" else None)
    if how == "etag":
        site.sandbox.faults.append(Fault("storage", "none", headers={"ETag": '"packed-again"'}))  # type: ignore[arg-type]
    with logged(monkeypatch) as events:
        result = await site.sync()
    assert result.transferred == [made.path]
    assert site.payload(made.path) == expected(fresh)
    assert [event["reason"] for event in events if event["event"] == "transfer.starts_over"]
    assert site.staging() == []


def overwritten(site: Site) -> tuple[Payload, datetime, Callable[[], None]]:
    """A checkpoint, the payload and time of another that takes its place behind the same URLs, and what does that."""
    made = site.sandbox.account.add(RUN, "big", payload=training(), time=NOW)
    site.transfer = {"bandwidth": 10_000_000, "stall_timeout": "5s"}
    fresh, later = training(seed=2), NOW + timedelta(minutes=5)

    def overwrite() -> None:
        made.payload, made.time = fresh, later

    return fresh, later, overwrite


def stands_as_itself(site: Site, path: TinkerPath, payload: Payload, time: datetime) -> None:
    """The bytes are those of the time that the manifest says, and nothing else stands there."""
    assert site.payload(path) == expected(payload)
    assert json.loads((site.directory(path) / ".tinker-sync.json").read_text())["time"] == rfc3339(time)
    assert [found.name for found in site.directory(path).parent.iterdir()] == ["big"]
    assert site.staging() == []


@pytest.mark.usefixtures("_often")
@pytest.mark.parametrize("when", ["in the middle", "between two attempts"])
async def test_what_is_overwritten_while_it_is_copied_never_stands_under_the_old_time(site: Site, when: str) -> None:
    """The new one is copied in the same pass, as itself; the old one, of which only a part came, is nowhere."""
    fresh, later, overwrite = overwritten(site)

    def do() -> None:
        overwrite()
        if when != "in the middle":
            site.sandbox.faults.append(Fault("storage", "status", times=1, status=404))

    result = await site.sync(After(1_500_000, do))
    (path,) = result.transferred
    assert (result.failed, result.skipped) == ({}, {})
    stands_as_itself(site, path, fresh, later)


@pytest.mark.usefixtures("_often")
async def test_a_poll_that_sees_the_new_one_first_makes_no_second_transfer(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is what comes next already."""
    fresh, later, overwrite = overwritten(site)
    async with site.opened() as mirror:
        monkeypatch.setattr(mirror._transferrer, "_reporter", After(1_500_000, overwrite))
        look = mirror._look

        async def slow_look(transfer: Transfer) -> Any:
            await mirror._poll()
            return await look(transfer)

        monkeypatch.setattr(mirror, "_look", slow_look)
        result = await mirror.sync()
    (path,) = result.transferred
    assert (result.failed, result.exit_code) == ({}, 0)
    stands_as_itself(site, path, fresh, later)


@pytest.mark.usefixtures("_often")
async def test_what_was_asked_for_is_fetched_though_it_is_overwritten(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`fetch` of what the selection leaves out: the wish is for the new one too."""
    fresh, later, overwrite = overwritten(site)
    site.mirror = {"exclude": ["*/*/*"]}
    path = TinkerPath(RUN, "weights", "big")
    async with site.opened() as mirror:
        monkeypatch.setattr(mirror._transferrer, "_reporter", After(1_500_000, overwrite))
        result = await mirror.fetch([path])
    assert (result.transferred, result.failed, result.skipped) == ([path], {}, {})
    stands_as_itself(site, path, fresh, later)


async def test_one_file_that_fails_fails_the_checkpoint_aloud(site: Site) -> None:
    """While others are on their way: it is a failure, and no stop that nobody asked for."""
    files = tuple(safetensors(f"part-{n}.safetensors", {"m": ("U8", [400_000])}, n) for n in range(12))
    made = site.sandbox.account.add(RUN, "big", "external", payload=Payload((adapter(1).files[0], *files)))
    site.transfer = {"bandwidth": 3_000_000, "stall_timeout": "5s"}
    site.sandbox.faults.append(Fault("storage", "status", match="#part-3", status=404))
    result = await site.sync()
    assert "404" in result.failed[made.path][0]
    assert result.exit_code == 1


@pytest.mark.usefixtures("_often")
async def test_files_of_two_objects_are_no_replica(site: Site) -> None:
    """External, file by file, overwritten between two of them: no ETag conflicts, and yet nothing mixed stands there."""
    old, new = (
        Payload(
            (
                adapter(1).files[0],
                *(safetensors(f"part-{n}.safetensors", {"m": ("U8", [400_000])}, n + seed) for n in range(12)),
            )
        )
        for seed in (0, 100)
    )
    made = site.sandbox.account.add(RUN, "big", "external", payload=old, time=NOW)
    later = NOW + timedelta(minutes=5)
    site.transfer = {"bandwidth": 10_000_000, "stall_timeout": "5s"}

    def overwrite() -> None:
        made.payload = Payload(old.files[:8] + new.files[8:])  # what came by then is the old one's
        made.time = later

    result = await site.sync(After(300_000, overwrite))
    assert result.transferred == [made.path]
    assert json.loads((site.directory(made.path) / ".tinker-sync.json").read_text())["time"] == rfc3339(later)
    assert [found.name for found in site.directory(made.path).parent.iterdir()] == ["big"]


async def test_what_left_no_note_is_not_taken_for_what_was_overwritten(site: Site) -> None:
    """A small one, cut and overwritten before the next attempt: no ETag tells, a look at the run does."""
    made = site.sandbox.account.add(RUN, "big", payload=adapter(1), time=NOW)
    fresh, later = adapter(2), NOW + timedelta(minutes=5)

    def overwrite() -> None:
        made.payload, made.time = fresh, later

    site.sandbox.faults.append(Fault("storage", "cut", times=1, at=2000))
    site.sandbox.quirks.etags = site.sandbox.quirks.ranges = site.sandbox.quirks.digests = False
    result = await site.sync(After(1000, overwrite))
    assert result.transferred == [made.path]
    stands_as_itself(site, made.path, fresh, later)


@pytest.mark.usefixtures("_often")
async def test_what_is_overwritten_all_the_time_is_a_failure_in_the_end(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """External files that never hold still: three attempts, and it is told, with a time for the next."""
    files = tuple(safetensors(f"part-{n}.safetensors", {"m": ("U8", [50_000])}, n) for n in range(3))
    made = site.sandbox.account.add(RUN, "big", "external", payload=Payload((adapter(1).files[0], *files)), time=NOW)
    async with site.opened() as mirror:
        acquire = mirror._transferrer._files.acquire

        async def acquire_and_overwrite(*given: Any) -> Any:
            acquired = await acquire(*given)
            made.time += timedelta(minutes=1)
            return acquired

        monkeypatch.setattr(mirror._transferrer._files, "acquire", acquire_and_overwrite)
        async with asyncio.timeout(20):
            result = await mirror.sync()
    assert result.transferred == []
    assert "overwritten while it was copied" in result.failed[made.path][0]
    assert site.staging() == []


async def test_a_listing_begun_before_brings_nothing_overwritten_back(site: Site) -> None:
    """It ends after a look at the run: what it shows of that checkpoint, or lacks, is old; a later one is right."""
    made = site.sandbox.account.add(RUN, "big", payload=adapter(1), time=NOW)
    async with site.opened() as mirror:
        before = await mirror._survey()
        made.payload, made.time = adapter(2), NOW + timedelta(minutes=5)
        born = site.sandbox.account.add(RUN, "born", payload=adapter(3))
        for path in (made.path, born.path):
            await mirror._look(Transfer(path, NOW, None, 1))
        shown = {row.path: row.time for row in mirror._up_to_date(before).checkpoints}
        assert shown == {made.path: made.time, born.path: born.time}
        later = await mirror._survey()
        assert mirror._up_to_date(later) is later
        assert mirror._seen == {}


@pytest.mark.parametrize("late", ["_note_lost", "_within_allowance"])
async def test_a_poll_that_is_overtaken_by_a_look_plans_what_the_look_saw(
    site: Site, monkeypatch: pytest.MonkeyPatch, late: str
) -> None:
    """Between its listing and its plan, or between its plan and what it offers: the old object is not asked for."""
    made = site.sandbox.account.add(RUN, "big", payload=adapter(1), time=NOW)
    async with site.opened() as mirror:
        await mirror._poll()
        (old,) = mirror._queue.pending()
        assert old.time == NOW
        real = getattr(mirror, late)

        async def overtaken(*given: Any) -> Any:
            made.payload, made.time = adapter(2), NOW + timedelta(minutes=5)
            mirror._queue.claim(lambda _: True)
            assert await mirror._is_another_now(old, await mirror._look(old))
            return await real(*given)

        with monkeypatch.context() as patch:
            done = []

            async def once(*given: Any) -> Any:
                if done:
                    return await real(*given)
                done.append(True)
                return await overtaken(*given)

            patch.setattr(mirror, late, once)
            await mirror._poll()
        (waiting,) = mirror._queue.pending()
        assert waiting.time == mirror._rows[made.path].time == made.time
        result = await mirror.sync()
        assert (result.transferred, result.failed) == ([made.path], {})
    stands_as_itself(site, made.path, made.payload, made.time)


async def test_who_asked_for_one_object_is_not_told_of_another(site: Site) -> None:
    """The one that was copied when it was overwritten ends first: that is not what `fetch` waits for."""
    made = site.sandbox.account.add(RUN, "big", payload=adapter(1), time=NOW)
    async with site.opened() as mirror:
        before = Transfer(made.path, NOW, None, 1)
        made.payload, made.time = adapter(2), NOW + timedelta(minutes=5)
        outcomes = await mirror._ask([made.path], mirror.result)
        mirror._over(before, "committed", "", 1)
        assert not outcomes[made.path].done()
        await mirror._work()
        assert outcomes[made.path].result()[0] == "committed"
    stands_as_itself(site, made.path, made.payload, made.time)


async def test_who_asked_for_what_was_put_back_is_told(site: Site) -> None:
    """Overwritten, asked for, and then the old one again, which is here: no search without end."""
    made = site.sandbox.account.add(RUN, "big", payload=adapter(1), time=NOW)
    await site.sync()
    async with site.opened() as mirror:
        made.time = NOW + timedelta(minutes=5)
        outcomes = await mirror._ask([made.path], mirror.result)
        made.time = NOW
        await mirror._look(Transfer(made.path, NOW, None, 1))
        async with asyncio.timeout(10):
            await mirror._work()
        assert outcomes[made.path].result()[:2] == ("skipped", "already here")


@pytest.mark.parametrize("answers", [True, False])
async def test_what_is_found_stale_is_looked_at(site: Site, *, answers: bool) -> None:
    """A transfer of what was overwritten: what is there now is copied; where nobody can tell, that is a failure."""
    made = site.sandbox.account.add(RUN, "big", payload=adapter(1), time=NOW)
    async with site.opened() as mirror:
        await mirror._poll()
        made.payload, made.time = adapter(2), NOW + timedelta(minutes=5)
        mirror._rows = {}
        if not answers:
            site.sandbox.faults.append(Fault("run", "status", status=400))
        await mirror._work()
        if answers:
            assert (mirror.result.transferred, mirror.result.failed) == ([made.path], {})
            stands_as_itself(site, made.path, made.payload, made.time)
        else:
            assert "cannot be told" in mirror.result.failed[made.path][0]


@pytest.mark.usefixtures("_often")
@pytest.mark.parametrize("what", ["_plan", "known"])
async def test_a_catalog_that_fails_while_it_is_planned_anew_stops_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """What was overwritten is copied all the same."""
    fresh, later, overwrite = overwritten(site)
    async with site.opened() as mirror:
        plan = mirror._plan

        def fail(*_: object) -> None:
            message = "the catalog cannot be read"
            raise CatalogUnusable(message)

        async def plan_once(found: Any, known: Any) -> None:
            if isinstance(found, Sighting):
                fail()
            await plan(found, known)

        if what == "known":
            monkeypatch.setattr(mirror._catalog, "known", fail)
        else:
            monkeypatch.setattr(mirror, "_plan", plan_once)
        monkeypatch.setattr(mirror._transferrer, "_reporter", After(1_500_000, overwrite))
        result = await mirror.sync()
    (path,) = result.transferred
    stands_as_itself(site, path, fresh, later)


async def test_a_plan_begun_before_a_commit_asks_for_nothing_again(site: Site) -> None:
    """Offered once more, though it is here: it is found, not fetched."""
    made = site.sandbox.account.add(RUN, "one", payload=adapter(1))
    async with site.opened() as mirror:
        known = mirror._catalog.known()
        result = await mirror.sync()
        assert result.transferred == [made.path]
        asked = len(site.sandbox.storage_requests)
        await mirror._plan(Sighting(tuple(mirror._rows.values()), NOW, ()), known)
        assert len(mirror._queue.pending()) == 1
        await mirror._work()
        assert (result.failed, len(site.sandbox.storage_requests)) == ({}, asked)


@pytest.mark.usefixtures("_often")
async def test_a_refusal_to_sign_again_keeps_what_is_here(site: Site) -> None:
    """402 in the middle: when the bill is paid it goes on."""
    made = site.sandbox.account.add(RUN, "big", payload=training())
    site.transfer = {"bandwidth": 10_000_000, "stall_timeout": "5s"}

    def refuse() -> None:
        site.sandbox.faults.append(Fault("storage", "status", status=403))
        site.sandbox.faults.append(Fault("archive", "status", status=402))

    assert (await site.sync(After(2_500_000, refuse))).failed
    (home,) = site.staging()
    assert (home / "progress.json").exists()
    site.sandbox.faults.clear()
    async with site.opened() as mirror:
        assert (await mirror.fetch([made.path])).transferred == [made.path]
    assert first_bytes(site).count(0) == 1


async def test_what_the_catalog_could_not_take_is_adopted_by_the_next_attempt(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renamed, and not written down: it is not fetched again, in a run that this process made."""
    made = [site.sandbox.account.add(RUN, name) for name in ("one", "two")]
    async with site.opened() as mirror:
        catalog = mirror._transferrer._catalog

        def full(_: object) -> None:
            message = "disk full"
            raise CatalogUnusable(message)

        with monkeypatch.context() as patch:
            patch.setattr(catalog, "add_replica", full)
            result = await mirror.fetch([found.path for found in made])
            assert len(result.failed) == 2
        asked = len(site.sandbox.storage_requests)
        mirror.result = type(mirror.result)()
        result = await mirror.fetch([found.path for found in made])
        assert (result.failed, set(result.transferred)) == ({}, {found.path for found in made})
        assert len(site.sandbox.storage_requests) == asked
        assert len(catalog.known().replicas) == 2


@pytest.mark.usefixtures("_often")
async def test_nothing_is_read_again_before_the_storage_answers(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A storage that is down costs one request for each attempt, and what was kept stays."""
    made = site.sandbox.account.add(RUN, "big", payload=training())
    site.transfer = {"bandwidth": 3_000_000, "stall_timeout": "5s"}
    await interrupt(site, 2_500_000)
    site.transfer = {}
    read: list[object] = []
    replay_file = progress.StagedObject._replay_file
    monkeypatch.setattr(progress.StagedObject, "_replay_file", lambda *given: read.append(given) or replay_file(*given))
    site.sandbox.faults.append(Fault("storage", "status", status=503))
    assert (await site.sync()).failed
    assert not read
    site.sandbox.faults.clear()
    async with site.opened() as mirror:
        result = await mirror.fetch([made.path])  # whatever the back-off says
    assert result.transferred == [made.path]
    assert read


@pytest.mark.usefixtures("_often")
@pytest.mark.parametrize("harm", ["flip", "short", "gone", "note", "lie", "bit of the note"])
async def test_what_was_kept_is_read_before_it_is_believed(site: Site, harm: str) -> None:
    """A flipped bit, a lost tail, a lost file, a note that is none: it starts over, and is right."""
    payload = training()
    made = site.sandbox.account.add(RUN, "big", payload=payload)
    site.transfer = {"bandwidth": 3_000_000, "stall_timeout": "5s"}
    await interrupt(site, 2_500_000)
    site.transfer = {}
    (home,) = site.staging()
    weights = home / "payload" / "adapter_model.safetensors"
    if harm == "flip":
        content = bytearray(weights.read_bytes())
        content[100_000] ^= 1
        weights.write_bytes(content)
    elif harm == "short":
        os.truncate(weights, 50_000)
    elif harm == "gone":
        weights.unlink()
    elif harm == "note":
        (home / "progress.json").write_bytes(b'{"format": 1, "objects": [{}]}')
    elif harm == "lie":
        edit_note(home, lambda note: note["objects"][0]["parts"].insert(0, {"framing": "AAAA"}))
    else:

        def flip(note: dict[str, Any]) -> None:
            behind = note["objects"][0]["parts"][2]
            framing = bytearray(base64.b64decode(behind["framing"]))
            assert framing[0] == 0
            framing[0] = 1  # padding behind the first file, which nothing else would notice
            behind["framing"] = base64.b64encode(framing).decode()

        edit_note(home, flip, seal=False)
    site.sandbox.storage_requests.clear()
    assert (await site.sync()).transferred == [made.path]
    assert first_bytes(site).count(0) == 1
    assert (first_bytes(site)[0] == 0) is ("note" in harm), (
        "a note that is none is found out before anything is asked for"
    )
    assert site.payload(made.path) == expected(payload)
    assert site.staging() == []


@pytest.mark.usefixtures("_often")
@pytest.mark.parametrize("how", ["link", "dots"])
async def test_a_note_cannot_write_elsewhere(site: Site, how: str) -> None:
    """What stands in a stage is no more trusted than an archive."""
    made = site.sandbox.account.add(RUN, "big", payload=training())
    site.transfer = {"bandwidth": 3_000_000, "stall_timeout": "5s"}
    await interrupt(site, 2_500_000)
    site.transfer = {}
    (home,) = site.staging()
    victim = site.home / "victim"
    victim.write_text("mine")
    (home / "payload" / "link").symlink_to(site.home)

    def point_elsewhere(note: dict[str, Any]) -> None:
        parts = note["objects"][0]["parts"]
        name = "link/victim" if how == "link" else "../../../../victim"
        parts[-1] = {"file": name, "bytes": 4, "sha256": hashlib.sha256(b"mine").hexdigest(), "whole": False}

    edit_note(home, point_elsewhere)
    assert (await site.sync()).transferred == [made.path]
    assert victim.read_text() == "mine"


@pytest.mark.usefixtures("_often")
async def test_a_gzip_says_that_it_starts_over(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, and its useless bytes take no space meanwhile."""
    payload = training()
    zipped = Payload(payload.files, raw=gzip.compress(payload.archive_bytes(), 1))
    made = site.sandbox.account.add(RUN, "big", payload=zipped)
    site.transfer = {"bandwidth": 1_500_000, "stall_timeout": "5s"}
    await interrupt(site, 1_500_000)
    assert [path.name for path in site.staging()[0].iterdir()] == ["progress.json"]
    site.transfer = {}
    with logged(monkeypatch) as events:
        assert (await site.sync()).transferred == [made.path]
    (said,) = [event for event in events if event["event"] == "transfer.starts_over"]
    assert "gzip" in said["reason"]
    assert site.payload(made.path) == expected(payload)
    assert site.staging() == []


@pytest.mark.usefixtures("_often")
async def test_external_files_are_gone_on_with_one_by_one(site: Site) -> None:
    """Whole ones are only asked whether they are still the same, the others go on."""
    files = tuple(safetensors(f"part-{n}.safetensors", {"m": ("U8", [600_000])}, n) for n in range(12))
    payload = Payload((adapter(1).files[0], *files))
    made = site.sandbox.account.add(RUN, "big", "external", payload=payload)
    site.transfer = {"bandwidth": 4_000_000, "stall_timeout": "5s"}
    await interrupt(site, 5_000_000)
    site.sandbox.storage_requests.clear()
    site.transfer = {}
    assert (await site.sync()).transferred == [made.path]
    assert site.payload(made.path) == {file.name: file.read() for file in payload.files}
    spans = [found["range"] for found in site.sandbox.storage_requests]
    asked = [re.fullmatch(r"bytes=(\d+)-(\d+)", span) for span in spans]
    total = sum(min(int(found[2]), 600_100) - int(found[1]) + 1 for found in asked if found is not None)
    assert total < payload.total_bytes - 2_500_000
    assert site.staging() == []


@pytest.mark.usefixtures("_often")
async def test_one_external_file_that_changed_is_fetched_anew(site: Site) -> None:
    """The others too: a checkpoint is never made of files of two attempts between which one of them changed."""
    files = tuple(safetensors(f"part-{n}.safetensors", {"m": ("U8", [900_000])}, n) for n in range(6))
    payload = Payload((adapter(1).files[0], *files))
    made = site.sandbox.account.add(RUN, "big", "external", payload=payload)
    site.transfer = {"bandwidth": 4_000_000, "stall_timeout": "5s"}
    await interrupt(site, 4_500_000)
    site.transfer = {}
    changed = safetensors("part-0.safetensors", {"m": ("U8", [900_000])}, 99)
    made.payload = Payload((payload.files[0], changed, *files[1:]))
    site.sandbox.faults.append(Fault("storage", "none", match="#part-0", headers={"ETag": '"other"'}))  # type: ignore[arg-type]
    assert (await site.sync()).transferred == [made.path]
    assert site.payload(made.path) == {file.name: file.read() for file in made.payload.files}


@pytest.mark.usefixtures("_often")
def test_what_nobody_comes_back_for_goes(tmp_path: Path) -> None:
    """After a week, for space, and when the same checkpoint leaves another; a small one is never kept."""
    tree = make_tree(tmp_path)

    def leave(path: Any, size: int) -> None:
        stage = tree.open_stage(Identity(path, NOW, None), None)
        staged = stage.stage_object("archive", '"etag"', Claim(10**9))
        staged.framing(b"header")
        writer = staged.write(PayloadPath.parse("a"))
        for _ in range(size // 100_000):
            writer.write(b"x" * 100_000)
        writer.settle()
        stage.suspend()

    def kept() -> int:
        return len(list(tree.area("staging").iterdir()))

    leave(PATH, 100_000)
    assert kept() == 0
    leave(PATH, 500_000)
    leave(PATH, 700_000)
    assert kept() == 1
    found = tree.resume_stage(OBJECT, "archive", None)
    assert found is not None
    assert found.stage is not None
    assert found.kept == 600_000
    found.stage.suspend()
    assert tree._reclaim(1)
    assert kept() == 0
    leave(PATH, 500_000)
    tree.recover()
    assert kept() == 1
    later = make_tree(tmp_path)
    later.now = lambda: NOW.replace(month=NOW.month + 1)  # type: ignore[method-assign]
    later.recover()
    assert kept() == 0


def begun(tree: local.LocalTree, size: int = 3000) -> tuple[local.LocalStage, Any]:
    """A stage with a note: framing and so much of one file."""
    stage = tree.open_stage(OBJECT, None)
    staged = stage.stage_object("archive", '"etag"', Claim(10_000))
    staged.framing(b"header")
    writer = staged.write(PayloadPath.parse("sub/a"))
    writer.write(b"x" * size)
    writer.settle()
    return stage, staged


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushed and noted every 1,000 bytes, in the background."""
    monkeypatch.setattr(durable, "FLUSH_EVERY", 1000)
    monkeypatch.setattr(local, "FLUSH_EVERY", 1000)
    monkeypatch.setattr(durable, "_QUICK", 0)


@pytest.mark.usefixtures("_tiny")
@pytest.mark.parametrize("inline", [True, False])
def test_a_stage_that_failed_a_flush_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, inline: bool
) -> None:
    """Whoever met the error, and whatever ended the attempt: a noted stage goes too."""
    tree = make_tree(tmp_path)
    stage, staged = begun(tree)
    monkeypatch.setattr(durable, "_QUICK", 10**9 if inline else 0)
    other = staged.write(PayloadPath.parse("b"))

    def broken(_: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        other.write(b"y")
        with suppress(DiskTrouble):
            other.close()
        with pytest.raises(DiskTrouble):
            other.settle() if not inline else other.close()
    stage.suspend()
    assert list(tree.area("staging").iterdir()) == []
    assert tree.resume_stage(OBJECT, "archive", None) is None


@pytest.mark.usefixtures("_tiny")
def test_what_cannot_make_room_is_left_alone(tmp_path: Path) -> None:
    """One checkpoint that never fits does not make the others start over; one that fits then takes the oldest."""
    free = [5000]
    tree = make_tree(tmp_path)
    tree._space._free = lambda _: free[0]
    begun(tree)[0].suspend()
    with pytest.raises(NoSpace):
        tree.open_stage(Identity(OTHER, NOW, None), 10**12)
    assert len(list(tree.area("staging").iterdir())) == 1
    with pytest.raises(NoSpace):  # it is tried, and on this disk brings nothing
        tree.open_stage(Identity(OTHER, NOW, None), 7000)
    assert list(tree.area("staging").iterdir()) == []


@pytest.mark.usefixtures("_tiny")
@pytest.mark.parametrize("lack", ["key", "parts", "starts_over", "objects", "noted_at", "link", "hole", "negative"])
def test_a_note_that_is_none_stops_no_start(tmp_path: Path, lack: str) -> None:
    """Whatever stands there: the stage goes, or is refused when it is asked for; nothing is believed."""
    tree = make_tree(tmp_path)
    begun(tree)[0].suspend()
    (home,) = tree.area("staging").iterdir()
    path = home / "progress.json"

    def damage(note: dict[str, Any]) -> None:
        found = note["objects"][0]
        if lack in found:
            del found[lack]
        elif lack in note:
            del note[lack]
        elif lack == "hole":
            found["parts"].append({"framing": "AAAA"})
        else:
            found["parts"][-1]["bytes"] = -5

    if lack == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        edit_note(home, damage)
    again = make_tree(tmp_path)
    again.recover()
    found = again.resume_stage(OBJECT, "archive", None)
    assert found is None or found.stage is None
    assert list(again.area("staging").iterdir()) == []


@pytest.mark.usefixtures("_tiny")
def test_a_note_of_too_many_files_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that is written down is too large to be read: it starts over, with the reason."""
    monkeypatch.setattr(progress, "_MOST_NOTE", 1500)
    tree = make_tree(tmp_path)
    stage, staged = begun(tree)
    stage._writers[0].close()
    stage._writers[0].settle()
    for number in range(20):
        writer = staged.write(PayloadPath.parse(f"file-{number}"))
        writer.write(b"y" * 1500)
        writer.close()
        writer.settle()
    stage.suspend()
    found = tree.resume_stage(OBJECT, "archive", None)
    assert found is not None
    assert "so many files" in found.reason


def test_few_descriptors_are_open_however_many_files_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that is slow holds up the files, and not the descriptors of the process."""
    monkeypatch.setattr(durable, "_QUICK", 0)
    tree = make_tree(tmp_path)
    slow = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (time.sleep(0.005), slow(descriptor)))
    stage = tree.open_stage(OBJECT, None)
    before, most = len(list(Path("/proc/self/fd").iterdir())), 0
    for number in range(100):
        writer = stage.write(PayloadPath.parse(f"file-{number}"))
        writer.write(b"y")
        writer.close()
        most = max(most, len(list(Path("/proc/self/fd").iterdir())) - before)
    assert most <= local._UNSETTLED + 2
    stage.abort()


@pytest.mark.usefixtures("_tiny")
def test_leftovers_make_room_for_what_is_gone_on_with(tmp_path: Path) -> None:
    """What is not noted goes before the rest is reserved."""
    tree = make_tree(tmp_path)
    stage, _ = begun(tree)
    (stage.payload / "leftover").write_bytes(b"z" * 5000)
    stage.suspend()
    tree._space._free = lambda _: 2000 if list(tree.area("staging").rglob("leftover")) else 7000
    found = tree.resume_stage(OBJECT, "archive", 9000)
    assert found is not None
    assert found.stage is not None
    found.stage.abort()


@pytest.mark.usefixtures("_tiny")
def test_directories_of_what_is_gone_on_with_have_the_mode_of_now(tmp_path: Path) -> None:
    """Looser before, or tighter."""
    begun(make_tree(tmp_path, dir_mode=0o750, file_mode=0o640))[0].suspend()
    tree = make_tree(tmp_path)
    tree.recover()
    found = tree.resume_stage(OBJECT, "archive", None)
    assert found is not None
    assert found.stage is not None
    staged = found.stage.staged("archive")
    assert staged is not None
    staged.write(PayloadPath.parse("sub/a"))
    modes = {path.name: path.stat().st_mode & 0o777 for path in found.stage.payload.rglob("*")}
    assert modes == {"sub": 0o700, "a": 0o600}
    assert found.stage.payload.stat().st_mode & 0o777 == 0o700
    found.stage.abort()


def test_a_whole_stage_is_durable_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process died between the manifest and the last fsync: the next start does what was left."""
    tree = make_tree(tmp_path)
    stage = tree.open_stage(OBJECT, None)
    writer = stage.write(PayloadPath.parse("sub/adapter_model.bin"))
    writer.write(b"weights")
    seen = writer.close()
    manifest = make_manifest(tinker_path=PATH, files=(FileEntry(seen.path, seen.size, seen.sha256),))
    (stage.payload / ".tinker-sync.json").write_bytes(manifest.to_bytes())
    flushed: list[str] = []

    def note(path: Path) -> None:
        flushed.append(path.name)

    monkeypatch.setattr(local, "fsync_directory", note)
    assert len(make_tree(tmp_path).recover()) == 1
    assert flushed[:3] == ["sub", "payload", stage.payload.parent.name]


async def test_signing_again_never_brings_another_way(site: Site) -> None:
    """Only under the bare id now: that can be the other type's."""
    first, again = SignedUrl("https://storage/1"), SignedUrl("https://storage/2")

    class Signer:
        @asynccontextmanager
        async def archive(self, *_: object) -> AsyncIterator[SignedArchive]:
            yield SignedArchive(again, None, by_bare_id=True)

    transfer = Transfer(PATH, NOW, None, 1)
    with pytest.raises(StorageTrouble, match="another way"):
        await Signing(Signer(), transfer, "x", first, by_bare_id=False).url(first)  # type: ignore[arg-type]
    assert await Signing(Signer(), transfer, "x", first, by_bare_id=True).url(first) == again  # type: ignore[arg-type]
    del site


@pytest.mark.usefixtures("_often")
async def test_a_file_that_is_no_longer_listed_is_not_committed(site: Site) -> None:
    """It starts over: nothing stands in a replica that this attempt did not bring or hash."""
    files = tuple(safetensors(f"part-{n}.safetensors", {"m": ("U8", [600_000])}, n) for n in range(8))
    made = site.sandbox.account.add(RUN, "big", "external", payload=Payload((adapter(1).files[0], *files)))
    site.transfer = {"bandwidth": 4_000_000, "stall_timeout": "5s"}
    await interrupt(site, 4_000_000)
    site.transfer = {}
    made.payload = Payload(made.payload.files[:1] + made.payload.files[4:])
    assert (await site.sync()).transferred == [made.path]
    assert site.payload(made.path) == {file.name: file.read() for file in made.payload.files}


def test_a_failed_flush_is_final_for_its_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it happens in the background: nothing of it is noted, and the commit fails."""
    monkeypatch.setattr(durable, "FLUSH_EVERY", 1000)
    monkeypatch.setattr(durable, "_QUICK", 0)
    monkeypatch.setattr(local, "FLUSH_EVERY", 1000)
    tree = make_tree(tmp_path)
    stage = tree.open_stage(OBJECT, None)
    writer = stage.stage_object("archive", '"etag"', Claim(5000)).write(PayloadPath.parse("a"))

    def broken(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", broken)
    writer.write(b"x" * 2000)
    with pytest.raises(DiskTrouble, match="look at the disk"):
        writer.write(b"x" * 2000)
    monkeypatch.undo()
    with pytest.raises(DiskTrouble):
        writer.settle()
    stage.suspend()
    assert list(tree.area("staging").iterdir()) == []


NAMES = ["a", "b/c", "deep/er/and/deeper", "x" * 120, "caf\u00e9/" + "y" * 100, "empty", "./dot"]


def make_archive(kind: int, sizes: list[int]) -> bytes:
    """A tar of files of these sizes, with a directory, in one of the three dialects."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=kind) as archive:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, size in zip(NAMES, sizes, strict=False):
            info = tarfile.TarInfo(name)
            info.size = size
            archive.addfile(info, io.BytesIO(random.Random(size).randbytes(size)))
    return target.getvalue()


def feed_in_steps(unpacker: Unpacker, data: bytes, step: int) -> None:
    """As a network brings it."""
    for at in range(0, len(data), step):
        unpacker.feed(data[at : at + step])


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]),
    sizes=st.lists(st.integers(0, 5000), min_size=1, max_size=len(NAMES)),
    stops=st.lists(st.floats(0, 1), min_size=1, max_size=3),
    step=st.integers(1, 2000),
)
def test_a_tar_is_the_same_wherever_it_was_interrupted(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
    kind: int,
    sizes: list[int],
    stops: list[float],
    step: int,
) -> None:
    """At any byte, again and again: files, digests and the archive's own are those of one run without a stop."""
    monkeypatch.setattr(durable, "FLUSH_EVERY", 700)
    monkeypatch.setattr(local, "FLUSH_EVERY", 700)
    monkeypatch.setattr(durable, "_QUICK", 0)
    if kind == tarfile.USTAR_FORMAT:
        sizes = sizes[:3]  # it has no long names
    archive = make_archive(kind, sizes)
    claim = Claim(len(archive), {"md5": hashlib.md5(archive).digest()})
    tree = make_tree(tmp_path_factory.mktemp("tree"))
    whole = tree.open_stage(OBJECT, None)
    straight = Unpacker(whole.stage_object("archive", '"e"', claim), Limits())
    straight.feed(archive)
    wanted = straight.finish()
    whole.abort()
    assert not wanted[1]

    stage = tree.open_stage(OBJECT, None)
    staged = stage.stage_object("archive", '"e"', claim)
    unpacker, position = Unpacker(staged, Limits()), 0
    for stop in stops:
        end = max(position, int(stop * len(archive)))
        feed_in_steps(unpacker, archive[position:end], step)
        stage.suspend()
        found = tree.resume_stage(OBJECT, "archive", None)
        if found is None or found.stage is None:
            stage = tree.open_stage(OBJECT, None)
            staged = stage.stage_object("archive", '"e"', claim)
            unpacker, position = Unpacker(staged, Limits()), 0
            continue
        stage, again = found.stage, found.stage.staged("archive")
        assert again is not None
        unpacker, position = Unpacker(again, Limits()), again.kept
        assert position <= end
        assert b"".join(again.replay()) == archive[:position]
        for piece in again.replay():
            unpacker.feed(piece)
        assert unpacker.received == position
    feed_in_steps(unpacker, archive[position:], step)
    files, defects = unpacker.finish()
    assert (files, defects) == wanted
    for seen in files:
        content = stage.payload.joinpath(*seen.path.parts).read_bytes()
        assert hashlib.sha256(content).hexdigest() == seen.sha256
    stage.abort()


class Held(ThreadPoolExecutor):
    """A flusher that does nothing before it is told to, and then in any order."""

    def __init__(self) -> None:
        super().__init__(1)
        self.held: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        """Keep it."""
        future: Future[Any] = Future()
        self.held.append((future, partial(work, *arguments, **named)))
        return future

    def do(self, number: int) -> None:
        """Carry out one of those that are held."""
        future, work = self.held[number]
        future.set_result(work())


def test_nothing_is_noted_before_it_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later file can be on the device before an earlier one: what is noted ends where the first hole begins."""
    monkeypatch.setattr(durable, "FLUSH_EVERY", 1000)
    monkeypatch.setattr(local, "FLUSH_EVERY", 1000)
    monkeypatch.setattr(durable, "_QUICK", 0)
    flusher = Held()
    tree = make_tree(tmp_path)
    tree.flusher = flusher
    stage = tree.open_stage(OBJECT, None)
    staged = stage.stage_object("archive", '"e"', Claim(10_000))
    staged.framing(b"h" * 512)
    first = staged.write(PayloadPath.parse("first"))
    first.write(b"1" * 1000)
    flusher.do(0)
    first.write(b"1" * 900)
    first.close()
    staged.framing(b"p" * 124 + b"h" * 512)
    second = staged.write(PayloadPath.parse("second"))
    second.write(b"2" * 1500)
    (home,) = tree.area("staging").iterdir()

    def noted() -> list[dict[str, Any]]:
        note = json.loads((home / "progress.json").read_text())
        return [
            {name: part[name] for name in part if name not in ("sha256", "whole")}
            for part in note["objects"][0]["parts"]
        ]

    header = {"framing": base64.b64encode(b"h" * 512).decode()}
    assert noted() == [header, {"file": "first", "bytes": 1000}]
    flusher.do(2)  # the second file, before the rest of the first
    assert noted() == [header, {"file": "first", "bytes": 1000}]
    flusher.do(1)
    second.write(b"2" * 1500)
    flusher.do(3)
    assert [part.get("bytes") for part in noted()] == [None, 1900, None, 3000]
    stage.abort()


def test_kill_9_costs_what_was_not_durable(outside: Site) -> None:
    """The installed command, killed in the middle of 400 MB; the next one goes on, and every byte is right."""
    payload = Payload(adapter(1, pad_to=400_000_000).files)
    made = outside.sandbox.account.add(RUN, "big", payload=payload)
    config = outside.write_config("[transfer]\nbandwidth = '150MB'\n")
    running = subprocess.Popen(command("--config", str(config), "sync"), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not any((home / "progress.json").exists() for home in outside.staging()):
        assert time.monotonic() < deadline
        assert running.poll() is None
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    outside.sandbox.storage_requests.clear()
    fast = outside.write_config()
    done = run(["--config", str(fast), "--log-format", "json", "sync", "--json"], check=0)
    assert json.loads(done.stdout)["transferred"] == [str(made.path)]
    assert '"transfer.resumed"' in done.stderr
    assert min(first_bytes(outside)) >= 64 * 1024 * 1024
    assert json.loads(run(["--config", str(fast), "verify", "--json"], check=0).stdout)["ok"] == 1
    content = (outside.directory(made.path) / "adapter_model.safetensors").read_bytes()
    assert content == payload.files[1].read()
    assert outside.staging() == []
