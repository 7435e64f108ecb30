"""`fetch` and `verify --repair` beside a running service: handed over, with the same words and exit codes."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.conftest import Site, command, run
from tests.test_service import QUICK, RUN, replicas, serving
from tinker_sync.daemon.control import _outcome, control_address
from tinker_sync.destination.lock import RootLock, control_of
from tinker_sync.sandbox import Fault, adapter

if TYPE_CHECKING:
    from tests.test_service import Running

EXCLUDING = 'types = ["training"]\nexclude = ["*/*/not-*"]\n' + QUICK


@pytest.fixture
def site(outside: Site) -> Site:
    """The service is a process of its own."""
    return outside


def control(site: Site) -> Path:
    """The socket, as the lock file says."""
    found = control_of(site.root / ".tinker-sync" / "lock")
    assert found is not None
    return found


def listens(site: Site) -> bool:
    """Whether the service can be asked."""
    lock = site.root / ".tinker-sync" / "lock"
    return lock.exists() and control_of(lock) is not None


def config(site: Site) -> list[str]:
    """For the command."""
    return ["--config", str(site.home / "config.toml")]


def ask(site: Site, what: str, body: Any) -> list[dict[str, Any]]:
    """All lines of an answer."""
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(control(site))), timeout=30, trust_env=False) as client:
        answer = client.post(f"http://service/{what}", content=json.dumps(body))
        return [json.loads(line) for line in answer.text.splitlines()]


def test_fetch_is_done_by_the_service(site: Site) -> None:
    """What the filters exclude, what is not there, what is here already, what fails: as without a service."""
    wanted = str(site.sandbox.account.add(RUN, "not-usually", payload=adapter(0, pad_to=2_000_000)).path)
    broken = str(site.sandbox.account.add(RUN, "not-whole", payload=adapter(0)).path)
    site.sandbox.faults.append(Fault("archive", "status", status=400, match="not-whole"))
    with serving(site, EXCLUDING) as service:
        service.until(lambda: listens(site))
        lines = ask(site, "fetch", {"paths": [wanted]})
        assert {"event": "planned", "transfers": 1, "bytes": lines[0]["bytes"]} == lines[0]
        assert [line["event"] for line in lines if line.get("event") in ("started", "ended")] == ["started", "ended"]
        assert sum(line["received"] for line in lines if line.get("event") == "advanced") > 2_000_000
        assert lines[-1]["result"]["transferred"] == [wanted]
        assert "not-usually" in replicas(site)
        again = run([*config(site), "fetch", wanted], check=0)
        assert "already here" in again.stdout
        done = run([*config(site), "fetch", wanted, broken, "tinker://none:train:0/weights/x", "--json"], check=1)
        document = json.loads(done.stdout)
        assert {row["tinker_path"] for row in document["failed"]} == {broken, "tinker://none:train:0/weights/x"}
        assert document["skipped"] == [{"tinker_path": wanted, "reason": "already here"}]
        assert run([*config(site), "sync"], check=4)
        assert service.end()[0] == 0
    assert not listens(site)
    assert "already here" in run([*config(site), "fetch", wanted], check=0).stdout  # without a service, by itself


def test_verify_repair_is_done_by_the_service(site: Site) -> None:
    """Read back, mended, told; what upstream no longer has stays damaged, exit 1."""
    first = site.sandbox.account.add(RUN, "000000", payload=adapter(0)).path
    second = site.sandbox.account.add(RUN, "000001", payload=adapter(1)).path
    with serving(site) as service:
        service.until(lambda: replicas(site) == {"000000", "000001"} and listens(site))
        for path in (first, second):
            weights = site.directory(path) / "adapter_model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-1] + b"!")
        del site.sandbox.account.checkpoints[second]
        done = run([*config(site), "verify", "--repair"], check=1)
        assert "2 replicas read, 0 ok, 2 damaged" in done.stdout
        assert f"repaired {first}" in done.stdout
        assert f"still damaged {second}" in done.stdout
        assert "adapter_model.safetensors: " in done.stdout
        document = json.loads(run([*config(site), "verify", "--repair", "--json", str(first)], check=0).stdout)
        assert document == {"checked": 1, "ok": 1, "damaged": [], "repaired": []}
        assert "not here" in run([*config(site), "verify", "--repair", "tinker://r:train:0/weights/x"], check=1).stderr
        assert service.end()[0] == 0


def test_the_socket_is_its_owners_and_takes_no_nonsense(site: Site) -> None:
    """0600; garbage is refused in words; a killed service's socket is no obstacle and no address."""
    with serving(site) as service:
        service.until(lambda: listens(site))
        assert stat.S_IMODE(control(site).stat().st_mode) == 0o600
        for body in ({}, [], {"paths": "x"}, {"paths": ["x"]}, {"paths": [3]}, "text"):
            (line,) = ask(site, "fetch", body)
            assert line["exit_code"] == 2
        service.process.kill()
        service.process.wait()
    assert not listens(site)
    with serving(site) as service:
        service.until(lambda: listens(site))
        assert ask(site, "verify", {"paths": []})[-1]["result"]["checked"] == 0
        assert service.end()[0] == 0


