"""The service, as a process of its own: it mirrors, reloads, survives trouble, and ends when it is told to."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sqlite3
import subprocess
import time
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import watchfiles

from tests.conftest import Site, command, run
from tinker_sync.activity import Vitals
from tinker_sync.catalog.store import CatalogDamaged
from tinker_sync.config import Settings, reload_difference, reloaded, retention_difference
from tinker_sync.daemon.schedule import Backoff
from tinker_sync.daemon.service import Beats, Service
from tinker_sync.daemon.supervisor import Supervisor
from tinker_sync.errors import CredentialRefused, DiskTrouble, Overloaded, TinkerSyncError, Unreachable
from tinker_sync.model.checkpoint import Identity
from tinker_sync.sandbox import Fault, Sandbox, adapter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

RUN = "39aa5eb2-e234-5a95-ab68-896e4cac8c45:train:0"
QUICK = '[poll]\ninterval = "1s"\n'


@pytest.fixture
def site(outside: Site) -> Site:
    """The service is a process of its own."""
    return outside


@pytest.fixture
def site_inside(sandbox: Sandbox, tmp_path: Path) -> Site:
    """For tests that look inside, in this process."""
    return Site(sandbox, tmp_path)


class Running:
    """A service, and what it told its manager."""

    def __init__(self, process: subprocess.Popen[str], channel: socket.socket, log: Path) -> None:
        self.process = process
        self._channel = channel
        self._log = log
        self.told: list[str] = []

    def hear(self) -> list[str]:
        """Everything so far."""
        while True:
            try:
                self.told.append(self._channel.recv(4096).decode())
            except BlockingIOError:
                return self.told

    @property
    def log(self) -> str:
        """Its log."""
        return self._log.read_text()

    def until(self, what: Callable[[], Any], seconds: float = 20) -> Any:
        """Wait for something to be so."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = what()
            if found:
                return found
            assert self.process.poll() is None, self.log
            time.sleep(0.05)
        raise AssertionError(self.log)

    def end(self, number: int = signal.SIGTERM) -> tuple[int, float]:
        """Signal it; its exit code, and how long it took."""
        begun = time.monotonic()
        self.process.send_signal(number)
        return self.process.wait(20), time.monotonic() - begun


@contextmanager
def serving(site: Site, extra: str = QUICK, **environment: str) -> Iterator[Running]:
    """`tinker-sync run`, with somebody who listens."""
    config = site.write_config(extra)
    address, log = str(site.home / "notify"), site.home / "log"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel, log.open("w") as out:
        channel.bind(address)
        channel.setblocking(False)  # noqa: FBT003 - the library's own
        process = subprocess.Popen(
            command("--log-format", "json", "--config", str(config), "run"),
            stderr=out,
            stdout=out,
            text=True,
            env={**os.environ, "NOTIFY_SOCKET": address, **environment},
        )
        try:
            yield Running(process, channel, log)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait(10)
            Path(address).unlink()


def replicas(site: Site) -> set[str]:
    """The names that are here."""
    return {path.name for path in (site.root / RUN / "weights").glob("*") if path.is_dir()}


def test_it_mirrors_and_ends(site: Site) -> None:
    """Ready before long work; what is new is there within a poll or two; SIGTERM ends it at once, with 0."""
    site.sandbox.account.add(RUN, "000000", payload=adapter(0))
    with serving(site, WATCHDOG_USEC="900000") as service:
        service.until(lambda: "READY=1" in service.hear())
        service.until(lambda: replicas(site) == {"000000"})
        site.sandbox.account.add(RUN, "000001", payload=adapter(1), ttl=timedelta(hours=4))
        service.until(lambda: replicas(site) == {"000000", "000001"}, 5)
        service.until(lambda: any(line.startswith("STATUS=2 listed") for line in service.hear()))
        assert json.loads(run(["--config", str(site.home / "config.toml"), "status", "--json"]).stdout)["replicas"] == 2
        assert run(["--config", str(site.home / "config.toml"), "sync"], check=4)
        service.until(lambda: service.hear().count("WATCHDOG=1") > 2)
        code, seconds = service.end()
        assert (code, seconds < 5) == (0, True)
        assert service.hear()[-1] == "STOPPING=1"
        assert "Traceback" not in service.log
    with serving(site) as service:
        service.until(lambda: "READY=1" in service.hear())
        assert service.end(signal.SIGINT)[0] == 130


