"""Whole passes against the local server: what is mirrored, what is refused, what is tried again."""

from __future__ import annotations

import asyncio
import gzip
import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from tests.archives import member, tar_of
from tests.conftest import Site, hours, minutes
from tinker_sync import passes
from tinker_sync.catalog.store import SqlCatalog
from tinker_sync.errors import CredentialRefused, WrongRoot
from tinker_sync.sandbox import Fault, Payload, PayloadFile, Sandbox, adapter
from tinker_sync.wiring import Silent, open_catalog_for_reading

if TYPE_CHECKING:
    from pathlib import Path

RUN = "39aa5eb2-e234-5a95-ab68-896e4cac8c45:train:0"


def expected(payload: Payload) -> dict[str, bytes]:
    """The files that a replica must hold."""
    return {file.name: file.read() for file in payload.files}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("prefix", ["", "./", "000020/"])
async def test_an_archive_arrives_byte_for_byte(site: Site, prefix: str, compressed: bool) -> None:
    """Plain or gzip, bare or in a directory of its own: the same files, with their facts in the manifest."""
    site.sandbox.account.add_run(RUN, lora_rank=16)
    payload = adapter(3, optimizer=True, prefix=prefix, compressed=compressed)
    made = site.sandbox.account.add(
        RUN, "000020", payload=payload, ttl=timedelta(days=7), user_metadata={"loss": "0.5"}
    )
    result = await site.sync()
    assert (result.exit_code, result.transferred, result.failed) == (0, [made.path], {})
    assert site.payload(made.path) == expected(payload)
    manifest = json.loads((site.directory(made.path) / ".tinker-sync.json").read_text())
    assert manifest["tinker_path"] == str(made.path)
    assert manifest["fidelity"] == "exact"
    assert manifest["source"] == "archive"
    assert manifest["user_metadata"] == {"loss": "0.5"}
    assert manifest["training_run"]["lora_rank"] == 16
    assert manifest["weights_info"]["base_model"] == "Qwen/Qwen3-8B"
    assert manifest["claims"]["archive"]["length"] == payload.archive_length()
    assert json.loads((site.root / RUN / "run.json").read_text())["training_run_id"] == RUN
    assert site.staging() == []


@pytest.mark.parametrize(
    "quirk", ["archive_json", "archive_direct", "relative_location", "bare_ids", "naive_times", "no_sizes"]
)
async def test_other_servers_ways_of_handing_out(site: Site, quirk: str) -> None:
    """200 with JSON, bytes at once, bare ids …: the same replica."""
    setattr(site.sandbox.quirks, quirk, True)
    payload = adapter(3)
    made = site.sandbox.account.add(RUN, "final", "sampler", payload=payload)
    assert (await site.sync()).exit_code == 0
    assert site.payload(made.path) == expected(payload)


async def test_a_bare_id_that_brings_the_other_type_goes_to_quarantine(site: Site) -> None:
    """The sampler of the same name came instead of the training state: kept apart, said, no replica."""
    site.sandbox.quirks.bare_ids = True
    sampler = site.sandbox.account.add(RUN, "x", "sampler", payload=adapter(1))
    training = site.sandbox.account.add(RUN, "x", "training", payload=adapter(2, optimizer=True))
    result = await site.sync()
    assert result.transferred == [sampler.path]
    assert "sampler checkpoint of the same name" in result.failed[training.path][0]
    assert not site.directory(training.path).exists()


async def test_external_checkpoints_come_file_by_file(site: Site) -> None:
    """All files, nested ones too, each with its claims."""
    extra = (*adapter(5, marker=False).files, PayloadFile.of("tokenizer/vocab.json", b"{}"))
    made = site.sandbox.account.add(RUN, "out", "external", payload=Payload(extra))
    assert (await site.sync()).exit_code == 0
    assert site.payload(made.path) == expected(Payload(extra))
    manifest = json.loads((site.directory(made.path) / ".tinker-sync.json").read_text())
    assert manifest["source"] == "files"
    assert set(manifest["claims"]) == {"adapter_config.json", "adapter_model.safetensors", "tokenizer/vocab.json"}


async def test_urls_that_end_are_signed_again(site: Site) -> None:
    """Twenty files, URLs that live a second, a slow storage: signed again as often as needed."""
    site.sandbox.quirks.url_life = 1.0
    files = tuple(PayloadFile.of(f"shard-{n:02}.bin", b"x" * 1000) for n in range(24))
    made = site.sandbox.account.add(RUN, "out", "external", payload=Payload(files))
    site.sandbox.faults.append(Fault("storage", "slow", seconds=0.7))
    assert (await site.sync()).exit_code == 0
    assert len(site.payload(made.path)) == 24
    signings = [raw for _, raw in site.sandbox.requests if raw.endswith("external_weights_urls")]
    assert len(signings) > 1


