"""The deed, when things happen in another order: overwritten, pinned, lost, late, stale, half done."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import NOW, Site, hours
from tests.test_enforcement import DAY, RUN, START, THIN, clock, here, lab, minutes_ago, save, series, upstream
from tinker_sync.destination.safeguards import FileSafeguards, read_stop, write_pins
from tinker_sync.errors import DiskTrouble, FixFirst
from tinker_sync.journal import Journal, JournalBroken, examine
from tinker_sync.sandbox.adapters import adapter
from tinker_sync.sandbox.faults import Fault, Quirks
from tinker_sync.wiring import rebuild_catalog

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.test_enforcement import MovedClock
    from tinker_sync.model.paths import TinkerPath

__all__ = ["clock", "lab"]


async def copied(lab: Site) -> list[TinkerPath]:
    """A series that is here, and nothing let go yet."""
    paths = series(lab)
    lab.retention["enforce"] = False
    await lab.sync()
    lab.retention["enforce"] = True
    return paths


def before_each(mirror: Any, name: str, then: Callable[..., None]) -> None:
    """Something happens just before a step of enforcement."""
    real = getattr(mirror._enforcer, name)

    async def wrapped(*arguments: Any, **options: Any) -> Any:
        then(*arguments)
        return await real(*arguments, **options)

    setattr(mirror._enforcer, name, wrapped)


def takes_along(lab: Site, lost: TinkerPath) -> None:
    """Every delete destroys that one too."""
    real = lab.sandbox._delete

    def worse(checkpoint: Any) -> None:
        real(checkpoint)
        lab.sandbox.account.checkpoints.pop(lost, None)

    lab.sandbox._delete = worse  # type: ignore[method-assign]


def deletes(lab: Site) -> int:
    """How many DELETE requests came."""
    return sum(1 for method, _ in lab.sandbox.requests if method == "DELETE")


@pytest.mark.parametrize("kind", ["drop", "status"])
async def test_a_delete_is_never_sent_twice_unseen(lab: Site, kind: Any) -> None:
    """The answer is lost and the path is overwritten, or pinned: a blind repeat would hit the new object."""
    paths = await copied(lab)
    real = lab.sandbox._delete

    def overwritten(checkpoint: Any) -> None:
        real(checkpoint)
        if checkpoint.path == paths[0]:
            lab.sandbox.account.add(RUN, paths[0].name, "sampler", payload=adapter(70), time=START - minutes_ago(5))

    lab.sandbox._delete = overwritten  # type: ignore[method-assign]
    lab.sandbox.faults.append(Fault("deleted", kind, status=503, match=paths[0].name))
    await lab.sync()
    assert paths[0] in lab.sandbox.account.checkpoints
    assert lab.sandbox.account.deleted.count(paths[0]) == 1


async def test_a_pin_that_comes_between_two_tries_holds(lab: Site) -> None:
    """The second try asks everything anew."""
    paths = await copied(lab)
    lab.sandbox.faults.append(Fault("delete", "status", status=503, match=paths[0].name, times=1))
    async with lab.opened() as mirror:
        before_each(mirror, "_try_again", lambda _: write_pins(lab.root / ".tinker-sync", [str(paths[0])]))
        await mirror.prune()
    assert paths[0] in lab.sandbox.account.checkpoints
    assert deletes(lab) == 4


async def test_a_call_that_never_got_through_is_made_once_more(lab: Site) -> None:
    """And then the next pass waits ten minutes."""
    paths = await copied(lab)
    lab.sandbox.faults.append(Fault("delete", "drop", match=paths[0].name, times=1))
    result = await lab.sync()
    assert sorted(result.enforced.deleted) == paths[:4]
    assert (result.enforced.failed, result.exit_code) == ({}, 0)


@pytest.mark.parametrize("how", ["overwritten", "pinned-first", "refused-first"])
async def test_the_second_twin_is_judged_anew(lab: Site, how: str) -> None:
    """Overwritten while the first went; or the first did not go at all: then it stays."""
    lab.retention |= {"remote": [THIN | {"types": ["sampler", "training"]}], "enforce": False}
    samplers = series(lab, 3)
    training = series(lab, 3, kind="training")
    await lab.sync()
    first, second = sorted([samplers[0], training[0]], key=lambda path: path.segment)
    lab.sandbox.quirks = Quirks(delete_takes_twin=how == "pinned-first")
    if how == "refused-first":
        lab.sandbox.faults.append(Fault("delete", "status", status=403, match=first.segment + "/"))
    async with lab.opened() as mirror:

        def meanwhile(case: Any) -> None:
            if how == "overwritten" and case.row.path == first:
                kind = "training" if second.segment == "weights" else "sampler"
                lab.sandbox.account.add(RUN, second.name, kind, payload=adapter(60), time=START - hours(2))
            if how == "pinned-first" and case.row.path == first:
                write_pins(lab.root / ".tinker-sync", [str(first)])

        before_each(mirror, "_let_go", meanwhile)
        await mirror.prune()
    assert second in lab.sandbox.account.checkpoints
    if how != "overwritten":
        assert first in lab.sandbox.account.checkpoints
    assert all(deed.state not in ("deleting", "setting-ttl") for deed in await deeds(lab))


async def deeds(lab: Site) -> list[Any]:
    """What the catalog holds of deeds."""
    async with lab.opened() as mirror:
        return list(mirror._catalog.deeds().values())


async def test_what_is_being_deleted_is_no_second_copy(lab: Site) -> None:
    """Deleted, and still listed for a while: the replica stays, by local rules and by max_bytes."""
    paths = await copied(lab)
    lab.sandbox.quirks = Quirks(delete_forgets=True)
    await lab.sync()
    lab.retention["local"] = [THIN | {"name": "here"}]
    lab.mirror = {"max_bytes": 1}
    result = await lab.sync()
    assert {path.name for path in paths[:4]} <= here(lab)
    assert not set(result.enforced.trashed) & set(paths[:4])


async def test_superseded_versions_have_guards_too(lab: Site) -> None:
    """Pinned, or the last copy of what policy deleted: they stay, whatever keep_superseded says."""
    lab.mirror = {"keep_superseded": 0}
    paths = await copied(lab)
    await lab.sync()
    assert paths[0] in lab.sandbox.account.deleted
    write_pins(lab.root / ".tinker-sync", [str(paths[4])])
    for path in (paths[0], paths[4], paths[5]):
        lab.sandbox.account.add(RUN, path.name, "sampler", payload=adapter(80), time=START - hours(3))
    await lab.sync()
    kept = {path.name.partition("@")[0] for path in (lab.root / RUN / "sampler_weights").glob("*@*")}
    assert kept == {paths[0].name, paths[4].name}
    assert len(list((lab.root / ".tinker-sync" / "trash").iterdir())) == 1


async def test_a_deed_is_about_an_object_and_not_about_a_path(lab: Site, clock: MovedClock) -> None:
    """The path lives again and goes again: that the first object was deleted by us is not forgotten."""
    paths = await copied(lab)
    await lab.sync()
    lab.sandbox.account.add(RUN, paths[0].name, "sampler", payload=adapter(33), time=START - 3 * DAY)
    clock.at += hours(1)
    await lab.sync()
    assert [deed.state for deed in await deeds(lab) if deed.path == paths[0]] == ["confirmed", "confirmed"]


async def test_a_stale_listing_does_not_make_us_forget_our_ttl(lab: Site, clock: MovedClock) -> None:
    """It shows the old expiry for a while: the TTL is still watched, and restored."""
    lab.retention |= {"action": "expire", "grace": "3d"}
    paths = await copied(lab)
    await lab.sync()
    ends = lab.sandbox.account.checkpoints[paths[0]].expires_at
    lab.sandbox.account.checkpoints[paths[0]].expires_at = None
    clock.at += minutes_ago(5)
    await lab.sync()
    lab.sandbox.account.checkpoints[paths[0]].expires_at = ends
    write_pins(lab.root / ".tinker-sync", [str(paths[0])])
    clock.at += minutes_ago(5)
    assert (await lab.sync()).enforced.restored == [paths[0]]
    assert lab.sandbox.account.checkpoints[paths[0]].expires_at is None


async def test_a_ttl_is_set_once(lab: Site, clock: MovedClock) -> None:
    """Somebody cleared it: it is left alone; a delete by policy would still be one."""
    lab.retention |= {"action": "expire", "grace": "3d"}
    paths = await copied(lab)
    await lab.sync()
    await lab.sync()
    lab.sandbox.account.checkpoints[paths[0]].expires_at = None
    for _ in range(3):
        clock.at += hours(2)
        assert (await lab.sync()).enforced.expired == []
    assert lab.sandbox.account.checkpoints[paths[0]].expires_at is None
    lab.retention |= {"action": "delete", "grace": "0s"}
    await lab.sync()
    assert paths[0] in lab.sandbox.account.deleted


async def test_an_open_intent_needs_look_and_listing_to_agree(lab: Site, clock: MovedClock) -> None:
    """One 404 of the run's list after a crash is no proof that anything is gone."""
    lab.retention |= {"action": "expire", "grace": "3d"}
    paths = await copied(lab)
    async with lab.opened() as mirror:
        remover = mirror._enforcer._remover
        real = remover.set_ttl

        async def dies(path: TinkerPath, seconds: int | None) -> None:
            await real(path, seconds)
            raise asyncio.CancelledError

        remover.set_ttl = dies
        with pytest.raises(asyncio.CancelledError):
            await mirror.prune()
    lab.sandbox.faults.append(Fault("run", "status", status=404, times=1))
    lab.retention["enforce"] = False
    await lab.sync()
    assert lab.events("ttl.outcome") == []
    clock.at += hours(1)
    await lab.sync()
    assert lab.events("ttl.outcome")[0]["outcome"] == "set"
    write_pins(lab.root / ".tinker-sync", [str(paths[0])])
    assert (await lab.sync()).enforced.restored == [paths[0]]