def test_sigterm_in_the_middle_of_a_transfer(site: Site) -> None:
    """It ends at once and leaves nothing half-made; the next start goes on."""
    site.sandbox.account.add(RUN, "slow", payload=adapter(0, pad_to=3_000_000))
    site.sandbox.faults.append(Fault("storage", "stall", at=1_000_000, seconds=60))
    with serving(site) as service:
        service.until(lambda: list((site.root / ".tinker-sync" / "staging").glob("*")))
        code, seconds = service.end()
    assert (code, seconds < 10) == (0, True)
    assert list((site.root / ".tinker-sync" / "staging").iterdir()) == []
    site.sandbox.faults.clear()
    with serving(site) as service:
        service.until(lambda: replicas(site) == {"slow"})


def test_it_survives_trouble_of_the_service(site: Site) -> None:
    """500, garbage, a refused credential: told, and mended by itself when they are over."""
    site.sandbox.faults.append(Fault("list", "body", status=200, body=b"<html>"))
    with serving(site) as service:
        service.until(lambda: any("in trouble" in line for line in service.hear()))
        site.sandbox.account.add(RUN, "000000", payload=adapter(0))
        site.sandbox.faults.clear()
        service.until(lambda: replicas(site) == {"000000"})
        key, site.sandbox.key = site.sandbox.key, "tml-another"
        service.until(lambda: "poll.failed" in service.log.rpartition("transfer.committed")[2])
        site.sandbox.key = key
        site.sandbox.account.add(RUN, "000001", payload=adapter(1))
        service.until(lambda: len(replicas(site)) == 2, 40)
        assert service.end()[0] == 0


def test_a_changed_file_is_taken_up_and_a_bad_one_refused(site: Site) -> None:
    """What is selected changes at once; [retention] waits for SIGHUP; what cannot change is said."""
    for kind in ("training", "sampler"):
        site.sandbox.account.add(RUN, "000000", kind, payload=adapter(0))
    only = QUICK + "[transfer]\nconcurrency = 2\n"
    config = site.home / "config.toml"
    with serving(site, 'types = ["training"]\n' + only) as service:
        service.until(lambda: replicas(site) == {"000000"})
        good = config.read_text()
        config.write_text(good.replace("concurrency", "concurency"))
        service.until(lambda: "config.refused" in service.log)
        assert "did you mean 'concurrency'" in service.log
        changed = (
            good.replace('["training"]', '["training", "sampler"]')
            + '[retention]\nmax_deletes = 7\n[log]\nlevel = "debug"\n'
        )
        temporary = config.with_suffix(".new")
        temporary.write_text(changed)
        temporary.rename(config)  # as an editor saves
        sampler = site.root / RUN / "sampler_weights" / "000000"
        service.until(sampler.is_dir)
        assert "max_deletes: 50 becomes 7" in service.log
        status = [*("--config", str(config)), "status"]
        service.until(lambda: "not in effect yet: [retention] max_deletes" in run(status, check=0).stdout)
        assert "[log] level" in service.log
        service.process.send_signal(signal.SIGHUP)
        service.until(lambda: '{"keys": ["[retention] max_deletes"], "event": "config.reloaded"' in service.log)
        service.until(lambda: service.hear().count("READY=1") >= 3)
        assert service.end()[0] == 0


def test_retention_runs_beside(site: Site) -> None:
    """After a proven listing, by the service itself."""
    now = site.sandbox.account.now()
    for n in range(5):
        site.sandbox.account.add(RUN, f"{n:06}", payload=adapter(n), time=now - timedelta(days=5 - n))
    policy = '[retention]\nenforce = true\nmax_delete_fraction = 1.0\n[[retention.remote]]\nname = "p"\ntypes = ["training"]\nkeep_last = 2\n'
    with serving(site, QUICK + policy) as service:
        service.until(lambda: len(site.sandbox.account.deleted) == 3)
        service.until(lambda: "checkpoint.deleted" in service.log)
        assert service.end()[0] == 0
    history = run(["--config", str(site.home / "config.toml"), "history", "--json"], check=0)
    events = json.loads(history.stdout)["events"]
    assert {event["by"] for event in events if event["event"] == "delete.intent"} == {"run"}


