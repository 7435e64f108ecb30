"""Letting go from the command line: what is printed, exit codes, JSON, and what is never done."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import Site, command, run
from tinker_sync.journal import examine, read_events
from tinker_sync.model.manifest import Manifest
from tinker_sync.sandbox import Fault, adapter

if TYPE_CHECKING:
    from pathlib import Path

RUN = "39aa5eb2-e234-5a95-ab68-896e4cac8c45:train:0"
THIN = '[retention]\nmax_delete_fraction = 1.0\n{more}[[retention.remote]]\nname = "thin"\ntypes = ["sampler"]\nkeep_last = 2\n'
HERE = '[[retention.local]]\nname = "here"\ntypes = ["sampler"]\nkeep_last = 2\n'


@pytest.fixture
def site(outside: Site) -> Site:
    """The command is a process of its own here."""
    return outside


def series(site: Site, count: int = 6, kind: str = "sampler", **options: Any) -> list[str]:
    """One a day, oldest first."""
    now = datetime.now(UTC)
    return [
        str(
            site.sandbox.account.add(
                RUN, f"{n:06}", kind, payload=adapter(n, **options), time=now - (count - n) * timedelta(days=1)
            ).path
        )
        for n in range(count)
    ]


def call(site: Site, more: str = "", text: str = THIN) -> Any:
    """Run a command with this configuration."""
    config = str(site.write_config(text.format(more=more)))

    def called(*arguments: str, check: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
        return run(["--config", config, *arguments], check=check, **options)

    return called


def test_prune_plans_then_does_it(site: Site) -> None:
    """Without --apply the same as plan; with it, proof, journal, confirmation; history tells each."""
    paths = series(site)
    do = call(site)
    do("sync")
    assert "retention would let 4 go" in do("sync").stdout
    planned = json.loads(do("prune", "--json").stdout)
    assert set(planned) >= {
        "complete", "breaker", "verdicts", "listed", "transferred", "failed", "skipped", "deleted", "bytes", "seconds",
    }  # fmt: skip
    assert (planned["deleted"], site.sandbox.account.deleted) == ([], [])
    assert do("prune").stdout == do("plan").stdout
    done = json.loads(do("prune", "--apply", "--json").stdout)
    assert sorted(done["deleted"]) == paths[:4]
    assert set(done) >= {"listed", "transferred", "failed", "skipped", "deleted", "breaker", "bytes", "seconds"}
    assert "nothing to let go" in do("prune", "--apply").stdout
    told = json.loads(do("history", "--json").stdout)["events"]
    assert [event["event"] for event in told[:2]] == ["delete.intent", "delete.outcome"]
    only = json.loads(do("history", paths[0], "--event", "delete", "--json").stdout)["events"]
    assert [event["event"] for event in only] == ["delete.intent", "delete.outcome", "delete.confirmed"]
    assert len(json.loads(do("history", RUN, "-n", "2", "--json").stdout)["events"]) == 2
    assert json.loads(do("history", "--since", "2999-01-01", "--json").stdout)["events"] == []
    assert "read back 3 files" in do("history").stdout
    assert "is no time" in do("history", "--since", "yesterday", check=2).stderr
    assert "the chain is whole" in do("history", "--check").stdout
    story = do("explain", paths[0]).stdout
    assert "deleted by policy" in story
    assert "last-copy" in story


def test_the_breaker_and_the_way_out(site: Site) -> None:
    """Exit 5 with the numbers; status tells; --allow lifts it once."""
    series(site)
    do = call(site, "max_deletes = 3\nenforce = true\n")
    tripped = do("sync", check=5)
    assert "BREAKER: 4 deletes of 6" in tripped.stdout
    assert "prune --apply --allow 4" in tripped.stdout
    assert "NOT WELL: the breaker held back 4" in do("status").stdout
    assert json.loads(do("prune", "--apply", "--json", check=5).stdout)["breaker"]["deletes"] == 4
    assert site.sandbox.account.deleted == []
    assert "4 deleted upstream" in do("prune", "--apply", "--allow", "4").stdout


def test_stop_and_resume(site: Site) -> None:
    """A flag, however it was made, stops; resume says why it was there."""
    series(site)
    do = call(site, "enforce = true\n")
    do("status")
    do("sync", TINKER_SYNC__RETENTION__ENFORCE="false")
    assert "is not stopped" in do("resume").stdout
    flag = site.root / ".tinker-sync" / "stop"
    flag.write_text("I want to look at this first\n")
    stopped = do("sync", check=5)
    assert "STOPPED: I want to look" in stopped.stdout
    assert json.loads(do("status", "--json").stdout)["stopped"] is True
    assert "NOT WELL: enforcement is stopped" in do("status").stdout
    assert do("plan", check=5).stdout
    assert "I want to look" in do("resume").stdout
    assert "4 deleted upstream" in do("sync").stdout


def test_trash_from_the_shell(site: Site) -> None:
    """Listed, restored by path, emptied; what is not there is said."""
    paths = series(site)
    keep = call(site)
    keep("sync")
    do = call(site, text="[retention]\nenforce = true\n" + HERE)
    assert "4 moved to the trash" in do("sync").stdout
    rows = json.loads(do("trash", "ls", "--json").stdout)["trash"]
    assert sorted(row["tinker_path"] for row in rows) == paths[:4]
    assert paths[0] in do("trash", "ls").stdout
    assert "is not in the trash" in do("trash", "restore", "tinker://a/weights/b", check=1).stdout
    another = next(row["entry"] for row in rows if row["tinker_path"] != paths[0])
    assert "is back" in do("trash", "restore", paths[0], another).stdout
    assert do("path", paths[0]).stdout.strip() == str(site.directory(paths[0]))
    assert "ok" in do("verify").stdout
    assert json.loads(do("trash", "empty", "--json").stdout)["bytes"] > 0
    assert json.loads(do("trash", "ls", "--json").stdout)["trash"] == []
    events = [event["event"] for event in json.loads(do("history", "--event", "local", "--json").stdout)["events"]]
    moved = ["local.intent", "local.trashed"] * 4 + ["local.intent", "local.restored"] * 2
    assert events == moved + ["local.emptied"] * 2


def test_remote_delete_goes_through_enforcement(site: Site) -> None:
    """Guards and proof hold for a person too; --unproven and the path typed again override, but not a pin."""
    paths = series(site, 3)
    do = call(site, text="")
    assert "there is no replica of it" in do("remote", "delete", paths[0], check=1).stdout
    do("sync")
    assert "newest of its run" in do("remote", "delete", paths[2], check=1).stdout
    assert "is deleted" in do("remote", "delete", paths[0]).stdout
    do("pin", paths[1])
    assert "pinned" in do("remote", "delete", paths[1], check=1).stdout
    assert "pinned" in do("remote", "delete", paths[1], paths[1], "--unproven", check=1).stdout
    do("unpin", paths[1])
    assert "another one" in do("remote", "delete", paths[2], paths[1], "--unproven", check=2).stderr
    assert site.sandbox.account.deleted == [TinkerPath(paths[0])]
    asked = subprocess.run(
        command("--config", str(site.home / "config.toml"), "remote", "delete", paths[2], "--unproven"),
        input=paths[2] + "\n", capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "is deleted" in asked.stdout
    events = json.loads(do("history", paths[2], "--json").stdout)["events"]
    assert (events[0]["by"], events[0]["unproven"]) == ("remote delete", True)
    assert "gone, or misspelt" in do("remote", "delete", paths[2], check=1).stdout


def TinkerPath(text: str) -> Any:  # noqa: N802 - reads like the type
    """Parse."""
    from tinker_sync.model.paths import TinkerPath as Parsed

    return Parsed.parse(text)


def test_remote_set_ttl(site: Site) -> None:
    """A longer life is given at once; a shorter one needs what a delete needs."""
    paths = series(site, 3)
    do = call(site, text="")
    account = site.sandbox.account.checkpoints
    assert "no replica" in do("remote", "set-ttl", paths[0], "12h", check=1).stdout
    do("sync")
    assert "new expiry" in do("remote", "set-ttl", paths[0], "12h").stdout
    ends = account[TinkerPath(paths[0])].expires_at
    assert ends is not None
    assert "new expiry" in do("remote", "set-ttl", paths[0], "86400").stdout
    later = account[TinkerPath(paths[0])].expires_at
    assert later is not None
    assert later > ends
    do("sync")
    assert account[TinkerPath(paths[0])].expires_at == later, "by hand is by hand: no pass takes it back"
    do("remote", "set-ttl", paths[0], "none")
    assert account[TinkerPath(paths[0])].expires_at is None
    for wrong in ("soon", "10m", "9999d"):
        assert do("remote", "set-ttl", paths[0], wrong, check=2).stderr
    assert json.loads(do("remote", "set-ttl", paths[2], "2h", "--json", check=1).stdout)["done"] is False


def test_accident_a_half_saved_configuration(site: Site) -> None:
    """Cut anywhere, a file is refused, or keeps at least as much; a policy that lost its rule deletes nothing."""
    series(site, 3)
    do = call(site, "enforce = true\n")
    do("sync", TINKER_SYNC__RETENTION__ENFORCE="false")
    config = site.home / "config.toml"
    whole = config.read_text()
    begin = whole.index("[retention]")
    for cut in range(begin, len(whole), 7):
        config.write_text(whole[:cut])
        done = run(["--config", str(config), "plan", "--json"])
        assert done.returncode in (0, 2), whole[:cut]
        if done.returncode == 0:
            verdicts = json.loads(done.stdout)["verdicts"]
            assert sum(v["action"] != "keep" for v in verdicts) <= 1
    config.write_text("")
    assert "half-saved" in run(["--config", str(config), "prune", "--apply"], check=2).stderr
    config.write_text(whole.replace("keep_last = 2\n", ""))
    assert "no keep rule" in run(["--config", str(config), "prune", "--apply"], check=2).stderr
    config.write_text(whole.replace('types = ["sampler"]\n', ""))
    assert "types is missing" in run(["--config", str(config), "prune", "--apply"], check=2).stderr
    assert site.sandbox.account.deleted == []


def test_accident_another_accounts_key_on_this_root(site: Site) -> None:
    """Exit 2, and nothing was deleted there: its checkpoints are not what is here."""
    series(site)
    site.sandbox.quirks.jwt = True
    do = call(site, "enforce = true\n")
    do("sync", TINKER_SYNC__RETENTION__ENFORCE="false")
    facts = site.root / ".tinker-sync" / "root.json"
    document = json.loads(facts.read_text())
    assert document["account"]
    facts.write_text(json.dumps(document | {"account": "somebody-else"}))
    for arguments in (["sync"], ["prune", "--apply"], ["remote", "delete", f"tinker://{RUN}/sampler_weights/000000"]):
        assert "mirrors account somebody-else" in do(*arguments, check=2).stderr
    assert site.sandbox.account.deleted == []


def test_a_held_root_is_not_pruned(site: Site) -> None:
    """Exit 4; the reading commands still work."""
    series(site, 3)
    do = call(site)
    do("sync")
    site.sandbox.faults.append(Fault("storage", "stall", seconds=20))
    site.sandbox.account.add(RUN, "new", "sampler", payload=adapter(9))
    with subprocess.Popen(
        command("--config", str(site.home / "config.toml"), "sync"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as holder:
        try:
            deadline = time.monotonic() + 20
            while not list((site.root / ".tinker-sync" / "staging").glob("*")) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert "holds" in do("prune", "--apply", check=4).stderr
            assert "holds" in do("remote", "delete", f"tinker://{RUN}/sampler_weights/000000", check=4).stderr
            assert "holds" in do("trash", "empty", check=4).stderr
            do("plan")
            do("history")
            do("pin", f"{RUN}/*/000000")
        finally:
            holder.send_signal(signal.SIGTERM)
            holder.wait(20)


def test_killed_while_it_deletes(site: Site) -> None:
    """`kill -9` at random moments of `prune --apply`: no delete without a whole replica, every intent is resolved."""
    count = 120
    series(site, count, hidden=4, layers=1)
    do = call(site, "max_deletes = 200\n")
    do("sync")
    chance = random.Random(3)
    for _ in range(6):
        with subprocess.Popen(
            command("--config", str(site.home / "config.toml"), "prune", "--apply"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as running:
            time.sleep(chance.uniform(0.5, 1.1))
            running.kill()
        assert examine(site.root / ".tinker-sync").problems == []
    do("prune", "--apply")
    assert {path.name for path in site.sandbox.account.checkpoints} == {f"{n:06}" for n in range(count - 2, count)}
    deleted = [str(path) for path in site.sandbox.account.deleted]
    assert len(deleted) == len(set(deleted)) == count - 2
    events = [event for _, event in read_events(site.root / ".tinker-sync")]
    for path in deleted:
        mine = [event["event"] for event in events if event.get("tinker_path") == path]
        assert mine.index("delete.intent") < mine.index("delete.outcome") < mine.index("delete.confirmed")
        directory = site.directory(path)
        assert Manifest.from_bytes((directory / ".tinker-sync.json").read_bytes()).files
    assert "0 damaged" in do("verify").stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small filesystem")
def test_no_delete_without_a_durable_intent(site: Site, tmp_path: Path) -> None:
    """The state's disk is full: the intent cannot be written, so nothing is sent."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)], check=False)
    if mounted.returncode:
        pytest.skip("this container may not mount")
    try:
        series(site)
        site.mirror["state"] = str(small / "state")
        config = site.write_config(f'state = "{small / "state"}"\n' + THIN.format(more=""))
        run(["--config", str(config), "sync"], check=0)
        with (small / "filler").open("wb", buffering=0) as filler, suppress(OSError):
            while filler.write(bytes(4096)):
                pass
        done = run(["--config", str(config), "prune", "--apply"])
        assert done.returncode == 1
        assert "tinker-sync:" in done.stderr
        assert site.sandbox.account.deleted == []
        (small / "filler").unlink()
        assert "4 deleted" in run(["--config", str(config), "prune", "--apply"], check=0).stdout
    finally:
        subprocess.run(["umount", str(small)], check=True)
