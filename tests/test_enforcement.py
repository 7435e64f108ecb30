"""The deed: what is deleted, after which proof, and what never is. Against the local server, by a clock that is moved."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import Site, hours
from tinker_sync.destination.safeguards import FileSafeguards, read_stop, write_pins
from tinker_sync.enforcement import SHRUNK_AGAIN, Enforcer
from tinker_sync.model.paths import SEGMENT_OF_TYPE, TinkerPath
from tinker_sync.sandbox import Sandbox
from tinker_sync.sandbox.adapters import adapter
from tinker_sync.sandbox.faults import Fault, Quirks

if TYPE_CHECKING:
    from collections.abc import Callable

RUN = "39aa5eb2-e234-5a95-ab68-896e4cac8c45:train:0"
DAY = timedelta(days=1)
START = datetime(2026, 1, 15, 12, 0, tzinfo=UTC)
THIN = {"name": "thin", "types": ["sampler"], "keep_last": 2}


@dataclass
class MovedClock:
    """A clock that stands still until it is moved; waiting takes no time worth mentioning."""

    at: datetime = START
    slept: list[float] = field(default_factory=list)

    def now(self) -> datetime:
        """Where it stands."""
        return self.at

    def monotonic(self) -> float:
        """The loop's own."""
        return asyncio.get_event_loop().time()

    async def sleep(self, seconds: float) -> None:
        """Noted; the half minute before a second listing is cut short."""
        self.slept.append(seconds)
        await asyncio.sleep(0.01 if seconds == SHRUNK_AGAIN else seconds)


@pytest.fixture
def clock() -> MovedClock:
    """At the start."""
    return MovedClock()


@pytest.fixture
def lab(site: Site, clock: MovedClock) -> Site:
    """A mirror that enforces, on a server with the same clock that is known to keep types apart."""
    site.sandbox.account.now = clock.now
    site.clock = clock
    site.retention = {"remote": [THIN], "enforce": True, "max_delete_fraction": 1.0}
    return site


def save(site: Site, name: str, kind: str = "sampler", *, age: timedelta = DAY, **fields: Any) -> TinkerPath:
    """One checkpoint upstream."""
    at = site.clock.now() - age
    return site.sandbox.account.add(RUN, name, kind, payload=adapter(len(name)), time=at, **fields).path


def series(site: Site, count: int = 6, kind: str = "sampler") -> list[TinkerPath]:
    """One a day, oldest first."""
    return [save(site, f"{n:06}", kind, age=(count - n) * DAY) for n in range(count)]


def upstream(site: Site) -> set[str]:
    """The names that are left there."""
    return {path.name for path in site.sandbox.account.checkpoints}


def here(site: Site) -> set[str]:
    """The names of the replicas."""
    return {path.name for path in (site.root / RUN).glob("*/*") if path.is_dir() and not path.parent.is_symlink()}


def looks(site: Site) -> int:
    """How often a run was looked at."""
    return sum(1 for method, path in site.sandbox.requests if method == "GET" and path.endswith(f"{RUN}/checkpoints"))


async def test_what_a_policy_lets_go_is_proven_journalled_deleted_and_confirmed(lab: Site) -> None:
    """In one pass, with one look for the whole batch; what is kept stays, and the replicas stay."""
    paths = series(lab)
    result = await lab.sync()
    assert upstream(lab) == {"000004", "000005"}
    assert sorted(result.enforced.deleted) == paths[:4]
    assert here(lab) == {path.name for path in paths}
    assert looks(lab) == 1
    intents, outcomes = lab.events("delete.intent"), lab.events("delete.outcome")
    assert [event["tinker_path"] for event in intents] == [event["tinker_path"] for event in outcomes]
    assert all(event["policy"] == "thin" and len(event["manifest_sha256"]) == 64 for event in intents)
    assert all(event["read_back"]["files"] > 0 for event in intents)
    assert len(lab.events("delete.confirmed")) == 4
    assert (result.exit_code, result.as_json()["deleted"]) == (0, [str(path) for path in result.enforced.deleted])
    again = await lab.sync()
    assert again.enforced.deleted == []
    assert here(lab) == {path.name for path in paths}, "what policy deleted upstream is not let go here"