def test_damage_is_found_and_mended(site: Site) -> None:
    """The scrub reads what was not read for long; what is damaged is fetched again."""
    path = site.sandbox.account.add(RUN, "000000", payload=adapter(0)).path
    with serving(site, 'verify_every = "1s"\n' + QUICK) as service:
        service.until(lambda: replicas(site) == {"000000"})
        weights = site.directory(path) / "adapter_model.safetensors"
        good = weights.read_bytes()
        weights.write_bytes(good[:-1] + b"!")
        service.until(lambda: "replica.damaged" in service.log)
        service.until(lambda: weights.read_bytes() == good)
        assert service.end()[0] == 0


def test_a_large_account_is_looked_at_by_one_page(site: Site) -> None:
    """Between full listings a poll is one request, and what is new is copied all the same."""
    for n in range(60):
        site.sandbox.account.add(RUN, f"{n:06}", payload=adapter(1))
    extra = QUICK + 'full_interval = "1h"\n'
    with serving(site, extra, TINKER_SYNC__TINKER__PAGE_SIZE="10") as service:
        service.until(lambda: len(replicas(site)) == 60, 40)
        time.sleep(1.5)
        site.sandbox.requests.clear()
        time.sleep(3)
        pages = [path for method, path in site.sandbox.requests if path.endswith("/checkpoints")]
        assert 1 <= len(pages) <= 5
        site.sandbox.account.add(RUN, "new", payload=adapter(2))
        service.until(lambda: "new" in replicas(site), 5)
        assert service.end()[0] == 0


def test_a_hung_loop_is_not_covered_up() -> None:
    """The watchdog is fed while every loop is before its deadline, and not longer."""
    at = 0.0
    beats = Beats(lambda: at)
    beats.expect("poll", 60)
    beats.expect("retention", 600)
    assert beats.late() == []
    at = 61
    assert beats.late() == ["poll"]
    beats.expect("poll", 60)
    assert beats.late() == []


def test_how_long_a_poll_waits() -> None:
    """Doubling to 15 minutes; a refused credential from a minute on; short intervals never over 30 s."""
    backoff = Backoff(60.0)
    trouble = Unreachable("no")
    assert [backoff.after(trouble, 0.0) for _ in range(6)] == [60, 120, 240, 480, 900, 900]
    assert backoff.after_success() == 60
    assert backoff.after(CredentialRefused("no"), 0.0) == 60
    assert backoff.after(Overloaded("no", status=429, retry_after=300), 0.0) == 300
    quick = Backoff(1.0)
    assert max(quick.after(trouble, 0.0) for _ in range(20)) == 30
    assert max(quick.after(CredentialRefused("no"), 0.0) for _ in range(20)) == 30
    assert Backoff(60.0).after(trouble, 0.99) < 60