async def test_a_loss_is_judged_whatever_happens_between(lab: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flag could not be written, or the process died: the next pass stops all the same."""
    paths = await copied(lab)
    lost = save(lab, "keep-me", "training", age=9 * DAY)
    save(lab, "newest", "training", age=DAY)
    takes_along(lab, lost)
    with monkeypatch.context() as patched:
        patched.setattr(FileSafeguards, "stop", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        await lab.sync()
    assert len(lab.sandbox.account.deleted) == 4
    save(lab, "000007", age=hours(5))
    save(lab, "000008", age=hours(4))
    again = await lab.sync()
    assert again.exit_code == 5
    assert again.enforced.deleted == []
    assert str(lost) in str(read_stop(lab.root / ".tinker-sync"))
    assert paths[4] in lab.sandbox.account.checkpoints


async def test_our_ttls_are_watched_while_transfers_run(lab: Site, clock: MovedClock) -> None:
    """A pin is seen by the next poll, not after a backfill."""
    lab.retention |= {"action": "expire", "grace": "3d"}
    paths = await copied(lab)
    await lab.sync()
    write_pins(lab.root / ".tinker-sync", [str(paths[0])])
    clock.at += hours(1)
    async with lab.opened() as mirror:
        await mirror._poll()
        assert mirror.result.enforced.restored == [paths[0]]


async def test_a_short_grace_is_read_again_before_its_end(lab: Site, clock: MovedClock) -> None:
    """A TTL of four hours has its last reading in the last hour."""
    lab.retention |= {"action": "expire", "grace": "4h"}
    paths = await copied(lab)
    await lab.sync()
    victim = lab.directory(paths[0]) / "adapter_model.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1] + b"!")
    clock.at += hours(2)
    assert (await lab.sync()).enforced.restored == []
    clock.at += hours(1) + minutes_ago(5)
    assert (await lab.sync()).enforced.restored == [paths[0]]


async def test_every_new_look_is_judged(lab: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long batch: the newest was deleted by hand before the second look; what is the newest now stays."""
    lab.retention["remote"] = [THIN | {"keep_last": 1}]
    paths = await copied(lab)
    monkeypatch.setattr("tinker_sync.enforcement.LOOK_HOLDS", 0.0)
    async with lab.opened() as mirror:

        def meanwhile(case: Any) -> None:
            if case.row.path == paths[1]:
                lab.sandbox.account.checkpoints.pop(paths[5], None)

        before_each(mirror, "_let_go", meanwhile)
        await mirror.prune()
    assert upstream(lab) == {paths[4].name}


async def test_a_pinned_twin_restores_the_other(lab: Site, clock: MovedClock) -> None:
    """Both run out by our TTL on a server that may take both: a pin on one saves both."""
    lab.retention |= {"action": "expire", "grace": "3d", "remote": [THIN | {"types": ["sampler", "training"]}]}
    samplers = series(lab, 3)
    training = series(lab, 3, kind="training")
    first = await lab.sync()
    assert sorted(first.enforced.expired) == sorted([samplers[0], training[0]])
    clock.at += hours(1)
    write_pins(lab.root / ".tinker-sync", [str(samplers[0])])
    assert sorted((await lab.sync()).enforced.restored) == sorted([samplers[0], training[0]])


async def test_a_restore_looks_first(lab: Site, clock: MovedClock) -> None:
    """The path was overwritten by a rolling save after the listing: it does not become immortal."""
    lab.retention |= {"action": "expire", "grace": "3d"}
    paths = await copied(lab)
    await lab.sync()
    clock.at += hours(1)
    write_pins(lab.root / ".tinker-sync", [str(paths[0])])
    async with lab.opened() as mirror:
        before_each(
            mirror,
            "_restore",
            lambda *_: lab.sandbox.account.add(
                RUN, paths[0].name, "sampler", payload=adapter(5), time=clock.at, ttl=hours(2)
            ),
        )
        await mirror._poll()
    assert lab.sandbox.account.checkpoints[paths[0]].expires_at == clock.at + hours(2)


@pytest.mark.parametrize("moved", [True, False])
async def test_a_crash_on_the_way_into_the_trash(lab: Site, *, moved: bool) -> None:
    """The next start finds the replica where it is, and the catalog says so."""
    lab.retention |= {"remote": [], "local": []}
    paths = series(lab)
    await lab.sync()
    lab.retention |= {"local": [THIN | {"name": "here"}], "enforce": True}
    async with lab.opened() as mirror:
        destination = mirror._enforcer._destination
        real = destination.retire

        def dies(directory: str) -> str:
            if moved:
                real(directory)
            raise asyncio.CancelledError

        destination.retire = dies
        with pytest.raises(asyncio.CancelledError):
            await mirror.prune()
    lab.retention["local"] = []
    result = await lab.sync()
    assert result.transferred == ([paths[0]] if moved else [])
    assert here(lab) == {path.name for path in paths}
    assert lab.events("local.settled")[0]["answer"] == ("in the trash" if moved else "in its place")


async def test_the_breaker_counts_the_deletes_of_the_pass(lab: Site, clock: MovedClock) -> None:
    """With a grace, one a day is no mass deletion, however many wait for their time."""
    lab.retention |= {"grace": "7d", "max_deletes": 3}
    series(lab, 9)
    for day in range(14):
        save(lab, f"1{day:05}", age=hours(2))
        result = await lab.sync()
        if result.enforced.breaker is not None:
            assert (day, result.enforced.breaker.deletes) == (7, 8), "those of the first day"
            await lab.prune(allow=8)
        clock.at += DAY
    assert len(lab.sandbox.account.deleted) > 10
    assert (await lab.sync()).exit_code == 0


async def test_orphans_count_for_the_breaker(lab: Site) -> None:
    """They are the last copies: an empty listing that was believed takes no more than the limit."""
    lab.retention |= {"remote": [], "local": [THIN | {"name": "here", "keep_orphans": False}], "max_deletes": 3}
    series(lab, 9)
    lab.retention["local"] = []
    await lab.sync()
    lab.sandbox.account.checkpoints.clear()
    lab.retention["local"] = [THIN | {"name": "here", "keep_orphans": False}]
    result = await lab.sync()
    assert (result.exit_code, len(here(lab))) == (5, 9)


async def test_a_ttl_is_never_later_than_the_present_expiry(lab: Site, clock: MovedClock) -> None:
    """Time passes between the decision and the call."""
    lab.retention |= {"action": "expire", "grace": "3d"}
    paths = await copied(lab)
    ends = clock.at + 3 * DAY + minutes_ago(1)
    for path in paths[:4]:
        lab.sandbox.account.checkpoints[path].expires_at = ends
    await lab.sync()
    async with lab.opened() as mirror:

        def later(*_: Any) -> None:
            clock.at += minutes_ago(6)

        before_each(mirror, "_let_go", later)
        await mirror.prune()
    assert all(lab.sandbox.account.checkpoints[path].expires_at <= ends for path in paths[:4])  # type: ignore[operator]


async def test_rescue_spares_what_no_archive_is_handed_out_for(lab: Site) -> None:
    """A server that refuses archives as a whole gets no bill for what nobody can copy."""
    lab.retention |= {"remote": []}
    lab.mirror = {"extend_ttl": True}
    lab.sandbox.quirks = Quirks(no_archives=410)
    for n in range(8):
        save(lab, f"{n:06}", age=5 * DAY, ttl=5 * DAY + minutes_ago(20))
    await lab.sync()
    result = await lab.sync()
    assert result.enforced.extended == []


async def test_one_run_that_cannot_be_looked_at_stops_no_other(lab: Site) -> None:
    """It is withheld, and named."""
    await copied(lab)
    other = "00000000-0000-4000-8000-000000000001:train:0"
    for n in range(4):
        at = START - (9 - n) * DAY
        lab.sandbox.account.add(other, f"{n:06}", "sampler", payload=adapter(n), time=at)
    lab.sandbox.faults.append(Fault("run", "status", status=403, match=other))
    result = await lab.sync()
    assert len(result.enforced.deleted) == 4
    assert len(result.enforced.withheld) == 2


async def test_a_404_for_a_ttl_is_no_delete(lab: Site) -> None:
    """A server without the route: nothing is said to be gone that is there."""
    lab.retention |= {"action": "expire", "grace": "3d"}
    await copied(lab)
    lab.sandbox.faults.append(Fault("ttl", "status", status=404))
    result = await lab.sync()
    assert (result.enforced.deleted, len(result.enforced.failed)) == ([], 4)


async def test_the_shrink_guard_is_not_masked_by_new_rows(lab: Site) -> None:
    """Nine of ten went and nine came: taken again before it is believed."""
    lab.retention["remote"] = []
    paths = series(lab, 10)
    await lab.sync()
    for path in paths[:9]:
        del lab.sandbox.account.checkpoints[path]
    for n in range(9):
        save(lab, f"9{n:05}", age=hours(2))
    await lab.sync()
    assert 30.0 in lab.clock.slept  # type: ignore[attr-defined]


async def test_reindex_keeps_the_life_at_birth(lab: Site, clock: MovedClock) -> None:
    """A rolling save whose TTL was lengthened is still one when the catalog is made anew."""
    lab.retention |= {"remote": [THIN], "enforce": False}
    series(lab, 3)
    rolling = save(lab, "rolling", age=minutes_ago(80), ttl=hours(2))
    await lab.sync()
    lab.sandbox.account.checkpoints[rolling].expires_at = clock.at + 30 * DAY
    await lab.sync()
    (lab.root / ".tinker-sync" / "catalog.db").unlink()
    rebuild_catalog(lab.settings())
    async with lab.opened() as mirror:
        decision = await mirror._enforcer.decide(await mirror._survey())
    assert decision.members[rolling].short_lived
    going = {v.path.name for v in decision.plan.verdicts if v.side == "remote" and v.action != "keep"}
    assert going == {"000000"}


async def test_the_newest_without_an_expiry_stays_beside_the_newest(lab: Site) -> None:
    """The cookbook's checkpoints of seven days are the newest: without the older ones nothing would be left."""
    lab.retention["remote"] = [THIN | {"keep_last": 1}]
    for n in range(3):
        save(lab, f"{n:06}", age=(9 - n) * DAY)
    for n in range(3, 6):
        save(lab, f"{n:06}", age=(9 - n) * DAY, ttl=9 * DAY)
    await lab.sync()
    assert upstream(lab) == {"000002", "000005"}


async def test_the_trash_is_not_emptied_for_space_while_stopped(lab: Site) -> None:
    """Stopped is stopped."""
    lab.retention |= {"remote": [], "local": []}
    series(lab)
    await lab.sync()
    lab.retention["local"] = [THIN | {"name": "here"}]
    await lab.sync()
    FileSafeguards(lab.root / ".tinker-sync").stop("odd", lab.clock.now())
    lab.mirror = {"min_free": "100TB"}
    save(lab, "000009", age=hours(2))
    result = await lab.sync()
    assert result.failed
    assert len(list((lab.root / ".tinker-sync" / "trash").iterdir())) == 4


@pytest.mark.parametrize("what", ["pins", "journal"])
async def test_trouble_of_this_side_stops_no_copying(lab: Site, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken pins file, a journal that cannot be written: copied all the same, nothing deleted, and said."""
    paths = await copied(lab)
    new = save(lab, "000009", age=hours(2))
    if what == "pins":
        (lab.root / ".tinker-sync" / "pins").write_text("not a pin\n")
    else:

        def full(*_: Any) -> None:
            message = "the journal cannot be written"
            raise JournalBroken(message)

        monkeypatch.setattr(Journal, "append", full)
    result = await lab.sync()
    assert new in result.transferred
    assert (result.exit_code, lab.sandbox.account.deleted) == (1, [])
    assert result.enforced.error
    assert here(lab) >= {path.name for path in paths}
    if what == "pins":
        with pytest.raises(FixFirst):
            await lab.prune()


async def test_a_refused_restore_is_tried_again_in_ten_minutes(lab: Site, clock: MovedClock) -> None:
    """Not at every poll: the journal would fill."""
    lab.retention |= {"action": "expire", "grace": "3d"}
    paths = await copied(lab)
    await lab.sync()
    await lab.sync()
    write_pins(lab.root / ".tinker-sync", [str(paths[0])])
    lab.sandbox.faults.append(Fault("ttl", "status", status=403))
    for _ in range(5):
        clock.at += minutes_ago(1)
        await lab.sync()
    assert sum(event["action"] == "restore" for event in lab.events("ttl.intent")) == 1
    lab.sandbox.faults.clear()
    clock.at += minutes_ago(10)
    assert (await lab.sync()).enforced.restored == [paths[0]]


def test_a_failed_rotation_destroys_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new file could not be made: nothing more is written, and the chain is whole afterwards."""
    event = {"time": NOW.isoformat(), "event": "delete.intent"}
    with Journal(tmp_path, rotate_at=100) as journal:
        for _ in range(3):
            journal.append(event)

        def refuse() -> None:
            raise OSError(24, "Too many open files")

        with monkeypatch.context() as patched:
            patched.setattr(journal, "_open", refuse)
            for _ in range(3):
                with pytest.raises(JournalBroken):
                    journal.append(event)
        with pytest.raises(JournalBroken):
            journal.append(event)
    lines = examine(tmp_path).lines
    with Journal(tmp_path, rotate_at=200) as journal:
        journal.append(event)
    found = examine(tmp_path)
    assert (found.lines, found.problems) == (lines + 1, [])
    assert lines >= 2


def test_the_ttl_of_the_helper_is_a_duration() -> None:
    """The helper's own assumption."""
    assert minutes_ago(60) == hours(1) == timedelta(hours=1)


async def test_what_is_still_listed_is_not_said_to_be_deleted(lab: Site) -> None:
    """The service says 204 and lists on: named as a failure, exit 1."""
    await copied(lab)
    lab.sandbox.quirks = Quirks(delete_forgets=True)
    result = await lab.sync()
    assert (result.enforced.deleted, len(result.enforced.failed), result.exit_code) == ([], 4, 1)


async def test_an_orphan_is_looked_for_before_it_goes(lab: Site) -> None:
    """The list of the account lacks it, its run's own list has it: it stays."""
    lab.retention |= {"remote": [], "local": [], "max_deletes": 99}
    paths = series(lab)
    await lab.sync()
    lab.retention["local"] = [THIN | {"name": "here", "keep_orphans": False}]
    kept = {path: lab.sandbox.account.checkpoints.pop(path) for path in paths[:3]}
    async with lab.opened() as mirror:
        before_each(mirror, "_local_batch", lambda *_: lab.sandbox.account.checkpoints.update(kept))
        result = await mirror.prune()
    assert set(result.enforced.withheld) == set(paths[:3])
    assert {path.name for path in paths[:3]} <= here(lab)


@pytest.mark.parametrize("which", ["replica", "segment"])
async def test_a_replica_behind_a_symbolic_link_proves_nothing(lab: Site, tmp_path: Path, which: str) -> None:
    """What is not below the root can go at any time."""
    paths = await copied(lab)
    source = lab.directory(paths[0]) if which == "replica" else lab.directory(paths[0]).parent
    source.rename(tmp_path / "elsewhere")
    source.symlink_to(tmp_path / "elsewhere")
    result = await lab.prune()
    assert paths[0] not in lab.sandbox.account.deleted
    assert "symbolic link" in result.enforced.withheld[paths[0]]


async def test_reindex_without_the_journal_keeps_what_the_catalog_knew(lab: Site) -> None:
    """The last copies of what we deleted stay the last copies; a journal that lost lines is found out."""
    paths = await copied(lab)
    await lab.sync()
    state = lab.root / ".tinker-sync"
    (state / "journal.jsonl").unlink()
    rebuild_catalog(lab.settings())
    lab.retention |= {"remote": [], "local": [THIN | {"name": "here", "keep_orphans": False}]}
    assert (await lab.sync()).enforced.trashed == []
    assert {path.name for path in paths[:4]} <= here(lab)


async def test_a_journal_that_was_emptied_is_taken_up_from_its_new_beginning(lab: Site, clock: MovedClock) -> None:
    """What happens afterwards is not passed over."""
    await copied(lab)
    await lab.sync()
    (lab.root / ".tinker-sync" / "journal.jsonl").write_text("")
    save(lab, "000008", age=hours(3))
    clock.at += hours(1)
    await lab.sync()
    states = {deed.path.name: deed.state for deed in await deeds(lab)}
    assert states == {f"{n:06}": "confirmed" for n in range(5)}


async def test_an_empty_catalog_is_none(lab: Site) -> None:
    """A file of no bytes, as a full disk leaves it, is made anew from the tree and the journal."""
    paths = await copied(lab)
    await lab.sync()
    for path in (lab.root / ".tinker-sync").glob("catalog.db*"):
        path.write_bytes(b"")
    lab.retention |= {"remote": [], "local": [THIN | {"name": "here", "keep_orphans": False}]}
    assert (await lab.sync()).enforced.trashed == []
    async with lab.opened() as mirror:
        assert len(mirror._catalog.known().replicas) == len(paths)


async def test_a_pin_with_a_blank_behind_it_holds(lab: Site) -> None:
    """A slip of an editor."""
    paths = await copied(lab)
    (lab.root / ".tinker-sync" / "pins").write_text(f"{paths[0]} \n  */*/000001\t\n")
    await lab.sync()
    assert upstream(lab) >= {"000000", "000001"}


@pytest.mark.parametrize("how", ["link", "directory", "binary", "fifo"])
async def test_a_stop_flag_of_any_kind_stops(lab: Site, how: str) -> None:
    """A dangling link, a directory, garbage, a FIFO: all of them, and `resume` lifts them."""
    import os

    from tinker_sync.destination.safeguards import lift_stop

    await copied(lab)
    flag = lab.root / ".tinker-sync" / "stop"
    if how == "link":
        flag.symlink_to("/nowhere/at/all")
    elif how == "directory":
        flag.mkdir()
    elif how == "binary":
        flag.write_bytes(b"\xff\x00" + b"[" * 200_000)
    else:
        os.mkfifo(flag)
    assert (await lab.sync()).exit_code == 5
    assert lab.sandbox.account.deleted == []
    lift_stop(flag.parent)
    assert len((await lab.sync()).enforced.deleted) == 4


async def test_restoring_reads_first(lab: Site) -> None:
    """What is not whole stays in the trash; a whole one changes places with a damaged one."""
    lab.retention |= {"remote": [], "local": []}
    paths = series(lab)
    await lab.sync()
    lab.retention["local"] = [THIN | {"name": "here"}]
    await lab.sync()
    lab.retention["local"] = []
    await lab.sync()
    weights = lab.directory(paths[0]) / "adapter_model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + b"!")
    async with lab.opened() as mirror:
        tree = mirror._destination
        entries = {item.path: item.entry for item in tree.trashed()}
        tree.restore(entries[paths[0]])
        assert weights.read_bytes() == good
        with pytest.raises(DiskTrouble, match="is here already, whole"):
            tree.restore(entries[paths[1]])
        trashed = lab.root / ".tinker-sync" / "trash" / entries[paths[2]]
        (trashed / "adapter_config.json").write_text("{}")
        with pytest.raises(DiskTrouble, match="is not whole"):
            tree.restore(entries[paths[2]])
        with pytest.raises(DiskTrouble, match="not the one that it went with"):
            tree.restore(entries[paths[3]], "0" * 64)


async def test_what_a_server_repeats_of_keys_and_urls_goes_nowhere(lab: Site) -> None:
    """Into no output, no journal, no catalog."""
    await copied(lab)
    secrets = (lab.sandbox.key, "https://bucket.example/o?X-Amz-Signature=abc123", "eyJhbGciOi.J9.x", "X-Sig=zzz9")
    body = '{"detail": "no: ' + " ".join(secrets) + '"}'
    lab.sandbox.faults.append(Fault("delete", "body", status=403, body=body.encode()))
    result = await lab.sync()
    said = str(result.as_json()) + str(lab.events())
    said += (lab.root / ".tinker-sync" / "catalog.db").read_bytes().decode(errors="replace")
    assert len(result.enforced.failed) == 4
    for secret in (lab.sandbox.key, "abc123", "eyJhbG", "zzz9"):
        assert secret not in said
    assert "bucket.example" in said


async def test_a_root_that_is_a_link_is_a_root(lab: Site, tmp_path: Path) -> None:
    """A data disk is often linked: its replicas prove as much as others."""
    (tmp_path / "disk").mkdir()
    lab.root.symlink_to(tmp_path / "disk")
    await copied(lab)
    result = await lab.sync()
    assert (len(result.enforced.deleted), result.transferred) == (4, [])


async def test_a_lost_ttl_and_a_404_conclude_nothing(lab: Site, clock: MovedClock) -> None:
    """The intent stays open until look and listing agree; then a pin restores it."""
    lab.retention |= {"action": "expire", "grace": "3d"}
    paths = await copied(lab)
    real = lab.sandbox._set_ttl

    def vanishing(checkpoint: Any, body: Any) -> Any:
        answer = real(checkpoint, body)
        if checkpoint.path == paths[0] and not lab.sandbox.faults:
            lab.sandbox.faults.append(Fault("run", "status", status=404, times=1))
            answer = lab.sandbox._set_ttl_answer_lost
        return answer

    lab.sandbox._set_ttl_answer_lost = None  # type: ignore[attr-defined]
    lab.sandbox._set_ttl = vanishing  # type: ignore[method-assign]
    await lab.sync()
    clock.at += hours(1)
    await lab.sync()
    write_pins(lab.root / ".tinker-sync", [str(paths[0])])
    await lab.sync()
    assert lab.sandbox.account.checkpoints[paths[0]].expires_at is None
    assert not [deed for deed in await deeds(lab) if deed.path == paths[0]]


async def test_what_comes_of_age_meanwhile_is_counted_or_waits(lab: Site, clock: MovedClock) -> None:
    """Deciding takes time: one moment is for what is counted and for what is done."""
    lab.retention |= {"grace": "1d", "max_deletes": 3}
    await copied(lab)
    await lab.sync()
    clock.at += DAY - minutes_ago(1)
    async with lab.opened() as mirror:
        real = mirror._enforcer.decide

        async def slow(*arguments: Any, **options: Any) -> Any:
            decision = await real(*arguments, **options)
            clock.at += minutes_ago(5)
            return decision

        mirror._enforcer.decide = slow
        result = await mirror.prune()
    assert (result.enforced.deleted, result.enforced.breaker) == ([], None)
    assert (await lab.sync()).exit_code == 5


async def test_grace_begins_anew_when_the_policies_were_away(lab: Site, clock: MovedClock) -> None:
    """Nothing stood meanwhile."""
    lab.retention |= {"grace": "3d"}
    await copied(lab)
    await lab.sync()
    lab.retention["remote"] = []
    clock.at += DAY
    await lab.sync()
    lab.retention["remote"] = [THIN]
    clock.at += 3 * DAY
    assert (await lab.sync()).enforced.deleted == []


async def test_a_ttl_that_somebody_took_back_explains_no_loss(lab: Site, clock: MovedClock) -> None:
    """It was taken back to keep it: when a delete takes it along, everything stops."""
    lab.retention |= {"action": "expire", "grace": "9d"}
    paths = await copied(lab)
    await lab.sync()
    await lab.sync()
    lab.sandbox.account.checkpoints[paths[0]].expires_at = None
    clock.at += hours(2)
    await lab.sync()
    lab.retention |= {"action": "delete", "grace": "0s", "remote": [THIN | {"keep_names": ["000000"]}]}
    save(lab, "000008", age=hours(4))
    takes_along(lab, paths[0])
    assert str(paths[0]) in str((await lab.sync()).enforced.stopped)


async def test_pins_hold_in_the_trash(lab: Site, clock: MovedClock) -> None:
    """Never delete these, on any side: not after its time, and not for space."""
    lab.retention |= {"remote": [], "local": []}
    paths = series(lab)
    await lab.sync()
    lab.retention["local"] = [THIN | {"name": "here"}]
    await lab.sync()
    write_pins(lab.root / ".tinker-sync", [str(path) for path in paths[:4]])
    clock.at += 30 * DAY
    assert (await lab.sync()).enforced.emptied == 0
    lab.mirror = {"min_free": "100TB"}
    save(lab, "000009", age=hours(2))
    await lab.sync()
    assert len(list((lab.root / ".tinker-sync" / "trash").iterdir())) == 4


async def test_a_pin_on_the_second_twin_holds_the_first(lab: Site) -> None:
    """The first call may take both."""
    lab.retention |= {"remote": [THIN | {"types": ["sampler", "training"]}], "enforce": False}
    lab.sandbox.quirks = Quirks(delete_takes_twin=True)
    samplers = series(lab, 3)
    training = series(lab, 3, kind="training")
    await lab.sync()
    async with lab.opened() as mirror:
        real = mirror._enforcer._intend

        async def meanwhile(case: Any, **options: Any) -> bool:
            intended = await real(case, **options)
            write_pins(lab.root / ".tinker-sync", [str(samplers[0]), str(training[0])][:1])
            return bool(intended)

        mirror._enforcer._intend = meanwhile
        await mirror.prune()
    assert {samplers[0], training[0]} <= set(lab.sandbox.account.checkpoints)


async def test_a_retire_that_fails_half_way_is_known(lab: Site) -> None:
    """The fsync behind the rename fails: the replica is in the trash, and the catalog says so."""
    lab.retention |= {"remote": [], "local": []}
    paths = series(lab)
    await lab.sync()
    lab.retention |= {"local": [THIN | {"name": "here"}], "enforce": True}
    async with lab.opened() as mirror:
        destination = mirror._enforcer._destination
        real = destination.retire

        def failing(directory: str) -> str:
            real(directory)
            message = "cannot move to the trash: Input/output error"
            raise DiskTrouble(message)

        destination.retire = failing
        result = await mirror.prune()
        assert set(result.enforced.failed) == set(paths[:4])
        assert set(mirror._catalog.known().replicas) == set(paths[4:])


async def test_unjudged_losses_outlive_the_catalog(lab: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flag could not be written, and the catalog was made anew: it stops all the same."""
    await copied(lab)
    lost = save(lab, "keep-me", "training", age=9 * DAY)
    save(lab, "newest", "training", age=DAY)
    takes_along(lab, lost)
    with monkeypatch.context() as patched:
        patched.setattr(FileSafeguards, "stop", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        await lab.sync()
    rebuild_catalog(lab.settings())
    save(lab, "000008", age=hours(4))
    again = await lab.sync()
    assert (again.exit_code, again.enforced.deleted) == (5, [])


async def test_a_look_at_one_page_is_no_reason_for_retention(lab: Site) -> None:
    """A large account is not listed in full again because a poll looked at its first page."""
    lab.tinker = lab.tinker | {"page_size": 2}
    lab.retention["enforce"] = False
    series(lab, 12)
    async with lab.opened() as mirror:
        await mirror.poll()
        assert mirror.retention_due
        await mirror.retain()
        lab.sandbox.requests.clear()
        await mirror.poll()
        assert not mirror.retention_due
        assert len(lab.sandbox.requests) == 1