async def test_nothing_happens_unless_enforcement_is_on(lab: Site) -> None:
    """By default the program plans and reports; `prune` does it once."""
    lab.retention["enforce"] = False
    series(lab)
    result = await lab.sync()
    assert (result.enforced.due_remote, lab.sandbox.account.deleted) == (4, [])
    pruned = await lab.prune()
    assert len(pruned.enforced.deleted) == 4
    assert pruned.transferred == []


async def test_one_damaged_replica_stops_nothing_but_its_own_delete(lab: Site) -> None:
    """A flipped byte, a missing file, a changed manifest: kept upstream, and the others go."""
    lab.retention["enforce"] = False
    paths = series(lab, 8)
    await lab.sync()
    flipped = lab.directory(paths[0]) / "adapter_model.safetensors"
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"x")
    (lab.directory(paths[1]) / "adapter_config.json").unlink()
    manifest = lab.directory(paths[2]) / ".tinker-sync.json"
    manifest.write_text(manifest.read_text().replace('"tool_version"', '"tool_versions"'))
    shutil.rmtree(lab.directory(paths[3]))
    result = await lab.prune()
    assert sorted(result.enforced.deleted) == paths[4:6]
    assert set(result.enforced.withheld) == set(paths[:4])
    assert upstream(lab) == {path.name for path in [*paths[:4], *paths[6:]]}
    lab.retention["enforce"] = True
    mended = await lab.sync()
    assert set(mended.transferred) >= {paths[0], paths[1], paths[3]}, "the next pass copies them again"


async def test_the_breaker_stops_all_of_it(lab: Site) -> None:
    """None of the deletes happens, the exit code is 5, and `--allow` lifts it once for so many."""
    lab.retention |= {"max_deletes": 3}
    series(lab)
    result = await lab.sync()
    assert lab.sandbox.account.deleted == []
    assert (result.exit_code, result.as_json()["breaker"]["deletes"]) == (5, 4)
    assert (await lab.prune(allow=3)).exit_code == 5
    assert lab.sandbox.account.deleted == []
    assert len((await lab.prune(allow=4)).enforced.deleted) == 4


async def test_a_verdict_must_stand_for_grace(lab: Site, clock: MovedClock) -> None:
    """It starts anew when it was interrupted, or when the catalog was lost."""
    lab.retention |= {"grace": "2d"}
    paths = series(lab)
    first = await lab.sync()
    assert first.enforced.deleted == []
    assert "2 days left" in first.enforced.withheld[paths[0]]
    clock.at += DAY
    write_pins(lab.root / ".tinker-sync", [str(paths[0])])
    assert (await lab.sync()).enforced.deleted == []
    write_pins(lab.root / ".tinker-sync", [])
    clock.at += DAY
    assert sorted((await lab.sync()).enforced.deleted) == paths[1:4]
    clock.at += 3 * DAY
    assert (await lab.sync()).enforced.deleted == [paths[0]]


