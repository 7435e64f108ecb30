"""The installed command, as a user runs it: exit codes, JSON, words for every error, signals, and no secret anywhere."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.conftest import Site, command, run
from tinker_sync.model.manifest import Manifest
from tinker_sync.sandbox import Fault, Payload, PayloadFile, adapter

RUN = "39aa5eb2-e234-5a95-ab68-896e4cac8c45:train:0"


@pytest.fixture
def site(outside: Site) -> Site:
    """The command is a process of its own here."""
    return outside


def fill(site: Site, count: int = 3, **options: int) -> list[str]:
    """So many good checkpoints; their paths."""
    return [
        str(site.sandbox.account.add(RUN, f"{n:06}", payload=adapter(n, **options), ttl=timedelta(days=7)).path)
        for n in range(count)
    ]


def test_sync_status_ls_path_verify_reindex(site: Site) -> None:
    """The life of a mirror, in words and in JSON; stdout is one document, and stable."""
    paths = fill(site)
    config = str(site.write_config())
    empty = json.loads(run(["--config", config, "status", "--json"], check=0).stdout)
    assert (empty["replicas"], empty["last_pass"]) == (0, None)

    done = json.loads(run(["--config", config, "sync", "--json"], check=0).stdout)
    assert set(done) >= {"listed", "transferred", "failed", "skipped", "deleted", "breaker", "bytes", "seconds"}
    assert sorted(done["transferred"]) == paths
    again = run(["--config", config, "sync"], check=0)
    assert "3 listed, 0 copied" in again.stdout

    status = json.loads(run(["--config", config, "status", "--json"], check=0).stdout)
    expected = {"replicas": 3, "pending": 0, "failing": 0, "unmirrorable": 0, "quarantined": 0, "stopped": False}
    assert status.items() >= expected.items()
    assert status["expiring_unmirrored"] == []
    assert "all is well" in run(["--config", config, "status"], check=0).stdout

    listed = json.loads(run(["--config", config, "ls", "--json"], check=0).stdout)
    assert [row["tinker_path"] for row in listed["replicas"]] == paths
    assert paths[0] in run(["--config", config, "ls", RUN[:8]], check=0).stdout
    assert "0 replicas" in run(["--config", config, "ls", "other"], check=0).stdout

    where = run(["--config", config, "path", paths[0]], check=0).stdout.strip()
    assert Path(where) == site.directory(paths[0])
    assert (Path(where) / "adapter_config.json").exists()

    assert json.loads(run(["--config", config, "verify", "--json"], check=0).stdout) == {
        "checked": 3, "ok": 3, "damaged": [], "repaired": [],
    }  # fmt: skip
    victim = site.directory(paths[1]) / "adapter_model.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    found = json.loads(run(["--config", config, "verify", "--json"], check=1).stdout)
    assert found["damaged"][0]["tinker_path"] == paths[1]
    repaired = json.loads(run(["--config", config, "verify", "--repair", "--json"], check=0).stdout)
    assert repaired["repaired"] == [paths[1]]
    run(["--config", config, "verify", paths[1]], check=0)

    (site.root / ".tinker-sync" / "catalog.db").unlink()
    assert run(["--config", config, "ls"], check=1).stderr.count("reindex") == 1
    assert json.loads(run(["--config", config, "reindex", "--json"], check=0).stdout) == {"replicas": 3, "damaged": []}
    assert json.loads(run(["--config", config, "ls", "--json"], check=0).stdout) == listed | {
        "replicas": [row | {"verified_at": row["committed_at"]} for row in listed["replicas"]]
    }
    (site.directory(paths[2]) / ".tinker-sync.json").write_text("{}")
    report = json.loads(run(["--config", config, "reindex", "--json"], check=1).stdout)
    assert report["replicas"] == 2
    assert report["damaged"][0]["tinker_path"] == paths[2]


def test_fetch_takes_exactly_what_is_named(site: Site) -> None:
    """Filters and back-off do not count; what is not listed is named; what is here is skipped."""
    paths = fill(site)
    config = str(site.write_config('types = ["sampler"]\n'))
    assert json.loads(run(["--config", config, "sync", "--json"], check=0).stdout)["transferred"] == []
    done = json.loads(run(["--config", config, "fetch", paths[1], "--json"], check=0).stdout)
    assert done["transferred"] == [paths[1]]
    assert json.loads(run(["--config", config, "fetch", paths[1], "--json"], check=0).stdout)["skipped"]
    gone = run(["--config", config, "fetch", f"tinker://{RUN}/weights/none"], check=1)
    assert "does not list it" in gone.stdout


def test_failures_are_named_and_exit_1(site: Site) -> None:
    """One that cannot be had: exit 1, its words in the text and in the JSON, the others copied."""
    fill(site)
    bad = site.sandbox.account.add(RUN, "bad", payload=Payload((), raw=b"<html>no</html>"))
    odd = site.sandbox.account.add(RUN, "odd", payload=Payload((PayloadFile.of("notes", b"x"),)))
    config = str(site.write_config())
    done = json.loads(run(["--config", config, "sync", "--json"], check=1).stdout)
    errors = {row["tinker_path"]: row for row in done["failed"]}
    assert "HTML" in errors[str(bad.path)]["error"]
    assert errors[str(bad.path)]["retry_at"].endswith("Z")
    assert "quarantined" in errors[str(odd.path)]["error"]
    status = json.loads(run(["--config", config, "status", "--json"]).stdout)
    assert (status["failing"], status["quarantined"]) == (1, 1)
    assert "NOT WELL" in run(["--config", config, "status"]).stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--config", "/none.toml", "status"], 2, "does not exist"),
        (["sync", "--bogus"], 2, "--bogus"),
        (["bogus"], 2, "bogus"),
        (["path", "nonsense"], 2, "not a tinker path"),
        (["path", "tinker://a/weights/b"], 1, "no catalog"),
        (["fetch"], 2, "Missing argument"),
        (["--log-level", "loud", "status"], 2, "--log-level"),
        (["verify"], 2, "no mirror yet"),
        (["reindex"], 2, "no mirror"),
        (["sync"], 3, "TINKER_API_KEY"),
        (["remote", "runs"], 3, "TINKER_API_KEY"),
    ],
)
def test_errors_of_the_user_are_words(arguments: list[str], code: int, said: str) -> None:
    """What is wrong and what to do, on stderr, with the right exit code and no traceback."""
    assert said in run(arguments, check=code).stderr


def test_service_troubles_exit_3(site: Site) -> None:
    """Refused credential, closed port, HTML instead of the API, an unproven listing."""
    fill(site, 1)
    config = str(site.write_config())
    wrong = site.home / "wrong"
    wrong.write_text("tml-wrong")
    refused = run(["--config", config, "sync"], check=3, TINKER_SYNC__TINKER__API_KEY_FILE=str(wrong))
    assert "refused the credential" in refused.stderr
    closed = run(
        ["--config", config, "--root", str(site.home / "r"), "sync"],
        check=3,
        TINKER_SYNC__TINKER__BASE_URL="http://127.0.0.1:1",
    )
    assert "cannot be reached (Connection refused)" in closed.stderr
    site.sandbox.faults.append(Fault("list", "html", status=200, times=1))
    assert "base_url" in run(["--config", config, "sync"], check=3).stderr
    site.sandbox.quirks.page_cap = 0
    unproven = run(["--config", config, "sync"], check=3)
    assert "unproven" in unproven.stdout


def test_two_at_once(site: Site) -> None:
    """The second is told who holds the root, exit 4; reading commands go on."""
    fill(site, 2)
    site.sandbox.faults.append(Fault("storage", "stall", at=100, seconds=20))
    config = str(site.write_config())
    with subprocess.Popen(command("--config", config, "sync"), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as first:
        wait_for(lambda: bool(site.sandbox.storage_requests))
        assert f"process {first.pid}" in run(["--config", config, "sync"], check=4).stderr
        run(["--config", config, "status"], check=0)
        first.terminate()
        assert first.wait(15) == 143


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_cleanly(site: Site, number: signal.Signals, code: int) -> None:
    """Within seconds, nothing half-made, the lock free."""
    fill(site, 3)
    site.sandbox.faults.append(Fault("storage", "stall", at=100, seconds=20))
    config = str(site.write_config())
    with subprocess.Popen(
        command("--config", config, "sync"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        wait_for(lambda: len(site.sandbox.storage_requests) >= 3)
        time.sleep(0.2)
        running.send_signal(number)
        assert running.wait(10) == code
        assert running.stderr is not None
        assert b"Traceback" not in running.stderr.read()
    assert site.staging() == []
    site.sandbox.faults.clear()
    run(["--config", config, "sync"], check=0)


def test_killed_at_random_moments(site: Site) -> None:
    """`kill -9` again and again: never anything half-made under a final name; one more sync and all is there."""
    paths = fill(site, 30, hidden=1024)
    config = str(site.write_config())
    moments = random.Random(7)
    for _ in range(8):
        with subprocess.Popen(
            command("--config", config, "sync"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as running:
            time.sleep(moments.uniform(0.3, 1.4))
            running.kill()
        assert_all_final_are_whole(site.root)
    run(["--config", config, "sync"], check=0)
    assert_all_final_are_whole(site.root)
    assert site.staging() == []
    done = json.loads(run(["--config", config, "verify", "--json"], check=0).stdout)
    assert done["ok"] == len(paths)


def assert_all_final_are_whole(root: Path) -> None:
    """Every directory under a final name holds its manifest and exactly its files."""
    for directory in root.glob("[!.]*/*/*"):
        if directory.is_symlink() or directory.parent.is_symlink() or not directory.is_dir():
            continue
        manifest = Manifest.from_bytes((directory / ".tinker-sync.json").read_bytes())
        for entry in manifest.files:
            assert (directory / str(entry.path)).stat().st_size == entry.size


def wait_for(condition: object, seconds: float = 15) -> None:
    """Until it is so."""
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_no_secret_in_output_or_files(site: Site) -> None:
    """Key, JWT and signed URLs: in no output at debug level, in no file, in no process list, not at the storage."""
    site.sandbox.quirks.jwt = True
    paths = fill(site, 2)
    external = str(site.sandbox.account.add(RUN, "out", "external").path)
    site.sandbox.faults += [
        Fault("storage", "cut", at=500, times=2),
        Fault("storage", "status", status=403, times=1),
        Fault("archive", "drop", times=1),
    ]
    config = str(site.write_config())
    said = ""
    for arguments in (
        ["sync"], ["sync", "--json"], ["doctor"], ["doctor", "--json"], ["status"], ["verify", "--repair"],
        ["remote", "external-urls", external], ["remote", "external-urls", external, "--json"], ["check-config", "--json"],
        ["remote", "checkpoints"], ["fetch", paths[0]],
    ):  # fmt: skip
        done = run(["--log-level", "debug", "--config", config, *arguments])
        said += done.stdout + done.stderr
    for path in site.root.rglob("*"):
        if path.is_file():
            said += path.read_bytes().decode(errors="replace")
    for secret in ("tml-very-secret-key", "eyJ", "X-Sig", site.sandbox.storage_url + "/"):
        assert secret not in said, secret
    url = run(["--config", config, "remote", "archive-url", paths[0]], check=0).stdout.strip()
    assert url.startswith(site.sandbox.storage_url), "the one exception prints it"
    for headers in site.sandbox.storage_requests:
        assert "x-api-key" not in headers
        assert "authorization" not in headers


def test_plan_explain_and_pins(site: Site) -> None:
    """What would go, why, what another day or configuration would change; pins hold; nothing is changed anywhere."""
    now = datetime.now(UTC)
    for n in range(8):
        site.sandbox.account.add(RUN, f"{n:06}", "sampler", payload=adapter(n), time=now - timedelta(days=8 - n))
    policy = '[[retention.remote]]\nname = "thin"\ntypes = ["sampler"]\nkeep_last = 3\n'
    config = str(site.write_config(policy))
    run(["--config", config, "sync"], check=0)
    planned = json.loads(run(["--config", config, "plan", "--json"], check=0).stdout)
    assert (planned["complete"], planned["breaker"]) == (True, None)
    remote = {v["tinker_path"][-6:]: v for v in planned["verdicts"] if v["side"] == "remote"}
    assert {name for name, v in remote.items() if v["action"] == "delete"} == {f"{n:06}" for n in range(5)}
    assert all(v["reasons"][0].keys() == {"why", "detail"} for v in planned["verdicts"])
    text = run(["--config", config, "plan"], check=0).stdout
    assert "remote: 5 of 8 would go" in text
    assert "nothing was changed" in text
    path = f"tinker://{RUN}/sampler_weights/000000"
    run(["--config", config, "pin", path, f"{RUN}/*/000001"], check=0)
    assert run(["--config", config, "pin"], check=0).stdout.splitlines() == [path, f"{RUN}/*/000001"]
    assert "is no pin" in run(["--config", config, "pin", "all"], check=2).stderr
    assert "remote: 3 of 8" in run(["--config", config, "plan"], check=0).stdout
    story = run(["--config", config, "explain", path], check=0).stdout
    assert "pinned" in story
    assert "read back or written" in story
    told = json.loads(run(["--config", config, "explain", path, "--json"], check=0).stdout)
    assert {v["side"] for v in told["verdicts"]} == {"remote", "local"}
    run(["--config", config, "unpin", path], check=0)
    assert "not pinned" in run(["--config", config, "unpin", path], check=1).stderr
    other = site.home / "other.toml"
    other.write_text(Path(config).read_text().replace("keep_last = 3", "keep_last = 6"))
    assert "3 delete -> keep" in run(["--config", config, "plan", "--diff", str(other)], check=0).stdout
    past = (now - timedelta(days=9)).isoformat()
    assert "remote: 0 of 8" in run(["--config", config, "plan", "--at", past], check=0).stdout
    assert "is no time" in run(["--config", config, "plan", "--at", "later"], check=2).stderr
    breaker = run(["--config", config, "plan"], check=5, TINKER_SYNC__RETENTION__MAX_DELETES="2")
    assert "BREAKER: 4 deletes of 8" in breaker.stdout
    assert "neither listed nor here" in run(["--config", config, "explain", path + "9"], check=1).stderr
    offline = run(["--config", config, "explain", path], check=0, TINKER_SYNC__TINKER__BASE_URL="http://127.0.0.1:1")
    assert "what it listed last" in offline.stdout
    assert len(site.sandbox.account.checkpoints) == 8
    assert site.sandbox.account.deleted == []


def test_doctor(site: Site) -> None:
    """All well: exit 0; a wrong listing mode, a dropped archive call, a held clock: said."""
    fill(site)
    site.sandbox.account.add(RUN, "000000", "sampler", payload=adapter(1))
    config = str(site.write_config())
    good = run(["--config", config, "doctor"], check=0)
    assert "archives are handed out" in good.stdout
    assert "proven complete" in good.stdout
    assert "1 names exist in two types" in good.stdout
    site.sandbox.quirks.no_archives = 410
    assert "hands out none (410)" in run(["--config", config, "doctor"], check=0).stdout
    site.sandbox.quirks.training_only_listing = True
    checks = json.loads(run(["--config", config, "doctor", "--json"], check=1).stdout)["checks"]
    assert any('listing = "both"' in check["detail"] for check in checks)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["runs"], RUN), (["run", RUN], "lora_rank"), (["run", f"tinker://{RUN}/weights/000000"], "lora_rank"),
        (["checkpoints"], "of 2"), (["checkpoints", RUN], "000001"),
        (["weights-info", f"tinker://{RUN}/weights/000000"], "Qwen/Qwen3-8B"), (["sessions"], ""),
        (["sampler", "s:sample:0"], "s:sample:0"), (["capabilities"], "Qwen/Qwen3-8B"), (["usage"], "$0.31 per GB"),
        (["publish", f"tinker://{RUN}/weights/000000"], "is public"),
        (["unpublish", f"tinker://{RUN}/weights/000000"], "is private"),
    ],
)  # fmt: skip
def test_remote(site: Site, arguments: list[str], said: str) -> None:
    """Every documented call from the shell, for people and as JSON."""
    fill(site, 2)
    config = str(site.write_config())
    assert said in run(["--config", config, "remote", *arguments], check=0).stdout
    json.loads(run(["--config", config, "remote", *arguments, "--json"], check=0).stdout)


def test_help_is_quick_and_teaches(tmp_path: Path) -> None:
    """`--help` imports the command-line library and nothing else that costs."""
    code = (
        "import sys; sys.argv=['tinker-sync','--help']\n"
        "from tinker_sync.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'httpx','aiohttp','pydantic','pydantic_settings','sqlalchemy','structlog','tenacity','rich','asyncio'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "HEAVY []" in done.stdout
    for name in (
        "sync",
        "fetch",
        "status",
        "ls",
        "path",
        "verify",
        "reindex",
        "check-config",
        "doctor",
        "demo",
        "remote",
    ):
        assert name in done.stdout
        assert run([name, "--help"], check=0).stdout
    assert "complete" in run(["--show-completion", "bash"], SHELL="/bin/bash").stdout.lower()


def test_the_demo(tmp_path: Path) -> None:
    """It shows what it promises, ends with 0, leaves nothing running and a mirror that works."""
    elsewhere = {
        "TINKER_SYNC__MIRROR__ROOT": str(tmp_path / "elsewhere"),
        "TINKER_SYNC__TINKER__BASE_URL": "http://127.0.0.1:1",
    }
    done = run(["demo", "--directory", str(tmp_path / "d")], check=0, timeout=110, **elsewhere)
    for part in ("7 copied", "3 copied", "1 damaged", "repaired", "latest-training ->", "Everything is in"):
        assert part in done.stdout, done.stdout
    config = str(tmp_path / "d" / "config.toml")
    assert json.loads(run(["--config", config, "status", "--json"], check=0).stdout)["replicas"] == 10
    assert not (tmp_path / "elsewhere").exists()
    assert "is there already" in run(["demo", "--directory", str(tmp_path / "d")], check=2).stderr


def test_output_that_nobody_reads(site: Site) -> None:
    """`| head` ends it quietly."""
    fill(site, 20)
    config = str(site.write_config())
    run(["--config", config, "sync"], check=0)
    script = f"'{command()[0]}' --config {config} ls | head -1"
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=30, check=False, env=os.environ
    )
    assert done.stderr == ""


def test_a_name_cannot_drive_the_terminal(site: Site) -> None:
    """Control characters in a checkpoint's name reach neither a terminal nor the log."""
    site.sandbox.account.add(RUN, "evil\x1b[2J\x07name", payload=adapter(1))
    config = str(site.write_config())
    for arguments in (["sync"], ["ls"], ["remote", "checkpoints"], ["status"]):
        done = run(["--config", config, *arguments], check=0)
        assert "\x1b" not in done.stdout + done.stderr
        assert "\x07" not in done.stdout + done.stderr