def test_work_goes_on_when_the_one_who_asked_has_gone(site: Site) -> None:
    """Ctrl-C ends the command with 130, and the transfer comes all the same."""
    path = str(site.sandbox.account.add(RUN, "not-now", payload=adapter(0, pad_to=3_000_000)).path)
    site.sandbox.faults.append(Fault("storage", "slow", seconds=0.1))
    with serving(site, EXCLUDING) as service:
        service.until(lambda: listens(site))
        with subprocess.Popen(command(*config(site), "fetch", path), stderr=subprocess.DEVNULL) as asking:
            service.until(lambda: "control.asked" in service.log)
            time.sleep(0.3)
            asking.send_signal(signal.SIGINT)
            assert asking.wait(10) == 130
        service.until(lambda: replicas(site) == {"not-now"})
        assert service.end()[0] == 0


def test_a_stop_in_the_middle_is_said(site: Site) -> None:
    """The command ends with 4 and says that it goes on later."""
    path = str(site.sandbox.account.add(RUN, "not-now", payload=adapter(0, pad_to=3_000_000)).path)
    site.sandbox.faults.append(Fault("storage", "stall", seconds=60, at=1_000_000))
    with serving(site, EXCLUDING) as service:
        service.until(lambda: listens(site))
        with subprocess.Popen(command(*config(site), "fetch", path), stderr=subprocess.PIPE, text=True) as asking:
            service.until(lambda: "control.asked" in service.log)
            time.sleep(0.5)
            code, seconds = service.end()
            assert (code, seconds < 10) == (0, True)
            _, said = asking.communicate(timeout=10)
            assert asking.returncode == 4
            assert "service" in said
            assert "Traceback" not in said


def test_an_address_in_the_lock_file_is_not_believed_blindly(tmp_path: Path) -> None:
    """Only a socket of the lock's own owner, and only while somebody holds the lock."""
    lock = tmp_path / "lock"
    with RootLock(lock, command="run") as held, socket.socket(socket.AF_UNIX) as real:
        assert control_of(lock) is None
        held.announce(tmp_path / "file")
        (tmp_path / "file").write_text("no socket")
        assert control_of(lock) is None
        real.bind(str(tmp_path / "control"))
        held.announce(tmp_path / "control")
        assert control_of(lock) == tmp_path / "control"
    assert control_of(lock) is None
    assert control_of(tmp_path / "none") is None


def test_where_the_socket_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manager's runtime directory, the user's, else beside the state; nowhere where none is short enough."""
    assert control_address(Path("/s"), "abc") == Path("/s/control")
    assert control_address(Path("/s" * 60), "abc") is None
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/nowhere")
    assert control_address(Path("/s"), "abc") == Path("/s/control")
    monkeypatch.setenv("XDG_RUNTIME_DIR", os.sep + "tmp")
    assert control_address(Path("/s"), "abcdefghijklmnop") == Path("/tmp/tinker-sync-abcdefghijkl.control")
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/tinker-sync:/run/other")
    assert control_address(Path("/s"), "abc") == Path("/run/tinker-sync/control")


async def test_a_bug_that_one_request_meets_ends_nothing() -> None:
    """It runs in the service's own group of tasks: it is answered in words, without its text."""

    async def work() -> dict[str, Any]:
        return {}["hush"]

    answer = await _outcome(work())
    assert answer["exit_code"] == 1
    assert "internal error KeyError at test_control.py" in answer["error"]
    assert "hush" not in answer["error"]


def test_what_is_asked_for_comes_before_everything_else(site: Site) -> None:
    """In the middle of a long backfill, and although it is in its back-off."""
    wanted = site.sandbox.account.add(
        RUN, "wanted", payload=adapter(0), time=site.sandbox.account.now() - timedelta(days=9)
    )
    site.sandbox.faults.append(Fault("archive", "status", status=500, match="wanted"))

    def settle(service: Running) -> None:
        service.until(lambda: listens(site) and "transfer.failed" in service.log, 40)

    with serving(site) as service:
        settle(service)
        site.sandbox.faults.clear()
        site.sandbox.faults.append(Fault("storage", "slow", seconds=0.1))
        for n in range(300):
            site.sandbox.account.add(RUN, f"{n:06}", payload=adapter(1, pad_to=500_000), ttl=timedelta(days=1))
        service.until(lambda: len(replicas(site)) > 2)
        assert run([*config(site), "fetch", str(wanted.path)], check=0)
        assert "wanted" in replicas(site)
        assert len(replicas(site)) < 300
        assert service.end()[0] == 0