async def test_pins_and_the_stop_flag_are_read_before_every_delete(lab: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pin that comes in the middle holds for its checkpoint, the flag for all that are left."""
    paths = series(lab, 8)
    state = lab.root / ".tinker-sync"
    real, count = Enforcer._intend, 0

    async def meanwhile(self: Enforcer, *arguments: Any, **options: Any) -> bool:
        nonlocal count
        count += 1
        if count == 2:
            write_pins(state, [f"{RUN}/*/{paths[1].name}"])
        if count == 4:
            FileSafeguards(state).stop("enough", lab.clock.now())
        return await real(self, *arguments, **options)

    monkeypatch.setattr(Enforcer, "_intend", meanwhile)
    result = await lab.sync()
    assert result.enforced.deleted == [paths[0], paths[2]]
    assert (result.exit_code, result.enforced.stopped) == (5, "enough")
    assert (await lab.sync()).enforced.deleted == []


async def test_403_is_remembered_for_a_day(lab: Site, clock: MovedClock) -> None:
    """It is named, asked for once, and stops nothing else."""
    paths = series(lab)
    lab.sandbox.faults.append(Fault("delete", "status", status=403, match=paths[0].name))
    result = await lab.sync()
    assert sorted(result.enforced.deleted) == paths[1:4]
    assert (result.exit_code, paths[0] in result.enforced.failed) == (1, True)
    asked = len(lab.sandbox.requests)
    clock.at += hours(23)
    assert (await lab.sync()).exit_code == 0
    assert not [item for item in lab.sandbox.requests[asked:] if item[0] == "DELETE"]
    clock.at += hours(2)
    lab.sandbox.faults.clear()
    assert (await lab.sync()).enforced.deleted == [paths[0]]


# Expire, and its way back


async def test_expire_sets_a_ttl_once_and_counts_as_a_delete(lab: Site, clock: MovedClock) -> None:
    """Guards, read-back and journal as ever; when it has run out that is confirmed, and the replica is the last copy."""
    lab.retention |= {"action": "expire", "grace": "3d"}
    paths = series(lab)
    short = save(lab, "000000x", age=20 * DAY, ttl=21 * DAY)
    first = await lab.sync()
    assert sorted(first.enforced.expired) == paths[:4], "one that ends sooner by itself is left alone"
    ends = {path: lab.sandbox.account.checkpoints[path].expires_at for path in paths[:4]}
    assert set(ends.values()) == {clock.at + 3 * DAY}
    assert lab.sandbox.account.checkpoints[short].expires_at == clock.at + DAY
    clock.at += DAY
    assert (await lab.sync()).enforced.expired == []
    clock.at += 2 * DAY
    await lab.sync()
    assert upstream(lab) == {"000004", "000005"}
    confirmed = {event["tinker_path"] for event in lab.events("delete.confirmed")}
    assert confirmed == {str(path) for path in paths[:4]}
    lab.retention |= {"local": [THIN | {"name": "here", "keep_orphans": False}], "enforce": True}
    await lab.sync()
    assert here(lab) == {path.name for path in paths} | {"000000x"} - ({"000000x"} - here(lab))
    assert {path.name for path in paths[:4]} <= here(lab), "deleted by us: the replica is all there is"


@pytest.mark.parametrize("case", ["pin", "damage", "verdict", "stop", "overwrite"])
async def test_what_gives_an_expiring_checkpoint_its_former_expiry_back(
    lab: Site, clock: MovedClock, case: str
) -> None:
    """A pin, damage of the replica, a changed verdict, the stop flag, an overwrite that kept our TTL."""
    lab.retention |= {"action": "expire", "grace": "3d"}
    former = clock.at + 30 * DAY
    paths = series(lab)
    for path in paths[:4]:
        lab.sandbox.account.checkpoints[path].expires_at = former
    await lab.sync()
    account, state = lab.sandbox.account, lab.root / ".tinker-sync"
    assert account.checkpoints[paths[0]].expires_at == clock.at + 3 * DAY
    clock.at += DAY + hours(1)
    if case == "pin":
        write_pins(state, [str(paths[0])])
    elif case == "damage":
        (lab.directory(paths[0]) / "adapter_model.safetensors").write_bytes(b"x")
    elif case == "verdict":
        lab.retention["remote"] = [THIN | {"keep_names": ["000000"]}]
    elif case == "stop":
        FileSafeguards(state).stop("odd", clock.at)
    else:
        kept = account.checkpoints[paths[0]].expires_at
        account.add(RUN, "000000", "sampler", payload=adapter(99), time=clock.at - hours(2)).expires_at = kept
    result = await lab.sync()
    assert paths[0] in result.enforced.restored
    assert account.checkpoints[paths[0]].expires_at == former
    if case == "stop":
        assert sorted(result.enforced.restored) == paths[:4]
    else:
        assert result.enforced.restored == [paths[0]]
        assert account.checkpoints[paths[1]].expires_at == clock.at + 2 * DAY - hours(1)
    events = [event for event in lab.events("ttl.intent") if event["action"] == "restore"]
    assert events[0]["former_expires_at"] == "2026-02-14T12:00:00Z"
    assert (await lab.sync()).enforced.restored == []


async def test_a_replica_of_an_expiring_checkpoint_is_read_again_daily_and_before_the_end(
    lab: Site, clock: MovedClock
) -> None:
    """Not at every poll."""
    lab.retention |= {"action": "expire", "grace": "2d"}
    paths = series(lab, 3)
    await lab.sync()
    read: list[datetime] = []
    for _ in range(47):
        clock.at += hours(1)
        async with lab.opened() as mirror:
            real = mirror._enforcer._destination.read

            def reading(directory: str, *rest: Any, real: Callable[..., Any] = real) -> Any:
                if directory.endswith(paths[0].name):
                    read.append(clock.at)
                return real(directory, *rest)

            mirror._enforcer._destination.read = reading
            await mirror.sync()
    assert [int((at - START) / hours(1)) for at in read] == [24, 42]


# Losses that nobody meant


async def test_a_delete_that_takes_something_else_with_it_stops_everything(lab: Site, clock: MovedClock) -> None:
    """Also when the loss is only seen by the next process; what expired or went by ourselves is no loss."""
    paths = series(lab)
    lost = save(lab, "keep-me", "training", age=9 * DAY)
    save(lab, "newest", "training", age=DAY)
    save(lab, "dying", "training", age=9 * DAY, ttl=9 * DAY)
    real = lab.sandbox._delete

    def worse(checkpoint: Any) -> None:
        real(checkpoint)
        lab.sandbox.account.checkpoints.pop(lost, None)

    lab.sandbox._delete = worse  # type: ignore[method-assign]
    result = await lab.sync()
    assert result.exit_code == 5
    assert str(lost) in str(result.enforced.stopped)
    assert lab.events("enforcement.stopped")[0]["lost"] == [str(lost)]
    save(lab, "000007", age=hours(5))
    save(lab, "000008", age=hours(4))
    stopped = await lab.sync()
    assert (stopped.enforced.deleted, stopped.exit_code) == ([], 5)
    assert stopped.transferred, "copying goes on"
    (lab.root / ".tinker-sync" / "stop").unlink()
    clock.at += hours(1)
    assert set((await lab.sync()).enforced.deleted) == set(paths[4:])


@pytest.mark.parametrize("together", [True, False])
async def test_the_same_name_in_two_types_on_a_server_that_deletes_both(lab: Site, *, together: bool) -> None:
    """On a server not known to keep types apart a name goes as a whole or not at all; then it is known."""
    lab.sandbox.quirks = Quirks(delete_takes_twin=together)
    both = THIN | {"types": ["sampler", "training"]}
    lab.retention["remote"] = [both]
    samplers = series(lab)
    series(lab, kind="training")
    alone = save(lab, "solo", age=20 * DAY)
    lab.retention["remote"] = [THIN]
    first = await lab.sync()
    assert first.enforced.deleted == [alone], "the training twins are kept, so their samplers are too"
    lab.retention["remote"] = [both]
    await lab.sync()
    assert upstream(lab) == {"000004", "000005"}
    assert len(lab.sandbox.account.checkpoints) == 4
    assert lab.events("server.types")[0]["apart"] is not together
    assert read_stop(lab.root / ".tinker-sync") is None, "the twins were to go as well"
    lab.retention["remote"] = [THIN | {"keep_last": 1}]
    save(lab, "000006", age=hours(3))
    await lab.sync()
    assert (samplers[4] in lab.sandbox.account.checkpoints) is together


async def test_a_twin_that_stays_listed_without_its_bytes_is_no_sign_of_sanity(lab: Site) -> None:
    """As in TuFT: the listing does not reveal the loss, asking for the archive does."""
    lab.sandbox.quirks = Quirks(delete_takes_twin=True, twin_stays_listed=True)
    lab.retention["remote"] = [THIN | {"types": ["sampler", "training"]}]
    series(lab, 3)
    series(lab, 3, kind="training")
    await lab.sync()
    assert len(lab.sandbox.account.deleted) == 1
    assert not [event for event in lab.events("server.types") if event["apart"]]


async def test_a_twin_without_proof_holds_the_other(lab: Site) -> None:
    """Both are to go; the replica of one is damaged: neither goes."""
    lab.retention |= {"remote": [THIN | {"types": ["sampler", "training"]}], "enforce": False}
    series(lab, 3)
    training = series(lab, 3, kind="training")
    await lab.sync()
    (lab.directory(training[0]) / "adapter_config.json").write_text("{}")
    result = await lab.prune()
    assert result.enforced.deleted == []
    assert len(result.enforced.withheld) == 2


# Accidents of others, by name


async def test_accident_an_empty_listing(lab: Site) -> None:
    """Everything seems gone: taken again half a minute later; nothing here or there is let go by it."""
    lab.retention |= {"local": [THIN | {"name": "here", "keep_orphans": True}]}
    lab.retention["remote"] = []
    paths = series(lab)
    save(lab, "only-here", "training", age=9 * DAY)
    await lab.sync()
    before = here(lab)
    kept = dict(lab.sandbox.account.checkpoints)
    lab.sandbox.account.checkpoints.clear()
    await lab.sync()
    assert 30.0 in lab.clock.slept  # type: ignore[attr-defined]
    assert here(lab) == before
    lab.sandbox.account.checkpoints.update(kept)
    await lab.sync()
    assert lab.sandbox.account.deleted == []
    assert upstream(lab) >= {path.name for path in paths}


async def test_accident_a_partial_listing_and_a_page_error(lab: Site) -> None:
    """A page fails: nothing goes, what was shown is copied, the exit code is 3."""
    lab.tinker = {"page_size": 2}
    series(lab)
    lab.sandbox.faults.append(Fault("list", "status", status=500, match="offset=2;"))
    result = await lab.sync()
    assert (lab.sandbox.account.deleted, result.exit_code) == ([], 3)
    assert result.transferred
    lab.sandbox.faults.clear()
    assert (await lab.sync()).enforced.deleted


async def test_accident_an_overwritten_path(lab: Site) -> None:
    """Between listing and look the path became another object: it is not the one that was proven."""
    paths = series(lab)
    lab.retention["enforce"] = False
    await lab.sync()
    async with lab.opened() as mirror:
        real = mirror._enforcer._prove

        async def meanwhile(batch: Any) -> Any:
            lab.sandbox.account.add(RUN, paths[0].name, "sampler", payload=adapter(77), time=START - 2 * DAY)
            lab.sandbox.account.checkpoints[paths[1]].user_metadata = {"best": "yes"}
            lab.sandbox.account.checkpoints[paths[2]].public = True
            return await real(batch)

        mirror._enforcer._prove = meanwhile
        result = await mirror.prune()
    assert result.enforced.deleted == [paths[3]]
    assert set(result.enforced.withheld) == set(paths[:3])


async def test_accident_expiry_during_the_pass(lab: Site, clock: MovedClock) -> None:
    """What ran out by itself meanwhile is no error and no delete of ours."""
    paths = series(lab)
    lab.sandbox.account.checkpoints[paths[0]].expires_at = START + hours(1)
    lab.retention["enforce"] = False
    await lab.sync()
    async with lab.opened() as mirror:
        real = mirror._enforcer._prove

        async def meanwhile(batch: Any) -> Any:
            found = await real(batch)
            clock.at += hours(2)
            return found

        mirror._enforcer._prove = meanwhile
        result = await mirror.prune()
    assert sorted(result.enforced.deleted) == paths[1:4]
    assert result.exit_code == 0


@pytest.mark.parametrize("off", [timedelta(days=3650), timedelta(days=-3650)])
async def test_accident_a_clock_ten_years_off(lab: Site, clock: MovedClock, off: timedelta) -> None:
    """Ahead or set back: no listing is proven by it, so nothing goes, nothing is emptied, and it says why."""
    lab.retention |= {"local": [], "remote": []}
    series(lab)
    await lab.sync()
    lab.retention["local"] = [THIN | {"name": "here"}]
    await lab.sync()
    trashed = list((lab.root / ".tinker-sync" / "trash").iterdir())
    assert len(trashed) == 4
    lab.retention |= {"remote": [THIN], "local": []}
    right = clock.at
    lab.sandbox.account.now = lambda: right
    clock.at += off
    result = await lab.sync()
    assert (lab.sandbox.account.deleted, result.exit_code) == ([], 3)
    assert "clock" in result.doubts[0]
    assert list((lab.root / ".tinker-sync" / "trash").iterdir()) == trashed


@pytest.mark.parametrize("done", [True, False])
async def test_accident_a_crash_between_intent_and_outcome(lab: Site, *, done: bool) -> None:
    """The next start looks, and writes down what came of it."""
    paths = series(lab)
    lab.retention["enforce"] = False
    await lab.sync()
    async with lab.opened() as mirror:
        remover = mirror._enforcer._remover
        real = remover.delete

        async def dies(path: TinkerPath) -> None:
            if done:
                await real(path)
            raise asyncio.CancelledError

        remover.delete = dies
        with pytest.raises(asyncio.CancelledError):
            await mirror.prune()
    assert (len(lab.events("delete.intent")), lab.events("delete.outcome")) == (1, [])
    lab.retention["enforce"] = True
    result = await lab.sync()
    resolved = lab.events("delete.outcome")[0]
    assert resolved["outcome"] == ("gone" if done else "not-done")
    assert resolved["tinker_path"] == str(paths[0])
    assert len(result.enforced.deleted) == (3 if done else 4)
    assert len(lab.events("delete.confirmed")) == 4


@pytest.mark.parametrize("done", [True, False])
async def test_accident_a_lost_answer(lab: Site, clock: MovedClock, *, done: bool) -> None:
    """The connection ends before the answer: looking tells."""
    paths = series(lab)
    lab.sandbox.faults.append(Fault("deleted" if done else "delete", "drop", match=paths[0].name))
    result = await lab.sync()
    assert (paths[0] in result.enforced.deleted) is done
    assert upstream(lab) == {"000004", "000005"} | (set() if done else {"000000"})
    assert (result.exit_code, paths[0] in result.enforced.failed) == ((0, False) if done else (1, True))
    lab.sandbox.faults.clear()
    clock.at += minutes_ago(11)
    await lab.sync()
    assert upstream(lab) == {"000004", "000005"}


async def test_accident_an_answer_lost_and_nobody_to_ask(lab: Site) -> None:
    """The service falls silent after the delete: the intent stays open, the pass ends, the next one resolves it."""
    series(lab)
    lab.retention["enforce"] = False
    await lab.sync()
    async with lab.opened() as mirror:
        real = mirror._enforcer._let_go

        async def silent(case: Any) -> bool:
            lab.sandbox._delete(lab.sandbox.account.checkpoints[case.row.path])
            lab.sandbox.faults.append(Fault("any", "drop"))
            return await real(case)

        mirror._enforcer._let_go = silent
        result = await mirror.prune()
    assert result.exit_code == 3
    assert "cannot be reached" in str(result.service_error)
    assert lab.events("delete.outcome") == []
    lab.sandbox.faults.clear()
    assert len((await lab.prune()).enforced.deleted) == 3
    assert len(lab.sandbox.account.deleted) == 4


async def test_accident_names_with_marks(lab: Site) -> None:
    """`#`, `?`, `%`, `..` in names: exactly the object that is meant goes, and a name `..` is never sent."""
    odd = ["000020#old", "a?b", "a%2Fb", "x..y", "ü n"]
    paths = [save(lab, name, age=(9 - n) * DAY) for n, name in enumerate(odd)]
    save(lab, "000020", age=3 * DAY)
    save(lab, "zz", age=DAY)
    result = await lab.sync()
    assert sorted(result.enforced.deleted) == sorted(paths)
    assert upstream(lab) == {"000020", "zz"}
    assert sorted(lab.sandbox.account.deleted) == sorted(paths)


async def test_accident_a_delete_that_did_nothing(lab: Site, clock: MovedClock) -> None:
    """The service says 204 and still lists it: not confirmed, not repeated for a day, never an endless loop."""
    lab.sandbox.quirks = Quirks(delete_forgets=True)
    series(lab)
    await lab.sync()
    assert lab.events("delete.confirmed") == []
    asked = sum(1 for method, _ in lab.sandbox.requests if method == "DELETE")
    await lab.sync()
    assert sum(1 for method, _ in lab.sandbox.requests if method == "DELETE") == asked
    clock.at += hours(25)
    lab.sandbox.quirks = Quirks()
    assert len((await lab.sync()).enforced.deleted) == 4


async def test_accident_the_newest_went_while_the_proof_was_made(lab: Site) -> None:
    """Somebody deletes the newest by hand meanwhile: what is now the newest stays."""
    paths = series(lab, 4)
    lab.retention |= {"enforce": False, "remote": [THIN | {"keep_last": 1}]}
    await lab.sync()
    async with lab.opened() as mirror:
        real = mirror._enforcer._prove

        async def meanwhile(batch: Any) -> Any:
            del lab.sandbox.account.checkpoints[paths[3]]
            return await real(batch)

        mirror._enforcer._prove = meanwhile
        await mirror.prune()
    assert upstream(lab) == {paths[2].name}


# Here


async def test_local_retention_moves_to_the_trash_and_is_not_copied_again(lab: Site, clock: MovedClock) -> None:
    """Only with a living original; not transferred again; the trash is emptied when its time is over."""
    lab.retention |= {"remote": [], "local": [THIN | {"name": "here"}], "trash": "3d"}
    paths = series(lab)
    expiring = save(lab, "expiring", age=10 * DAY, ttl=20 * DAY)
    first = await lab.sync()
    assert here(lab) == {"000004", "000005", "expiring"}
    assert expiring.name in here(lab), "its original expires: that is no second copy"
    assert first.transferred, "what was known to go at once was not even copied"
    assert not set(paths[:4]) & set(first.transferred)
    save(lab, "000006", age=hours(2))
    second = await lab.sync()
    assert (second.enforced.trashed, here(lab)) == ([paths[4]], {"000005", "000006", "expiring"})
    third = await lab.sync()
    assert third.transferred == []
    assert any("local retention" in why for why in third.skipped.values())
    clock.at += 4 * DAY
    assert (await lab.sync()).enforced.emptied == 1
    assert [event["event"] for event in lab.events("local.trashed", "local.emptied")] == [
        "local.trashed",
        "local.emptied",
    ]


async def test_an_original_that_is_gone_by_the_look_is_no_second_copy(lab: Site) -> None:
    """It vanished after the listing: the replica stays."""
    lab.retention |= {"remote": [], "local": []}
    paths = series(lab)
    await lab.sync()
    lab.retention["local"] = [THIN | {"name": "here"}]
    async with lab.opened() as mirror:
        real = mirror._enforcer._carry_out

        async def meanwhile(*arguments: Any) -> None:
            del lab.sandbox.account.checkpoints[paths[0]]
            lab.sandbox.account.checkpoints[paths[1]].expires_at = START + 90 * DAY
            await real(*arguments)

        mirror._enforcer._carry_out = meanwhile
        result = await mirror.prune()
    assert sorted(result.enforced.trashed) == paths[2:4]
    assert set(result.enforced.withheld) == set(paths[:2])


async def test_orphans_stay_unless_told_otherwise(lab: Site) -> None:
    """Gone upstream by somebody else's hand: kept by default; let go by rule when the policy says so."""
    lab.retention |= {"remote": [], "local": []}
    paths = series(lab)
    await lab.sync()
    for path in paths[:3]:
        del lab.sandbox.account.checkpoints[path]
    lab.retention["local"] = [THIN | {"name": "here"}]
    assert (await lab.sync()).enforced.trashed == [paths[3]]
    lab.retention["local"] = [THIN | {"name": "here", "keep_orphans": False}]
    assert sorted((await lab.sync()).enforced.trashed) == paths[:3]


async def test_max_bytes_lets_the_oldest_with_an_original_go(lab: Site) -> None:
    """Last rule: never one whose original expires; what must stay stops the copying, and says so."""
    lab.retention |= {"remote": [], "local": []}
    paths = series(lab)
    await lab.sync()
    one = sum(len(content) for content in lab.payload(paths[0]).values())
    lab.mirror = {"max_bytes": 4 * one + 10}
    result = await lab.sync()
    assert sorted(result.enforced.trashed) == paths[:2]
    for path in lab.sandbox.account.checkpoints.values():
        path.expires_at = START + 50 * DAY
    new = save(lab, "000009", age=hours(2))
    full = await lab.sync()
    assert new in full.failed
    assert "max_bytes" in full.failed[new][0]
    assert (full.enforced.trashed, full.exit_code) == ([], 1)


async def test_trash_is_restored_and_pinned(lab: Site) -> None:
    """The bytes come back where they were; beside, where another object has the name meanwhile."""
    lab.retention |= {"remote": [], "local": []}
    paths = series(lab)
    await lab.sync()
    before = lab.payload(paths[0])
    lab.retention["local"] = [THIN | {"name": "here"}]
    await lab.sync()
    assert not lab.directory(paths[0]).exists()
    async with lab.opened() as mirror:
        tree = mirror._destination
        entry = next(item.entry for item in tree.trashed() if item.path == paths[0])
        tree.restore(entry)
    assert lab.payload(paths[0]) == before
    newer = lab.sandbox.account.add(RUN, paths[1].name, "sampler", payload=adapter(50), time=START - hours(2))
    await lab.sync()
    async with lab.opened() as mirror:
        tree = mirror._destination
        entry = next(item.entry for item in tree.trashed() if item.path == paths[1])
        committed = tree.restore(entry)
    assert committed.replica.time == newer.time
    assert len(committed.superseded or ()) == 1


async def test_a_full_disk_empties_the_trash_before_it_refuses(lab: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oldest first, only as much as is needed, and not at all when it cannot help."""
    lab.retention |= {"remote": [], "local": [THIN | {"name": "here"}]}
    paths = series(lab)
    lab.retention["local"] = []
    await lab.sync()
    lab.retention["local"] = [THIN | {"name": "here"}]
    await lab.sync()
    trash = lab.root / ".tinker-sync" / "trash"
    assert len(list(trash.iterdir())) == 4
    size = sum(len(content) for content in lab.payload(paths[5]).values())

    def statvfs(_: Any) -> Any:
        return SimpleNamespace(f_bavail=size * (5 - len(list(trash.iterdir()))) + size // 2, f_frsize=1)

    monkeypatch.setattr("os.statvfs", statvfs)
    oldest = min(path.name for path in trash.iterdir())
    lab.mirror = {"min_free": size}
    save(lab, "000009", age=minutes_ago(90))
    result = await lab.sync()
    assert result.failed == {}
    emptied = lab.events("local.emptied")
    assert (emptied[0]["entry"], emptied[0]["why"]) == (oldest, "min_free")
    assert len(emptied) < 4


def minutes_ago(number: float) -> timedelta:
    """So many minutes."""
    return timedelta(minutes=number)


# Rescue


async def test_rescue_gives_what_would_expire_uncopied_a_longer_life(lab: Site, clock: MovedClock) -> None:
    """Once, at most `extend_ttl_max`; not by default, not rolling saves, not what is copied anyway."""
    path = save(lab, "000001", age=6 * DAY, ttl=6 * DAY + hours(2))
    rolling = save(lab, "rolling", age=minutes_ago(30), ttl=hours(2))
    fine = save(lab, "000002", age=DAY, ttl=7 * DAY)
    lab.sandbox.faults.append(Fault("archive", "status", status=500, match=path.name))
    await lab.sync()
    ends = lab.sandbox.account.checkpoints[path].expires_at
    assert ends == clock.at + hours(2), "off by default"
    lab.mirror = {"extend_ttl": True, "extend_ttl_max": "10d"}
    result = await lab.sync()
    assert result.enforced.extended == [path]
    assert lab.sandbox.account.checkpoints[path].expires_at == clock.at + 10 * DAY
    assert lab.sandbox.account.checkpoints[rolling].expires_at == clock.at - minutes_ago(30) + hours(2)
    assert lab.sandbox.account.checkpoints[fine].expires_at == clock.at + 6 * DAY
    clock.at += 9 * DAY + hours(22)
    assert (await lab.sync()).enforced.extended == []


# What outlives the catalog


async def test_reindex_replays_the_journal(lab: Site) -> None:
    """Without the catalog it is still known what we deleted: the replica stays the last copy."""
    from tinker_sync.wiring import rebuild_catalog

    paths = series(lab)
    await lab.sync()
    (lab.root / ".tinker-sync" / "catalog.db").unlink()
    rebuild_catalog(lab.settings())
    lab.retention |= {"remote": [], "local": [THIN | {"name": "here", "keep_orphans": False}]}
    await lab.sync()
    assert here(lab) >= {path.name for path in paths[:4]}


async def test_the_api_has_no_ttl(lab: Site) -> None:
    """Where the server refuses TTLs, that is said and remembered, and nothing else happens."""
    lab.sandbox.quirks = Quirks(no_ttl=True)
    lab.retention |= {"action": "expire"}
    series(lab)
    result = await lab.sync()
    assert len(result.enforced.failed) == 4
    assert len(lab.sandbox.account.checkpoints) == 6
    assert (await lab.sync()).enforced.failed == {}


def test_segments_are_known() -> None:
    """The helper's own assumption."""
    assert SEGMENT_OF_TYPE["sampler"] == "sampler_weights"
    assert Sandbox().quirks == Quirks()