async def test_a_second_pass_asks_for_the_listing_alone(site: Site) -> None:
    """Nothing but the credential's handshake and one page."""
    for n in range(20):
        site.sandbox.account.add(RUN, f"{n:06}", payload=adapter(n))
    await site.sync()
    site.sandbox.requests.clear()
    site.sandbox.storage_requests.clear()
    result = await site.sync()
    assert (result.listed, result.transferred, result.exit_code) == (20, [], 0)
    assert [raw for _, raw in site.sandbox.requests] == ["/api/v1/client/config", "/api/v1/checkpoints"]
    assert site.sandbox.storage_requests == []


@pytest.mark.parametrize(
    "kind", ["cut", "corrupt", "drop", "wrong-digest", "bad-chunk", "status", "stall", "close-cut"]
)
async def test_passing_trouble_of_the_storage_is_overcome_in_the_same_pass(site: Site, kind: Any) -> None:
    """A cut, a reset, a stall: what is missing is asked for; a flipped byte, a 503: another attempt with a fresh URL."""
    site.transfer = {"stall_timeout": "1s"}
    payload = adapter(1, hidden=256)
    made = site.sandbox.account.add(RUN, "a", payload=payload)
    site.sandbox.faults.append(Fault("storage", kind, times=1, at=20_000, status=503, seconds=3))
    result = await site.sync()
    assert result.exit_code == 0, result.failed
    assert site.payload(made.path) == expected(payload)
    archives = [raw for _, raw in site.sandbox.requests if raw.endswith("/archive")]
    assert len(archives) == (1 if kind in ("drop", "cut", "stall") else 2)
    assert site.staging() == []


async def test_a_wrong_digest_is_never_committed(site: Site) -> None:
    """Three attempts, then a back-off; the defect is named, nothing is left."""
    made = site.sandbox.account.add(RUN, "a", payload=adapter(1))
    site.sandbox.faults.append(Fault("storage", "wrong-digest"))
    result = await site.sync()
    assert "the storage promised" in result.failed[made.path][0]
    assert result.exit_code == 1
    assert len(site.sandbox.storage_requests) == 3
    assert not site.directory(made.path).exists()
    assert site.staging() == []
    again = await site.sync()
    assert again.failed.keys() == {made.path}, "what waits for its retry is still failing, and said"
    assert len(site.sandbox.storage_requests) == 3, "and is not asked for before its time"


async def test_a_body_that_only_the_connection_ends(site: Site) -> None:
    """Without length or chunking the archive's own end is the proof; a cut one is tried again."""
    payload = adapter(1)
    made = site.sandbox.account.add(RUN, "a", payload=payload)
    site.sandbox.faults.append(Fault("storage", "close"))
    assert (await site.sync()).exit_code == 0
    assert site.payload(made.path) == expected(payload)