def test_the_supervisor_never_raises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody listening, an address that is none, an abstract one; children do not inherit it."""
    for address in ("", str(tmp_path / "nobody"), "@abstract-nobody"):
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        monkeypatch.setenv("WATCHDOG_USEC", "30000000")
        told = Supervisor()
        told.ready()
        told.status("x\ny")
        assert told.watchdog == 30
        assert "NOTIFY_SOCKET" not in os.environ
        assert "WATCHDOG_USEC" not in os.environ


def test_what_a_reload_changes() -> None:
    """Keys that need a restart keep their old values; [retention] unless it is asked for."""
    old = Settings.model_validate({})
    new = Settings.model_validate(
        {
            "poll": {"interval": "5s"},
            "mirror": {"types": ["sampler"], "dir_mode": "0750"},
            "retention": {"max_deletes": 3},
        }
    )
    changed, fixed = reload_difference(old, new)
    assert set(changed) == {"[poll] interval", "[mirror] types", "[retention] max_deletes"}
    assert fixed == ["[mirror] dir_mode"]
    policies = [{"name": name, "types": ["sampler"], "keep_last": 1} for name in ("a", "b")]
    one = Settings.model_validate({"retention": {"remote": policies, "trash": "2d"}})
    policies[0]["keep_last"] = 2
    two = Settings.model_validate({"retention": {"remote": policies[:1], "local": policies[1:]}})
    assert retention_difference(one, two) == [
        "trash: 2 days, 0:00:00 becomes 7 days, 0:00:00",
        "remote policy 'a' is changed",
        "remote policy 'b' is gone",
        "local policy 'b' is new",
    ]
    merged = reloaded(old, new, retention=False)
    assert (merged.mirror.types, merged.mirror.dir_mode, merged.retention.max_deletes) == (("sampler",), 0o700, 50)
    assert reloaded(old, new, retention=True).retention.max_deletes == 3


def test_install_service_writes_units_with_the_right_paths(tmp_path: Path) -> None:
    """For the system and for one user; the next two commands are said."""
    done = run(["install-service", "--directory", str(tmp_path / "units")], check=0)
    assert "systemctl enable --now tinker-sync" in done.stdout
    unit = (tmp_path / "units" / "tinker-sync.service").read_text()
    assert f"ExecStart={command()[0]} --config /etc/tinker-sync/config.toml run" in unit
    assert "/opt/tinker-sync" not in unit
    assert (tmp_path / "units" / "tinker-sync.conf").exists()
    mine = run(["--config", "c.toml", "install-service", "--user", "--directory", str(tmp_path / "user")], check=0)
    assert "systemctl --user" in mine.stdout
    assert "c.toml run" in (tmp_path / "user" / "tinker-sync.service").read_text()


# Large accounts


def test_a_look_at_one_page_plans_like_a_listing(site: Site) -> None:
    """`max_bytes` holds, and a retry that is due is made, between two full listings."""
    for n in range(60):
        site.sandbox.account.add(RUN, f"{n:06}", payload=adapter(1))
    size = adapter(1).total_bytes
    extra = f'max_bytes = "{61 * size + 500}B"\n' + QUICK + 'full_interval = "1h"\n'
    with serving(site, extra, TINKER_SYNC__TINKER__PAGE_SIZE="10") as service:
        service.until(lambda: len(replicas(site)) == 60, 40)
        time.sleep(1.5)
        for n in range(5):
            site.sandbox.account.add(RUN, f"new-{n}", payload=adapter(1))
        service.until(lambda: "mirror.full" in service.log)
        time.sleep(2.5)
        assert len(replicas(site)) == 61
        assert service.log.count("mirror.full") == 1
        said = run(["--config", str(site.home / "config.toml"), "status"], check=0).stdout
        assert "NOT WELL: [mirror] max_bytes has no room for" in said
        assert service.end()[0] == 0


# What must not end it


@pytest.mark.parametrize(
    "text", ["a = " + "[" * 9000, "\0\0", "[mirror]\nroot = 3\n", '[notify]\nurls = ["nonsense://x"]\n']
)
def test_no_file_ends_it(site: Site, text: str) -> None:
    """Nested too deeply, binary, of the wrong type, URLs that nobody understands, a directory, nothing at all."""
    config = site.home / "config.toml"
    with serving(site) as service:
        service.until(lambda: any("listed" in line for line in service.hear()))
        good = config.read_text()
        config.write_text(text)
        service.process.send_signal(signal.SIGHUP)
        service.until(lambda: "config.refused" in service.log)
        service.until(lambda: any("a changed configuration was refused" in line for line in service.hear()))
        config.unlink()
        config.mkdir()
        service.process.send_signal(signal.SIGHUP)
        service.until(lambda: service.log.count("config.refused") >= 2)
        config.rmdir()
        service.process.send_signal(signal.SIGHUP)
        service.until(lambda: service.log.count("config.refused") >= 3)
        site.sandbox.account.add(RUN, "000000", payload=adapter(0))
        service.until(lambda: replicas(site) == {"000000"})
        config.write_text(good.replace('"1s"', '"2s"'))
        service.until(lambda: "[poll] interval" in service.log)
        assert service.end()[0] == 0


async def test_where_inotify_fails_the_files_time_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many watches, or a filesystem without: a change is seen all the same, when it has been still."""
    config = tmp_path / "c.toml"
    config.write_text("[poll]\n")
    read: list[bool] = []

    async def broken(*_: object, **__: object) -> AsyncIterator[set[tuple[int, str]]]:
        raise OSError(24, "Too many open files")
        yield set()

    async def reload(*, retention_too: bool) -> None:
        read.append(retention_too)

    monkeypatch.setattr(watchfiles, "awatch", broken)
    monkeypatch.setattr("tinker_sync.daemon.service.STILL", 0.02)
    watching = Service.__new__(Service)
    monkeypatch.setattr(watching, "_reload", reload, raising=False)
    task = asyncio.create_task(watching._watch_config(config))
    await asyncio.sleep(0.2)
    assert read == []
    config.write_text("[poll]\ninterval = '5s'\n")
    async with asyncio.timeout(5):
        while not read:  # noqa: ASYNC110 - what is tried sets no event
            await asyncio.sleep(0.02)
    await asyncio.sleep(0.3)
    assert read == [False]
    task.cancel()