HOSTILE = {
    "html": b"<html><body>sign in</body></html>",
    "empty": b"",
    "zeros": bytes(20480),
    "garbage": bytes(range(256)) * 100,
    "short": b"\x1f\x8b\x08",
    "escape": tar_of(member("../../../tmp/x", b"1")),
    "link": tar_of(member("adapter_model.bin", type=b"2", linkname="/etc/passwd"), member("x", b"1")),
    "boundary": tar_of(member("adapter_model.bin", b"1" * 512), ended=False),
    "gzip-crc": gzip.compress(tar_of(member("adapter_model.bin", b"1" * 5000)))[:-8] + bytes(8),
    "gzip-cut": gzip.compress(tar_of(member("adapter_model.bin", bytes(range(250)) * 400)))[:-30],
    "manifest": tar_of(member(".tinker-sync.json", b"{}"), member("adapter_model.bin", b"1")),
    "twins": tar_of(member("A.bin", b"1"), member("a.bin", b"2")),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile_archives_are_refused_and_leave_nothing(site: Site, name: str) -> None:
    """One attempt, the defect in words, no replica, no stage, no quarantine; the neighbour is copied."""
    site.sandbox.quirks.digests = False
    bad = site.sandbox.account.add(RUN, "bad", payload=Payload((), raw=HOSTILE[name]), size_bytes=len(HOSTILE[name]))
    good = site.sandbox.account.add(RUN, "good", payload=adapter(1))
    result = await site.sync()
    assert result.transferred == [good.path]
    assert result.failed[bad.path][0]
    assert not site.directory(bad.path).exists()
    assert site.staging() == []
    assert not list((site.root / ".tinker-sync").glob("quarantine/*"))
    assert len(site.sandbox.storage_requests) == (3 if name == "empty" else 2)  # of nothing no part can be had


async def test_whole_but_wrong_goes_to_quarantine(site: Site) -> None:
    """A checkpoint without weights arrived whole: kept with its defects, no replica, failing."""
    payload = Payload((PayloadFile.of("notes.txt", b"hello"), PayloadFile.of("adapter_config.json", b"{broken")))
    made = site.sandbox.account.add(RUN, "odd", payload=payload)
    result = await site.sync()
    error = result.failed[made.path][0]
    assert error.startswith("quarantined")
    assert "unknown layout" in error
    assert "does not parse" in error
    (kept,) = list((site.root / ".tinker-sync" / "quarantine").iterdir())
    assert (kept / "payload" / "notes.txt").read_bytes() == b"hello"
    with open_catalog_for_reading(site.settings()) as catalog:
        assert [failure.trouble.value for failure in catalog.failures()] == ["quarantined"]


async def test_the_marker_where_it_is_required(site: Site) -> None:
    """Off the official host it is only recorded; required, its absence is a defect of content."""
    made = site.sandbox.account.add(RUN, "a", payload=adapter(1, marker=False))
    assert (await site.sync()).exit_code == 0
    other = site.sandbox.account.add(RUN, "b", payload=adapter(1, marker=False))
    site.mirror = {"require_marker": True}
    result = await site.sync()
    assert "checkpoint_complete" in result.failed[other.path][0]
    assert site.directory(made.path).exists()


async def test_a_digest_that_fails_outranks_a_structural_defect(site: Site) -> None:
    """The rest is read before judging: garbled on the way means another attempt, not a verdict."""
    payload = adapter(1, hidden=128)
    made = site.sandbox.account.add(RUN, "a", payload=payload)
    site.sandbox.faults.append(Fault("storage", "corrupt", times=1, at=100))
    assert (await site.sync()).exit_code == 0
    assert site.payload(made.path) == expected(payload)


async def test_an_archive_that_is_being_made_is_waited_for_without_a_slot(site: Site) -> None:
    """Ten that are being made do not stop one that is there, with a single slot."""
    site.transfer = {"connections": 1}
    for n in range(5):
        site.sandbox.account.add(RUN, f"{n:06}", payload=adapter(n), ttl=timedelta(days=1))
    ready = site.sandbox.account.add(RUN, "ready", payload=adapter(9))
    ready.built_at = 0.0
    site.sandbox.quirks.building_seconds = 2.0
    result = await site.sync()
    assert result.exit_code == 0
    assert result.transferred[0] == ready.path
    assert len(result.transferred) == 6


async def test_one_that_is_made_for_ever_fails_alone(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget ends, the others are there."""
    monkeypatch.setattr(passes, "BUILD_BUDGET", 2.0)
    bad = site.sandbox.account.add(RUN, "bad", payload=adapter(1))
    site.sandbox.account.add(RUN, "good", payload=adapter(2))
    site.sandbox.faults.append(Fault("archive", "status", match="bad", status=503, headers={"Retry-After": "1"}))
    result = await site.sync()
    assert "still packing" in result.failed[bad.path][0]
    assert len(result.transferred) == 1


@pytest.mark.parametrize("status", [404, 405, 410, 501])
async def test_not_served_is_remembered(site: Site, status: int) -> None:
    """A skip with its reason, not a failure; after five the server is spared; external ones still come."""
    site.transfer = {"connections": 1}
    for n in range(8):
        site.sandbox.account.add(RUN, f"{n:06}", payload=adapter(n))
    external = site.sandbox.account.add(RUN, "out", "external")
    site.sandbox.faults.append(Fault("archive", "status", status=status))
    result = await site.sync()
    assert result.exit_code == 0
    assert result.transferred == [external.path]
    assert len(result.skipped) == 8
    assert sum(1 for _, raw in site.sandbox.requests if raw.endswith("/archive")) == 5
    await site.sync()
    assert sum(1 for _, raw in site.sandbox.requests if raw.endswith("/archive")) == 5


async def test_gone_meanwhile_is_no_failure(site: Site) -> None:
    """Deleted between listing and transfer: skipped as gone, and not held against the server."""
    made = site.sandbox.account.add(RUN, "a", payload=adapter(1))

    async with site.opened() as mirror:
        await mirror._poll()
        del site.sandbox.account.checkpoints[made.path]
        await mirror._work()
        assert "gone" in mirror.result.skipped[made.path]
        assert not mirror.result.failed


@pytest.mark.parametrize("status", [400, 402, 403, 500])
async def test_one_bad_checkpoint_never_stops_another(site: Site, status: int) -> None:
    """Whatever its archive answers, the others are copied; the reason is named."""
    bad = site.sandbox.account.add(RUN, "bad", payload=adapter(1))
    site.sandbox.account.add(RUN, "good", payload=adapter(2))
    site.sandbox.faults.append(
        Fault("archive", "status", match="weights/bad", status=status, headers={"x-should-retry": "false"})
    )
    result = await site.sync()
    assert len(result.transferred) == 1
    assert str(status) in result.failed[bad.path][0]


async def test_a_replica_that_the_catalog_does_not_know_is_adopted(site: Site) -> None:
    """A process can die between its rename and its note: the next pass takes the replica for what it is."""
    made = site.sandbox.account.add(RUN, "a", payload=adapter(1))
    await site.sync()
    settings = site.settings()
    with SqlCatalog.open(settings.state / "catalog.db") as catalog:
        catalog.remove_replica(f"{RUN}/weights/a")
    before = len(site.sandbox.storage_requests)
    result = await site.sync()
    assert (result.exit_code, result.failed, result.transferred) == (0, {}, [])
    assert len(site.sandbox.storage_requests) == before
    with open_catalog_for_reading(settings) as catalog:
        assert [replica.path for replica in catalog.replicas()] == [made.path]


async def test_another_object_under_the_same_path_is_a_new_replica(site: Site) -> None:
    """The old one is kept aside; the catalog knows both."""
    born = datetime.now(UTC) - hours(5)
    site.sandbox.account.add(RUN, "best", payload=adapter(1), time=born)
    await site.sync()
    newer = adapter(2)
    made = site.sandbox.account.add(RUN, "best", payload=newer, time=born + hours(1))
    result = await site.sync()
    assert result.transferred == [made.path]
    assert site.payload(made.path) == expected(newer)
    (aside,) = site.directory(made.path).parent.glob("best@*")
    assert (aside / ".tinker-sync.json").exists()
    with open_catalog_for_reading(site.settings()) as catalog:
        assert [replica.superseded for replica in catalog.replicas()] == [False, True]
    assert (await site.sync()).transferred == []


async def test_rolling_saves_are_skipped_until_the_run_stops(site: Site) -> None:
    """Skipped with a reason: neither failing nor news."""
    now = datetime.now(UTC)
    site.sandbox.account.add(RUN, "rolling", payload=adapter(1), time=now - minutes(2), ttl=hours(2))
    result = await site.sync()
    assert (result.exit_code, len(result.skipped), result.transferred) == (0, 1, [])
    site.sandbox.account.checkpoints.clear()
    site.sandbox.account.add(RUN, "rolling", payload=adapter(1), time=now - minutes(20), ttl=hours(2))
    assert len((await site.sync()).transferred) == 1


async def test_soonest_to_expire_comes_first(site: Site) -> None:
    """With one connection the order is visible."""
    site.transfer = {"connections": 1}
    now = datetime.now(UTC)
    for name, age, ttl in (("old", 50, None), ("week", 10, 168), ("new", 1, None), ("soon", 100, 104)):
        site.sandbox.account.add(
            RUN, name, payload=adapter(1), time=now - hours(age), ttl=None if ttl is None else hours(ttl)
        )
    assert [path.name for path in (await site.sync()).transferred] == ["soon", "week", "new", "old"]


async def test_an_urgent_newcomer_overtakes_the_queue(site: Site) -> None:
    """A poll re-plans while transfers run: what appears with a deadline is next."""
    site.transfer = {"connections": 1}
    for n in range(12):
        site.sandbox.account.add(RUN, f"{n:06}", payload=adapter(n))
    site.sandbox.faults.append(Fault("storage", "slow", seconds=0.1))
    settings_poll = 0.3

    async with site.opened() as mirror:
        mirror._settings = type(mirror._settings)(connections=1, poll_interval=settings_poll)
        working = asyncio.create_task(mirror.sync())
        await asyncio.sleep(0.6)
        urgent = site.sandbox.account.add(RUN, "urgent", "sampler", payload=adapter(99), ttl=hours(4))
        result = await working
    position = result.transferred.index(urgent.path)
    assert position < 11, f"it came {position}. of {len(result.transferred)}"


async def test_a_sighting_transfers_and_proves_nothing(site: Site) -> None:
    """A failed page: what was shown is copied, exit 3, and nothing is taken to be gone."""
    for n in range(40):
        site.sandbox.account.add(RUN, f"{n:06}", payload=adapter(n))
    site.tinker = {"page_size": 30}
    site.sandbox.faults.append(Fault("list", "status", match="offset=27;", status=400))
    result = await site.sync()
    assert result.exit_code == 3
    assert len(result.transferred) == 30
    assert "page at 27" in str(result.doubts)
    site.sandbox.faults.clear()
    result = await site.sync()
    assert (result.exit_code, len(result.transferred)) == (0, 10)


async def test_a_refused_credential_ends_the_pass(site: Site) -> None:
    """401 on the listing: nothing else is tried."""
    site.sandbox.account.add(RUN, "a")
    site.sandbox.faults.append(Fault("list", "status", status=401))
    with pytest.raises(CredentialRefused):
        await site.sync()


async def test_a_server_that_goes_away_ends_the_pass_and_keeps_what_came(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No checkpoint is blamed: exit 3, the rest is named, and the next pass copies it."""
    monkeypatch.setattr(passes, "SERVER_PAUSES", 0)
    for n in range(6):
        site.sandbox.account.add(RUN, f"{n:06}", payload=adapter(n))

    async with site.opened() as mirror:
        await mirror._poll()
        site.sandbox.faults.append(Fault("any", "drop"))
        await mirror._work()
        assert mirror.result.exit_code == 3
        assert mirror.result.service_error is not None
        assert len(mirror.result.failed) == 6
    site.sandbox.faults.clear()
    result = await site.sync()
    assert (result.exit_code, len(result.transferred)) == (0, 6)


@pytest.mark.parametrize("kind", ["drop", "body", "html", 401, 429, "nonsense"])
async def test_odd_answers_for_one_checkpoint_do_not_stop_the_others(
    site: Site, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever four archives answer, the service answers: those four fail, the others are copied, exit 1."""
    monkeypatch.setattr(passes, "BUILD_BUDGET", 1.0)
    for n in range(12):
        site.sandbox.account.add(RUN, f"{n:06}", payload=adapter(n))
    for n in range(4):
        bad = f"weights/00000{n}"
        if isinstance(kind, int):
            quick = {"x-should-retry": "false", "retry-after": "1"}
            fault = Fault("archive", "status", match=bad, status=kind, headers=quick)
        elif kind == "nonsense":
            fault = Fault("archive", "body", match=bad, status=302, headers={"Location": "http://[bad"})
        else:
            fault = Fault("archive", kind, match=bad, status=200, body=b"{}")
        site.sandbox.faults.append(fault)
    result = await site.sync()
    assert (result.exit_code, len(result.failed), len(result.transferred)) == (1, 4, 8), result.failed


@pytest.mark.parametrize("bug", [ZeroDivisionError, asyncio.CancelledError])
async def test_a_bug_met_by_one_checkpoint_does_not_stop_the_others(
    site: Site, monkeypatch: pytest.MonkeyPatch, bug: type[BaseException]
) -> None:
    """An error that nobody foresaw is that checkpoint's failure, in words; also a stop that nobody asked for."""
    bad = site.sandbox.account.add(RUN, "bad", payload=adapter(1))
    site.sandbox.account.add(RUN, "good", payload=adapter(2))

    async with site.opened() as mirror:
        real = mirror._transferrer.transfer

        async def transfer(wanted: Any, *arguments: Any, **options: Any) -> Any:
            if wanted.path == bad.path:
                raise bug
            return await real(wanted, *arguments, **options)

        monkeypatch.setattr(mirror._transferrer, "transfer", transfer)
        result = await mirror.sync()
    assert len(result.transferred) == 1
    assert f"internal error {bug.__name__} at test_sync.py" in result.failed[bad.path][0]


async def test_strings_that_are_no_unicode_are_kept(site: Site) -> None:
    """A lone surrogate in somebody's metadata is no reason to lose a checkpoint."""
    made = site.sandbox.account.add(RUN, "a", payload=adapter(1), user_metadata={"note": "\ud800"})
    assert (await site.sync()).exit_code == 0
    manifest = json.loads((site.directory(made.path) / ".tinker-sync.json").read_text())
    assert manifest["user_metadata"] == {"note": "\ud800"}


async def test_a_damaged_replica_does_not_stand_in_the_way_of_its_successor(site: Site) -> None:
    """Overwritten upstream: the new object is copied, the damaged one kept aside, with and without its manifest."""
    from tinker_sync.cli import work

    born = datetime.now(UTC) - hours(9)
    for n, breaking in enumerate(("adapter_model.safetensors", ".tinker-sync.json")):
        path = site.sandbox.account.add(RUN, f"best-{n}", payload=adapter(1), time=born).path
        await site.sync()
        (site.directory(path) / breaking).write_bytes(b"damage")
        newer = adapter(2)
        site.sandbox.account.add(RUN, f"best-{n}", payload=newer, time=born + hours(1))
        assert await work.verify(site.settings(), [], Silent(), repair=True, as_json=True) in (0, 1)
        await site.sync()
        assert site.payload(path) == expected(newer)
        assert (await site.sync()).exit_code == 0


async def test_a_repair_without_a_manifest_is_judged_like_any_other(site: Site) -> None:
    """Nothing to compare with: then content that is no checkpoint goes to quarantine, not into the tree."""
    from tinker_sync.cli import work

    made = site.sandbox.account.add(RUN, "a", payload=adapter(1))
    await site.sync()
    (site.directory(made.path) / ".tinker-sync.json").unlink()
    made.payload = Payload((PayloadFile.of("adapter_config.json", b"not json"),))
    assert await work.verify(site.settings(), [], Silent(), repair=True, as_json=True) == 1
    assert not (site.directory(made.path) / ".tinker-sync.json").exists()


async def test_a_full_disk_stops_downloads_and_loses_nothing(site: Site) -> None:
    """min_free beyond what is there: no archive is even asked for after the first, exit 1, words."""
    site.mirror = {"min_free": 10**18}
    for n in range(5):
        site.sandbox.account.add(RUN, f"{n:06}", payload=adapter(n))
    site.transfer = {"connections": 1}
    result = await site.sync()
    assert result.exit_code == 1
    assert len(result.failed) == 5
    assert all("min_free" in error for error, _ in result.failed.values())
    assert sum(1 for _, raw in site.sandbox.requests if raw.endswith("/archive")) == 1
    assert site.staging() == []


async def test_another_accounts_key_on_this_root(site: Site) -> None:
    """The JWT says whose key it is; a root of another account is refused before anything is written."""
    site.sandbox.quirks.jwt = True
    site.sandbox.account.add(RUN, "a", payload=adapter(1))
    await site.sync()
    facts = site.root / ".tinker-sync" / "root.json"
    assert json.loads(facts.read_text())["account"] == "user-sandbox"
    facts.write_text(facts.read_text().replace("user-sandbox", "somebody-else"))
    with pytest.raises(WrongRoot, match="somebody-else"):
        await site.sync()


async def test_a_directory_of_the_servers_own_host(site: Site, tmp_path: Path) -> None:
    """file:// is taken only below what the configuration names, links never."""
    source = tmp_path / "served" / "step-1"
    (source / "adapter").mkdir(parents=True)
    (source / "metadata.json").write_text("{}")
    (source / "adapter" / "adapter_model.bin").write_bytes(b"w")
    made = site.sandbox.account.add(RUN, "a")
    location = {"Location": f"file://{source}"}
    site.sandbox.faults.append(Fault("archive", "body", status=302, headers=location))
    result = await site.sync()
    assert "file_urls_below" in result.failed[made.path][0]
    site.tinker = {"file_urls_below": str(tmp_path / "served")}
    (site.root / ".tinker-sync" / "catalog.db").unlink()
    assert (await site.sync()).exit_code == 0
    assert site.payload(made.path) == {"adapter/adapter_model.bin": b"w", "metadata.json": b"{}"}
    (source / "link").symlink_to("/etc/passwd")
    other = site.sandbox.account.add(RUN, "b")
    assert "no regular file" in (await site.sync()).failed[other.path][0]
    site.sandbox.faults[:] = [
        Fault("archive", "body", status=302, headers={"Location": f"file://{tmp_path}/served/../secret"})
    ]
    outside = site.sandbox.account.add(RUN, "c")
    assert "not below" in (await site.sync()).failed[outside.path][0]


async def test_damage_is_found_and_repaired_by_the_next_pass(site: Site) -> None:
    """A replica that the catalog knows to be damaged is fetched again; only equal bytes take its place."""
    made = site.sandbox.account.add(RUN, "a", payload=adapter(1))
    await site.sync()
    victim = site.directory(made.path) / "adapter_model.safetensors"
    victim.write_bytes(b"garbage")
    from tinker_sync.cli import work

    assert await work.verify(site.settings(), [], Silent(), repair=False, as_json=True) == 1
    assert await work.verify(site.settings(), [], Silent(), repair=True, as_json=True) == 0
    assert site.payload(made.path) == expected(adapter(1))
    victim.write_bytes(b"garbage")
    site.sandbox.account.checkpoints[made.path].payload = adapter(2)
    assert await work.verify(site.settings(), [], Silent(), repair=True, as_json=True) == 1
    assert victim.read_bytes() == b"garbage", "upstream changed: the damaged bytes keep their place"


async def test_every_damaged_replica_is_repaired(site: Site) -> None:
    """Many at once, read by several threads: no mark is lost, no repair is skipped."""
    from tinker_sync.cli import work

    made = [site.sandbox.account.add(RUN, f"{n:06}", payload=adapter(n)) for n in range(24)]
    await site.sync()
    for checkpoint in made:
        (site.directory(checkpoint.path) / "adapter_config.json").write_bytes(b"x")
    assert await work.verify(site.settings(), [], Silent(), repair=True, as_json=True) == 0
    for checkpoint in made:
        assert site.payload(checkpoint.path) == expected(checkpoint.payload)


async def test_one_overwritten_while_it_waits_is_copied_in_its_new_form(site: Site) -> None:
    """A deferred transfer gives way to the new object: no pass ends well without it."""
    born = datetime.now(UTC) - hours(3)
    made = site.sandbox.account.add(RUN, "best", payload=adapter(1), time=born)
    site.sandbox.faults.append(Fault("archive", "status", status=503, times=2, headers={"Retry-After": "2"}))

    async with site.opened() as mirror:
        mirror._settings = type(mirror._settings)(poll_interval=0.3)
        working = asyncio.create_task(mirror.sync())
        await asyncio.sleep(0.2)
        site.sandbox.account.add(RUN, "best", payload=adapter(2), time=born + hours(1))
        result = await working
    assert result.exit_code == 0
    assert site.payload(made.path) == expected(adapter(2))


async def test_a_later_doubt_takes_nothing_from_a_proof(site: Site) -> None:
    """The first poll is proven; a page of a later one fails: still exit 0, and nothing leaves the queue."""
    for n in range(6):
        site.sandbox.account.add(RUN, f"{n:06}", payload=adapter(n))
    site.sandbox.faults.append(Fault("storage", "slow", seconds=0.3))

    async with site.opened() as mirror:
        mirror._settings = type(mirror._settings)(connections=1, poll_interval=0.4)
        working = asyncio.create_task(mirror.sync())
        await asyncio.sleep(0.3)
        body = b'{"checkpoints": [7], "cursor": null}'
        site.sandbox.faults.append(Fault("list", "body", status=200, body=body))
        result = await working
    assert (result.exit_code, len(result.transferred)) == (0, 6)


async def test_a_fetch_asks_even_a_server_that_refused_before(site: Site) -> None:
    """A person who names a checkpoint is not told what was learnt yesterday."""
    made = [site.sandbox.account.add(RUN, f"{n:06}", payload=adapter(n)) for n in range(6)]
    site.sandbox.quirks.no_archives = 410
    await site.sync()
    site.sandbox.quirks.no_archives = 0
    async with site.opened() as mirror:
        result = await mirror.fetch([made[0].path])
    assert result.transferred == [made[0].path]


async def test_quarantine_is_not_forgotten_when_upstream_is_gone(site: Site) -> None:
    """It may be all that is left: status goes on to say so, also after a reindex."""
    from tinker_sync.wiring import rebuild_catalog

    made = site.sandbox.account.add(RUN, "odd", payload=Payload((PayloadFile.of("notes", b"x"),)))
    await site.sync()
    del site.sandbox.account.checkpoints[made.path]
    await site.sync()
    for _ in range(2):
        with open_catalog_for_reading(site.settings()) as catalog:
            assert [failure.trouble.value for failure in catalog.failures()] == ["quarantined"]
        rebuild_catalog(site.settings())


async def test_two_quarantines_of_one_path_do_not_break_reindex(site: Site) -> None:
    """A process can die between keeping the newer and removing the older."""
    import shutil

    from tinker_sync.wiring import rebuild_catalog

    site.sandbox.account.add(RUN, "odd", payload=Payload((PayloadFile.of("notes", b"x"),)))
    await site.sync()
    (kept,) = (site.root / ".tinker-sync" / "quarantine").iterdir()
    shutil.copytree(kept, kept.with_name("another"))
    assert rebuild_catalog(site.settings()) == (0, [])


async def test_a_copy_inside_the_mirror_is_no_replica(site: Site) -> None:
    """`cp -r` of a replica beside it: reported, and `path` does not lead to it."""
    import shutil

    from tinker_sync.wiring import rebuild_catalog

    made = site.sandbox.account.add(RUN, "a", payload=adapter(1))
    await site.sync()
    shutil.copytree(site.directory(made.path), site.directory(made.path).with_name("AA-backup"))
    replicas, damaged = rebuild_catalog(site.settings())
    assert replicas == 1
    assert "move it out" in str(damaged[0].defects[0])


async def test_a_state_directory_belongs_to_one_root(site: Site, tmp_path: Path) -> None:
    """The catalog of one root says nothing about another; two states of one root would be two writers."""
    site.sandbox.account.add(RUN, "a", payload=adapter(1))
    site.mirror = {"state": str(tmp_path / "state")}
    assert (await site.sync()).exit_code == 0
    assert not (site.root / ".tinker-sync" / "catalog.db").exists()
    site.mirror = {"state": str(tmp_path / "state"), "root": str(tmp_path / "other")}
    with pytest.raises(WrongRoot, match="catalog of another root"):
        await site.sync()
    site.mirror = {}
    with pytest.raises(WrongRoot, match="set \\[mirror\\] state"):
        await site.sync()


async def test_a_root_with_dir_mode_lets_the_group_in(site: Site) -> None:
    """All the way from the root; only the state stays private."""
    site.mirror = {"dir_mode": "0750", "file_mode": "0640"}
    made = site.sandbox.account.add(RUN, "a", payload=adapter(1))
    await site.sync()
    for path in (site.root, site.root / RUN, site.directory(made.path)):
        assert path.stat().st_mode & 0o777 == 0o750
    assert (site.root / ".tinker-sync").stat().st_mode & 0o777 == 0o700


async def test_headers_of_weights_are_not_kept(site: Site) -> None:
    """Ten files with 12 MB of header each: memory does not grow with their number."""
    import tracemalloc

    header = json.dumps(
        {f"t{n:07}" + "x" * 40: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in range(90_000)}
    ).encode()
    content = len(header).to_bytes(8, "little") + header
    files = tuple(PayloadFile.of(f"m{n}.safetensors", content) for n in range(10))
    site.sandbox.account.add(RUN, "a", "external", payload=Payload(files))
    tracemalloc.start()
    assert (await site.sync()).exit_code == 0
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * len(header), f"{peak / len(header):.0f} times one header"


async def test_cancelling_a_pass_leaves_nothing_half_made(site: Site) -> None:
    """SIGTERM in the middle: stages gone, lock free, the next pass goes on."""
    for n in range(6):
        site.sandbox.account.add(RUN, f"{n:06}", payload=adapter(n, hidden=512))
    site.sandbox.faults.append(Fault("storage", "slow", seconds=0.2))
    task = asyncio.create_task(site.sync())
    await asyncio.sleep(0.7)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert site.staging() == []
    site.sandbox.faults.clear()
    assert (await site.sync()).exit_code == 0


async def test_sixty_checkpoints_with_every_fault_mixed_in(site: Site) -> None:
    """What can be mirrored is, byte for byte; what cannot is named; a second pass fetches nothing again."""
    account, sandbox = site.sandbox.account, site.sandbox
    sandbox.quirks.digests = True
    good: dict[Any, Payload] = {}
    for n in range(40):
        kind = ("training", "sampler", "external")[n % 3]
        payload = adapter(n, optimizer=kind == "training", marker=kind != "external", compressed=n % 4 == 1)
        good[account.add(RUN, f"{n:06}", kind, payload=payload, ttl=timedelta(days=7)).path] = payload
    for name in ("odd name #1?", "%41", ".hidden", "caf\u00e9", "n" * 250):
        good[account.add(RUN, name, payload=adapter(7)).path] = adapter(7)
    bad = {account.add(RUN, f"bad-{name}", payload=Payload((), raw=raw)).path for name, raw in HOSTILE.items()}
    odd = account.add(RUN, "odd", payload=Payload((PayloadFile.of("notes", b"x"),))).path
    bad.add(odd)
    for number, kind in enumerate(("cut", "corrupt", "drop", "wrong-digest", "status", "close-cut")):
        sandbox.faults.append(Fault("storage", kind, times=1, at=9_000, status=503, match=f"/00000{number}"))
    broken = account.add(RUN, "broken", payload=adapter(1)).path
    sandbox.faults.append(Fault("archive", "status", match="/broken", status=500, headers={"x-should-retry": "false"}))
    bad.add(broken)
    dots = account.add(RUN, "..", payload=adapter(1)).path
    bad.add(dots)
    assert (len(good), len(bad), len(account.checkpoints)) == (45, 15, 60)
    result = await site.sync()
    assert set(result.transferred) == set(good)
    assert set(result.failed) == bad
    with open_catalog_for_reading(site.settings()) as catalog:
        for replica in catalog.replicas():
            base = site.root / replica.directory
            found = {str(p.relative_to(base)): p.read_bytes() for p in base.rglob("*") if p.is_file()}
            del found[".tinker-sync.json"]
            assert found == expected(good[replica.path]), replica.path
    assert site.staging() == []
    before = len(sandbox.storage_requests)
    again = await site.sync()
    assert (again.transferred, set(again.failed)) == ([], bad)
    assert len(sandbox.storage_requests) == before


def test_the_sandbox_is_what_it_says(sandbox: Sandbox) -> None:
    """Loopback only."""
    assert sandbox.base_url.startswith("http://127.0.0.1:")
    assert sandbox.storage_url.startswith("http://127.0.0.1:")