def test_a_long_scrub_holds_up_no_poll(site: Site) -> None:
    """What is new comes within a poll or two while a large replica is read back."""
    site.sandbox.account.add(RUN, "large", payload=adapter(0, pad_to=700_000_000))
    with serving(site, 'verify_every = "1s"\n' + QUICK) as service:
        service.until(lambda: replicas(site) == {"large"}, 60)
        time.sleep(2)
        for n in range(3):
            site.sandbox.account.add(RUN, f"{n:06}", payload=adapter(n))
            service.until(lambda n=n: f"{n:06}" in replicas(site), 5)
        assert service.end()[1] < 10


def test_progress_counts_as_progress() -> None:
    """A poll of thousands of requests is not hung; outside of a poll requests move nothing."""
    at = 0.0
    service = Service.__new__(Service)
    service._beats = Beats(lambda: at)
    service._polling = True
    service._beats.expect("poll", 600)
    at = 599
    service.progressed()
    at = 1100
    assert service._beats.late() == []
    service._polling = False
    service.progressed()
    at = 1200
    assert service._beats.late() == ["poll"]


def test_a_state_directory_that_is_gone_for_a_while(site: Site) -> None:
    """The catalog cannot be written: said, and mended when it is back; no exit, no traceback."""
    site.sandbox.account.add(RUN, "000000", payload=adapter(0))
    catalog = site.root / ".tinker-sync" / "catalog.db"
    with serving(site) as service:
        service.until(lambda: replicas(site) == {"000000"})
        with sqlite3.connect(catalog, isolation_level=None) as other:  # a backup program, say, that holds it for long
            other.execute("BEGIN EXCLUSIVE")
            site.sandbox.account.add(RUN, "000001", payload=adapter(1))
            service.until(lambda: "the catalog cannot be used" in service.log, 40)
            other.execute("ROLLBACK")
        other.close()
        service.until(lambda: replicas(site) == {"000000", "000001"}, 60)
        assert service.end()[0] == 0
        assert "Traceback" not in service.log


# What is no longer what was opened


@pytest.mark.parametrize("what", ["root", "lock", "catalog"])
def test_it_ends_when_the_ground_is_gone_and_writes_nothing_more(site: Site, what: str) -> None:
    """An unmounted or moved root, a deleted lock, a deleted or broken catalog: exit 1, and the next start mends it."""
    site.sandbox.account.add(RUN, "000000", payload=adapter(0))
    state, aside = site.root / ".tinker-sync", site.home / "aside"
    with serving(site) as service:
        service.until(lambda: replicas(site) == {"000000"})
        if what == "root":
            site.root.rename(aside)
            site.root.mkdir(mode=0o700)
        elif what == "lock":
            (state / "lock").unlink()
        else:
            (state / "catalog.db").unlink()
        site.sandbox.account.add(RUN, "000001", payload=adapter(1))
        assert service.process.wait(20) == 1
        assert "Traceback" not in service.log
        words = {
            "root": "no longer the directory",
            "lock": "lock file",
            "catalog": "deleted or replaced",
        }
        assert words[what] in service.log
    if what == "root":
        assert list(site.root.iterdir()) == []
        site.root.rmdir()
        aside.rename(site.root)
    with serving(site) as service:
        service.until(lambda: replicas(site) == {"000000", "000001"})
        assert service.end()[0] == 0
    config = ["--config", str(site.home / "config.toml")]
    run([*config, "sync"], check=0)  # adopts what was renamed and not written down when the service was ended
    assert json.loads(run([*config, "verify", "--json"], check=0).stdout)["ok"] == 2


def test_a_pipe_for_a_file_is_refused_and_does_not_hang(site: Site) -> None:
    """As configuration on a reload, and as a key file at the start."""
    config = site.home / "config.toml"
    with serving(site) as service:
        service.until(lambda: any("listed" in line for line in service.hear()))
        good = config.read_text()
        config.unlink()
        os.mkfifo(config)
        service.process.send_signal(signal.SIGHUP)
        service.until(lambda: "no regular file" in service.log)
        config.unlink()
        config.write_text(good.replace('"1s"', '"2s"'))
        service.until(lambda: "config.reloaded" in service.log)
        code, seconds = service.end()
        assert (code, seconds < 6) == (0, True)
    (site.home / "pipe").unlink(missing_ok=True)
    os.mkfifo(site.home / "pipe")
    key = f"{site.home / 'pipe'}"
    with serving(site, TINKER_SYNC__TINKER__API_KEY_FILE=key) as service:
        service.until(lambda: "no regular file" in service.log)
        assert service.end()[0] == 0


def test_signals_while_it_starts(site: Site) -> None:
    """A server that says nothing: SIGHUP kills nobody, SIGTERM is a stop like any other."""
    site.sandbox.faults.append(Fault("any", "stall", seconds=60))
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        url = f"http://127.0.0.1:{mute.getsockname()[1]}/services/x"
        with serving(site, TINKER_SYNC__TINKER__BASE_URL=url) as service, mute.accept()[0]:
            service.process.send_signal(signal.SIGHUP)
            time.sleep(0.3)
            code, seconds = service.end()
    assert (code, seconds < 5) == (0, True)


def test_a_link_that_is_switched_is_a_change(site: Site) -> None:
    """As configuration management and Kubernetes do it; and later edits of what it points to now."""
    with serving(site) as service:
        service.until(lambda: any("listed" in line for line in service.hear()))
        config, second = site.home / "config.toml", site.home / "v2" / "config.toml"
        second.parent.mkdir()
        second.write_text(config.read_text().replace('"1s"', '"2s"'))
        (site.home / "link").symlink_to(second)
        (site.home / "link").rename(config)
        service.until(lambda: service.log.count("config.reloaded") == 1)
        second.write_text(second.read_text().replace('"2s"', '"3s"'))
        service.until(lambda: service.log.count("config.reloaded") == 2)
        assert service.end()[0] == 0


# What the polls and retention leave in `status`


async def test_retention_that_could_not_look_leaves_its_last_word(site_inside: Site) -> None:
    """The breaker that tripped stays told when the next look at the account fails; it is no success either."""
    site = site_inside
    now = site.sandbox.account.now()
    for n in range(7):
        site.sandbox.account.add(RUN, f"{n:06}", payload=adapter(n), time=now - timedelta(days=9 - n))
    policy = {"name": "p", "types": ["training"], "keep_last": 2}
    site.retention = {"enforce": True, "max_deletes": 2, "remote": [policy]}
    await site.sync()
    async with site.opened() as mirror:
        await mirror.poll()
        assert await mirror.retain()
        assert mirror._catalog.last_pass()["breaker"]["deletes"] == 5
        mirror._listed = None
        site.sandbox.faults.append(Fault("list", "status", status=400))
        assert not await mirror.retain()
        assert mirror._catalog.last_pass()["breaker"]["deletes"] == 5


async def test_a_page_that_cannot_be_had_is_known_to_status(site_inside: Site) -> None:
    """And its end too; the listing that was proven stays the last one."""
    site = site_inside
    site.tinker = {"page_size": 2}
    for n in range(12):
        site.sandbox.account.add(RUN, f"{n:06}", payload=adapter(1))
    await site.sync()
    async with site.opened() as mirror:
        await mirror.poll()
        assert mirror.is_large
        key, site.sandbox.key = site.sandbox.key, "tml-another"
        with pytest.raises(CredentialRefused):
            await mirror.poll()
        assert mirror._catalog.last_pass()["credential_refused"]
        site.sandbox.key = key
        proven = mirror.proven_at
        await mirror.poll()
        last = mirror._catalog.last_pass()
        assert (last["credential_refused"], last["service_error"], mirror.proven_at) == (False, None, proven)


async def test_what_is_still_being_copied_is_not_lost(site_inside: Site) -> None:
    """Gone upstream and ended, in the middle of its transfer: judged when that is over."""
    site = site_inside
    row = site.sandbox.account.add(RUN, "a", payload=adapter(1), ttl=timedelta(days=1))
    async with site.opened() as mirror:
        await mirror.poll()
        (transfer,) = mirror._queue.pending()
        ended = replace(mirror.rows[row.path], expires_at=datetime.now(UTC) - timedelta(seconds=1))
        mirror._running[row.path] = transfer
        mirror._undecided = [ended]
        await mirror._note_lost()
        assert mirror._catalog.lost() == []
        del mirror._running[row.path]
        await mirror._note_lost()
        assert [path for path, _ in mirror._catalog.lost()] == [row.path]
        await mirror.fetch([row.path])
        assert mirror._catalog.lost() == []  # it came after all


async def test_nothing_is_staged_below_another_root(site_inside: Site) -> None:
    """Between two polls too: a bare mount point gets no files. A root that is back is the same one."""
    site = site_inside
    row = site.sandbox.account.add(RUN, "a", payload=adapter(1))
    identity = Identity(row.path, row.time, row.size_bytes)
    async with site.opened() as mirror:
        site.root.rename(site.home / "aside")
        site.root.mkdir()
        with pytest.raises(DiskTrouble, match="unmounted"):
            mirror._destination.open_stage(identity, 10)
        assert list(site.root.iterdir()) == []
        site.root.rmdir()
        with pytest.raises(DiskTrouble, match="unmounted"):
            mirror._destination.check()
        (site.home / "aside").rename(site.root)
        mirror._destination._anchor = (0, 0)  # as after another mount of the same
        mirror._destination.open_stage(identity, 10).abort()


async def test_a_catalog_that_is_damaged_ends_it() -> None:
    """Only the next start may throw it away; what a person must change ends it too, and nothing else does."""
    said: list[TinkerSyncError] = [Unreachable("no"), CatalogDamaged("broken")]

    async def poll() -> None:
        raise said.pop(0)

    service = Service.__new__(Service)
    service._loop, service._polling = asyncio.get_running_loop(), False
    service._beats, service._wake, service._news = Beats(lambda: 0.0), asyncio.Event(), asyncio.Event()
    service._backoff, service._vitals = Backoff(0.001), Vitals(datetime.now(UTC))
    service._mirror = SimpleNamespace(poll=poll)  # type: ignore[assignment]
    service._parts = SimpleNamespace(root=SimpleNamespace(check=lambda: None))  # type: ignore[assignment]
    service._supervisor = Supervisor()
    with pytest.raises(CatalogDamaged):
        await service._poll_on(None)  # type: ignore[arg-type]
    assert said == []


@pytest.mark.parametrize("steps", range(6))
async def test_a_stop_is_never_lost(steps: int) -> None:
    """However close it comes to the news that a loop waits for; a service that was ended as it started went on."""
    service = object.__new__(Service)
    service._news, service._parts = asyncio.Event(), SimpleNamespace()  # type: ignore[assignment] - it can tell nobody
    loop = asyncio.create_task(service._alarm_on())
    await asyncio.sleep(0)
    service._news.set()
    for _ in range(steps):
        await asyncio.sleep(0)
    loop.cancel()
    await asyncio.wait([loop], timeout=3)
    assert loop.cancelled()
