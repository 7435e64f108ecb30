"""Hooks, notifications and the heartbeat: told what happened, and unable to hurt the work."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
import time
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from aiohttp import web

from tests.conftest import NOW, Site, run
from tests.test_service import QUICK, RUN, replicas, serving
from tinker_sync.catalog.store import SqlCatalog
from tinker_sync.errors import ConfigInvalid
from tinker_sync.model.checkpoint import Checkpoint
from tinker_sync.model.events import Event
from tinker_sync.model.paths import TinkerPath
from tinker_sync.model.work import Failure, Trouble
from tinker_sync.notify.alarms import Message, Told, as_json, from_json, next_messages
from tinker_sync.notify.hooks import Hooks
from tinker_sync.notify.messages import Messenger, open_channels
from tinker_sync.notify.telling import Telling
from tinker_sync.overview import NOTHING, Surroundings, Waiting, alarms, judge, overview
from tinker_sync.sandbox import Fault, adapter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

PATH = TinkerPath.parse("tinker://r:train:0/weights/a b")
HOUR = timedelta(hours=1)
LAST = {"service_error": None, "breaker": None}


@contextmanager
def logs() -> Iterator[list[Any]]:
    """What is logged meanwhile."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(0))
    with structlog.testing.capture_logs() as found:
        yield found


def program(home: Path, text: str) -> tuple[str, ...]:
    """A script."""
    path = home / f"hook{len(list(home.glob('hook*')))}"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return (str(path),)


# Hooks


async def test_a_hook_gets_the_facts_in_order_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each event in turn, with its facts; arguments as they are; no credential, no notify socket, no input."""
    monkeypatch.setenv("TINKER_API_KEY", "tml-hush")
    monkeypatch.setenv("TINKER_SYNC__NOTIFY__HEARTBEAT_URL", "https://hush.example")
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere")
    monkeypatch.setenv("CLOUDFLARE_ACCESS_CLIENT_SECRET", "hush")
    monkeypatch.setenv("TINKER_CREDENTIAL_CMD", "print-hush")
    log = tmp_path / "out"
    hook = program(tmp_path, f'echo "$1 $TINKER_SYNC_EVENT $TINKER_SYNC_BYTES" >> {log}; env > {log}.env; cat >> {log}')
    async with Hooks({"committed": (*hook, "two words")}, timeout=5, root="/srv/m") as hooks:
        for size in range(3):
            hooks.happened(Event("committed", PATH, {"bytes": str(size), "directory": "r/weights/a b"}))
        hooks.happened(Event("deleted", PATH))  # nobody asked for these
    assert log.read_text().splitlines() == [f"two words committed {size}" for size in range(3)]
    environment = dict(line.split("=", 1) for line in Path(f"{log}.env").read_text().splitlines() if "=" in line)
    assert environment["TINKER_SYNC_TINKER_PATH"] == str(PATH)
    assert environment["TINKER_SYNC_DIRECTORY"] == "/srv/m/r/weights/a b"
    assert (environment["TINKER_SYNC_NAME"], environment["TINKER_SYNC_TYPE"]) == ("a b", "training")
    assert "hush" not in str(environment)
    assert "NOTIFY_SOCKET" not in environment


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("echo sorry >&2; exit 3", "it ended with 3"),
        ("sleep 60", "it took more than 0.5 s"),
        ("sleep 60 & exit 4", "it ended with 4"),  # a child of its own holds the pipe
        ("trap '' TERM; sleep 60; sleep 60", "it took more than 0.5 s"),
    ],
)
async def test_a_hook_that_fails_is_a_line_in_the_log(tmp_path: Path, text: str, said: str) -> None:
    """Its exit code, or that it was ended; the next one runs all the same."""
    good = tmp_path / "good"
    with logs() as found:
        hooks = Hooks(
            {"failed": program(tmp_path, text), "committed": program(tmp_path, f"touch {good}")}, timeout=0.5, root="/"
        )
        async with asyncio.timeout(20), hooks:
            hooks.happened(Event("failed", PATH))
            hooks.happened(Event("committed", PATH))
    (line,) = [line for line in found if line["event"] == "hook.failed"]
    assert said in line["error"]
    assert good.exists()


async def test_what_cannot_be_started_is_said(tmp_path: Path) -> None:
    """A program that is not there, and a file that is none."""
    (tmp_path / "text").write_text("no program")
    with logs() as found:
        async with Hooks(
            {"failed": (str(tmp_path / "none"),), "deleted": (str(tmp_path / "text"),)}, timeout=1, root="/"
        ) as hooks:
            hooks.happened(Event("failed", PATH))
            hooks.happened(Event("deleted", PATH))
    assert [line["error"] for line in found] == [
        "cannot be started: No such file or directory", "cannot be started: Permission denied",
    ]  # fmt: skip


async def test_an_interruption_ends_the_hook_and_what_it_started(tmp_path: Path) -> None:
    """Nothing is left running, and what was not run is said."""
    pid = tmp_path / "pid"
    hook = program(tmp_path, f"sleep 60 & echo $! > {pid}.new; mv {pid}.new {pid}; wait")
    with logs() as found:

        async def work() -> None:
            async with Hooks({"committed": hook}, timeout=60, root="/") as hooks:
                hooks.happened(Event("committed", PATH))
                hooks.happened(Event("committed", PATH))
                await asyncio.sleep(60)

        task = asyncio.create_task(work())
        while not pid.exists():  # noqa: ASYNC110 - another process makes it
            await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert found == [{"event": "hooks.dropped", "events": 1, "log_level": "warning"}]
    for _ in range(100):
        state = Path(f"/proc/{pid.read_text().strip()}/status")
        if not state.exists() or "zombie" in state.read_text():
            break
        await asyncio.sleep(0.02)
    else:
        raise AssertionError(pid.read_text())


def test_hooks_of_the_commands(outside: Site) -> None:
    """`sync` runs them and waits for them; their failing changes no exit code."""
    outside.sandbox.account.add(RUN, "good", payload=adapter(0))
    outside.sandbox.account.add(RUN, "bad", payload=adapter(0))
    outside.sandbox.faults.append(Fault("archive", "status", status=500, match="bad"))
    out = outside.home / "out"
    hook = program(
        outside.home, f'sleep 0.3; echo "$TINKER_SYNC_EVENT $TINKER_SYNC_NAME $TINKER_SYNC_ERROR" >> {out}; exit 9'
    )
    config = outside.write_config(f'[hooks]\ncommitted = ["{hook[0]}"]\nfailed = ["{hook[0]}"]\n')
    done = run(["--config", str(config), "sync"], check=1)
    assert "it ended with 9" in done.stderr
    lines = sorted(out.read_text().splitlines())
    assert lines[0] == "committed good "
    assert lines[1].startswith("failed bad ")
    assert "500" in lines[1]


# What people should know


def failure(name: str, attempts: int, trouble: Trouble = Trouble.FAILING) -> Failure:
    """A failure."""
    return Failure(TinkerPath("r", "weights", name), NOW, 1, trouble, attempts, "cut", NOW, NOW + timedelta(minutes=1))


def document(**changes: Any) -> dict[str, Any]:
    """A mirror that is well, less what is changed."""
    around = {key: changes.pop(key) for key in ("stop_reason", "free_bytes", "min_free") if key in changes}
    stock = {
        "counts": {**NOTHING.counts, "replicas": 1},
        "missing": (),
        "failures": (),
        "running_out": 0,
        "last_pass": LAST,
    }
    chosen = type(NOTHING)(**{**stock, **changes})
    return overview(chosen, Surroundings("/srv/m", enforce=True, **around), now=NOW)


def waiting(name: str, left: timedelta, seen: timedelta) -> Waiting:
    """A checkpoint that ends in `left`, first seen so long ago."""
    return Waiting(Checkpoint(TinkerPath("r", "weights", name), NOW, 1, expires_at=NOW + left), NOW - seen)


@pytest.mark.parametrize(
    ("changes", "kinds", "level"),
    [
        ({}, set(), "well"),
        ({"failures": [failure("a", 1)]}, set(), "bad"),  # one failure is no alarm yet
        ({"failures": [failure("a", 2)]}, {"failure:checkpoints"}, "bad"),
        ({"failures": [failure("a", 1, Trouble.QUARANTINED)]}, {"failure:checkpoints"}, "bad"),
        ({"failures": [failure("a", 9, Trouble.NOT_SERVED)]}, set(), "well"),
        ({"counts": {**NOTHING.counts, "replicas": 1, "damaged": 1}}, {"failure:damage"}, "bad"),
        ({"stop_reason": "lost"}, {"breaker:stopped"}, "bad"),
        ({"last_pass": {"service_error": None, "breaker": {"deletes": 9}}}, {"breaker:limits"}, "bad"),
        ({"missing": [waiting("a", HOUR, HOUR)]}, {"expiring"}, "bad"),
        ({"missing": [waiting("a", HOUR, timedelta(minutes=1))]}, set(), "working"),  # it only just appeared
        ({"missing": [waiting("a", 48 * HOUR, HOUR)]}, set(), "working"),
        ({"missing": [waiting("a", -HOUR, HOUR)]}, set(), "well"),  # it is over
        ({"free_bytes": 5, "min_free": 6}, {"disk:min_free"}, "bad"),
        ({"free_bytes": 6, "min_free": 6}, set(), "well"),
        ({"last_pass": {**LAST, "no_room": 3}}, {"disk:max_bytes"}, "bad"),
        ({"last_pass": {**LAST, "disk_error": "EIO"}}, {"disk:trouble"}, "bad"),
        ({"last_pass": {**LAST, "retention_error": "pins"}}, {"failure:retention"}, "bad"),
        ({"last_pass": {**LAST, "service_error": "401", "credential_refused": True}}, {"failure:credential"}, "bad"),
        ({"last_pass": {**LAST, "listed_at": "2026-01-15T05:59:59Z"}}, {"silence"}, "well"),
        ({"lost": [(PATH, NOW - HOUR)]}, {"expiring:lost"}, "bad"),
        ({"lost": [(PATH, NOW - 25 * HOUR)]}, set(), "well"),
        (  # one cause does not hide another
            {"failures": [failure("a", 2)], "last_pass": {**LAST, "service_error": "401", "credential_refused": True}},
            {"failure:checkpoints", "failure:credential"},
            "bad",
        ),
    ],
)
def test_what_is_an_alarm(changes: dict[str, Any], kinds: set[str], level: str) -> None:
    """The table of docs/OPERATION.md."""
    found = document(**changes)
    assert set(alarms(found, now=NOW, silence=6 * HOUR)) == kinds
    assert judge(found, now=NOW)[0] == level


def titles(told: dict[str, Told], now: dict[str, str], hours: float) -> tuple[list[str], dict[str, Told]]:
    """What is said at that hour."""
    messages, after = next_messages(told, now, now=NOW + timedelta(hours=hours), who="me")
    return [message.title for message in messages], after


def test_an_alarm_is_told_once_and_its_end_once() -> None:
    """Again after a day; flapping is held back for an hour; what was held back is told when it lasts."""
    bad = {"disk": "full"}
    said, told = titles({}, bad, 0)
    assert said == ["me: disk"]
    assert titles(told, bad, 1)[0] == []
    assert titles(told, bad, 24)[0] == ["me: disk (still)"]
    said, told = titles(told, {}, 2)
    assert said == ["me: disk is over"]
    assert titles(told, {}, 3)[0] == []
    assert titles(told, bad, 2.5)[0] == []  # flapping: and then its end is not told either
    said, told = titles(told, bad, 3.1)
    assert said == ["me: disk"]
    assert from_json(json.loads(json.dumps(as_json(told)))) == told
    assert titles(told, bad, -1000)[0] == ["me: disk (still)"]  # a clock that went back keeps nothing quiet for long
    assert from_json({"disk": {"at": 3}}) == {}


# Sending


@asynccontextmanager
async def listener() -> AsyncIterator[tuple[str, list[Any], dict[str, int]]]:
    """A server that takes notifications and heartbeats: its host and port, what came, and how it answers."""
    came: list[Any] = []
    answers = {"status": 200}

    async def take(request: web.Request) -> web.Response:
        came.append(await request.json() if request.method == "POST" else request.path)
        return web.Response(status=answers["status"])

    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", take)
    runner = web.AppRunner(app, shutdown_timeout=0.05)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"127.0.0.1:{runner.addresses[0][1]}", came, answers
    finally:
        await runner.cleanup()


async def delivered() -> None:
    """Nothing more."""


async def test_notifications_and_heartbeats_are_sent() -> None:
    """Through Apprise; a heartbeat at once, and not again within the minute."""
    async with listener() as (host, came, _):
        async with Messenger([f"json://{host}/x"], f"http://{host}/beat/secret", user_agent="t") as messenger:
            messenger.send(Message("disk", "me: disk", "full"), delivered)
            for _ in range(5):
                messenger.alive()
                await asyncio.sleep(0.05)
        assert [item for item in came if isinstance(item, str)] == ["/beat/secret"]
        assert [(item["title"], item["message"]) for item in came if isinstance(item, dict)] == [("me: disk", "full")]


async def test_a_failing_notifier_hurts_nobody() -> None:
    """It is a line in the log without the URL; leaving does not wait for long."""
    async with listener() as (host, came, answers):
        answers["status"] = 500
        with logs() as found:
            begun = time.monotonic()
            urls = [f"json://user:hush@{host}/hush"]
            async with Messenger(urls, f"http://{host}/hush", user_agent="t", patience=1.0) as messenger:
                messenger.send(Message("disk", "t", "b"), delivered)
                messenger.alive()
            assert time.monotonic() - begun < 8
        assert len(came) >= 2
    assert {"notify.failed", "heartbeat.failed"} <= {line["event"] for line in found}
    assert "hush" not in str(found)


def test_urls_that_nobody_understands_are_refused_without_showing_them(outside: Site) -> None:
    """At check-config, and at the start; the printed configuration shows no URL either."""
    with pytest.raises(ConfigInvalid, match=r"2\. URL"):
        open_channels(["json://localhost", "hush://hush@hush"])
    bad = outside.write_config('[notify]\nurls = ["hushhush://secret"]\n')
    for arguments in (["check-config"], ["sync"], ["run"]):
        done = run(["--config", str(bad), *arguments], check=2)
        assert "[notify] urls: the 1. URL" in done.stderr
        assert "secret" not in done.stderr + done.stdout
    good = outside.write_config('[notify]\nurls = ["json://u:secret@localhost"]\nheartbeat_url = "https://h/secret"\n')
    assert "secret" not in run(["--config", str(good), "check-config", "--json"], check=0).stdout


# The service tells


async def test_the_service_tells_of_trouble_and_of_its_end(outside: Site) -> None:
    """A quarantined checkpoint, its end, a silence; a restart repeats nothing."""
    outside.sandbox.account.add(RUN, "good", payload=adapter(0))
    outside.sandbox.faults.append(Fault("list", "status", status=500))
    async with listener() as (host, came, _):
        extra = f'{QUICK}[notify]\nurls = ["json://{host}/"]\nheartbeat_url = "http://{host}/beat"\nsilence = "2s"\n'

        def seen() -> list[str]:
            return [item["title"].partition(": ")[2] for item in came if isinstance(item, dict)]

        def watch() -> None:
            with serving(outside, extra, TINKER_SYNC__TINKER__TIMEOUT="1s") as service:
                service.until(lambda: "silence" in seen(), 40)
                assert "/beat" not in came
                outside.sandbox.faults.clear()
                service.until(lambda: "silence is over" in seen(), 60)
                service.until(lambda: "/beat" in came)
                service.until(lambda: replicas(outside) == {"good"})
                assert service.end()[0] == 0
            with serving(outside, extra) as service:
                service.until(lambda: "poll" in service.log or replicas(outside) == {"good"})
                time.sleep(2)
                assert service.end()[0] == 0

        await asyncio.to_thread(watch)
        assert seen() == ["silence", "silence is over"]


def test_a_hook_that_hangs_does_not_hold_up_the_end(outside: Site) -> None:
    """SIGTERM ends the service within its ten seconds, and the hook with it."""
    outside.sandbox.account.add(RUN, "a", payload=adapter(0))
    pid = outside.home / "pid"
    hook = program(outside.home, f"trap '' TERM; echo $$ > {pid}; sleep 60; sleep 60")
    with serving(outside, f'{QUICK}[hooks]\ncommitted = ["{hook[0]}"]\n') as service:
        service.until(lambda: pid.exists() and pid.read_text().strip())
        code, seconds = service.end(signal.SIGTERM)
    assert (code, seconds < 10) == (0, True)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert stat.S_ISREG(pid.stat().st_mode)


# What a service tells, over time


def policy(site: Site) -> str:
    """Five of seven would go at once: over the breaker's limits."""
    now = site.sandbox.account.now()
    for n in range(7):
        site.sandbox.account.add(RUN, f"{n:06}", payload=adapter(n), time=now - timedelta(days=9 - n))
    return (
        "[retention]\nenforce = true\nmax_deletes = 2\n"
        '[[retention.remote]]\nname = "p"\ntypes = ["training"]\nkeep_last = 2\n'
    )


async def test_the_breaker_is_told_once_while_it_trips_and_its_end_once(outside: Site) -> None:
    """Polls in between, answered or failed, say nothing of retention; the log has one line."""
    text = policy(outside)
    async with listener() as (host, came, _):
        extra = f'{QUICK}[notify]\nurls = ["json://{host}/"]\n{text}'

        def seen() -> list[str]:
            return [item["title"].partition(": ")[2] for item in came if isinstance(item, dict)]

        def watch() -> None:
            with serving(outside, extra) as service:
                service.until(lambda: seen() == ["breaker, limits"])
                time.sleep(4)
                outside.sandbox.faults.append(Fault("list", "status", status=400))
                service.until(lambda: "poll.failed" in service.log)
                status = json.loads(run(["--config", str(outside.home / "config.toml"), "status", "--json"]).stdout)
                assert status["last_pass"]["breaker"]["deletes"] == 5
                outside.sandbox.faults.clear()
                time.sleep(3)
                assert seen() == ["breaker, limits"]
                assert service.log.count("breaker.tripped") == 1
                config = outside.home / "config.toml"
                config.write_text(
                    config.read_text().replace("max_deletes = 2", "max_deletes = 50\nmax_delete_fraction = 1.0")
                )
                service.process.send_signal(signal.SIGHUP)
                service.until(lambda: seen() == ["breaker, limits", "breaker, limits is over"], 30)
                assert len(outside.sandbox.account.deleted) == 5
                assert service.end()[0] == 0

        await asyncio.to_thread(watch)


async def test_what_ends_uncopied_is_a_loss_and_told_as_one(outside: Site) -> None:
    """In the log, to the hook, to people, in status; not as an alarm that is over."""
    out = outside.home / "out"
    hook = program(outside.home, f'echo "$TINKER_SYNC_NAME $TINKER_SYNC_ERROR" >> {out}')
    outside.sandbox.account.add(RUN, "doomed", payload=adapter(0), ttl=timedelta(seconds=4))
    outside.sandbox.account.add(RUN, "rolling", payload=adapter(0), ttl=timedelta(seconds=1))
    outside.sandbox.account.add(RUN, "stays", payload=adapter(0))
    outside.sandbox.faults.append(Fault("archive", "status", status=500, match="doomed"))
    async with listener() as (host, came, _):
        extra = f'short_ttl = "2s"\n{QUICK}[notify]\nurls = ["json://{host}/"]\n[hooks]\nfailed = ["{hook[0]}"]\n'

        def watch() -> None:
            with serving(outside, extra) as service:
                service.until(lambda: "checkpoint.lost" in service.log)
                service.until(lambda: any("lost" in item["title"] for item in came if isinstance(item, dict)))
                service.until(lambda: "doomed it ended upstream before it was copied" in out.read_text())
                status = ["--config", str(outside.home / "config.toml"), "status"]
                lost = "NOT WELL: 1 checkpoints ended upstream before they were copied"
                service.until(lambda: lost in run(status, check=0).stdout)
                assert "rolling" not in service.log.partition("checkpoint.lost")[2]
                assert service.end()[0] == 0

        await asyncio.to_thread(watch)
    assert not any("over" in item["title"] for item in came if isinstance(item, dict))


async def test_who_is_named_by_a_reload_is_told_what_goes_on(outside: Site) -> None:
    """What was an alarm before there was a channel is told when there is one."""
    key, outside.sandbox.key = outside.sandbox.key, "tml-another"
    async with listener() as (host, came, _):

        def watch() -> None:
            with serving(outside) as service:
                (outside.home / "key").write_text(key)
                service.until(lambda: "poll.failed" in service.log)
                time.sleep(2)
                config = outside.home / "config.toml"
                config.write_text(config.read_text() + f'[notify]\nurls = ["json://{host}/"]\n')
                service.until(lambda: came, 30)
                assert service.end()[0] == 0

        await asyncio.to_thread(watch)
    assert came[0]["title"].endswith("failure of credential")


async def test_a_failing_sync_tells_everything_and_sends_no_heartbeat(outside: Site) -> None:
    """Several alarms, all delivered before it ends; a good one sends its heartbeat, and that they are over."""
    outside.sandbox.account.add(RUN, "a", payload=adapter(0))
    key, outside.sandbox.key = outside.sandbox.key, "tml-another"
    async with listener() as (host, came, _):
        config = outside.write_config(f'[notify]\nurls = ["json://{host}/"]\nheartbeat_url = "http://{host}/beat"\n')
        (outside.home / "key").write_text(key)
        state = outside.root / ".tinker-sync"
        await asyncio.to_thread(run, ["--config", str(config), "sync"], check=3)
        (state / "stop").write_text("lost something")
        await asyncio.to_thread(run, ["--config", str(config), "sync"], check=3)
        assert [item["title"].partition(": ")[2] for item in came] == ["failure of credential", "breaker, stopped"]
        outside.sandbox.key = key
        (state / "stop").unlink()
        await asyncio.to_thread(run, ["--config", str(config), "sync"], check=0)
    assert sorted(item["title"].partition(": ")[2] for item in came[2:] if isinstance(item, dict)) == [
        "breaker, stopped is over", "failure of credential is over",
    ]  # fmt: skip
    assert came.count("/beat") == 1


async def test_what_was_not_delivered_is_told_later(outside: Site) -> None:
    """A channel that was down at one run gets it at the next; the good one is not told twice."""
    (outside.root / ".tinker-sync").mkdir(parents=True)
    outside.sandbox.account.add(RUN, "a", payload=adapter(0))
    async with listener() as (host, came, answers):
        config = outside.write_config(f'[notify]\nurls = ["json://{host}/"]\n')
        await asyncio.to_thread(run, ["--config", str(config), "sync"], check=0)
        (outside.root / ".tinker-sync" / "stop").write_text("lost something")
        answers["status"] = 500
        interrupted = Messenger([f"json://{host}/"], None, user_agent="t", patience=0.2)
        async with interrupted as messenger:
            messenger.send(Message("x", "x", "x"), delivered)
        came.clear()
        answers["status"] = 200
        await asyncio.to_thread(run, ["--config", str(config), "sync"], check=5)
        await asyncio.to_thread(run, ["--config", str(config), "sync"], check=5)
    assert [item["title"].partition(": ")[2] for item in came] == ["breaker, stopped"]


async def test_what_no_channel_took_is_told_when_there_is_one_again(tmp_path: Path) -> None:
    """A reload takes the channels away while a message waits, another brings one back: the alarm goes on, and is told."""
    async with listener() as (host, came, answers):
        answers["status"] = 500
        with SqlCatalog.open(tmp_path / "c.db") as catalog:
            async with Messenger([f"json://{host}/"], None, user_agent="t", patience=5.0) as messenger:
                telling = Telling(messenger, catalog, on=["disk"], who="me")
                await telling.tell({"disk": "full"}, NOW)
                async with asyncio.timeout(10):
                    while not came:  # noqa: ASYNC110 - another server takes it
                        await asyncio.sleep(0.01)
                messenger.configure([], None)
                await telling.tell({"disk": "full"}, NOW + HOUR)
                answers["status"] = 200
                came.clear()
            async with Messenger([f"json://{host}/"], None, user_agent="t", patience=5.0) as again:
                telling._messenger = again
                await telling.tell({"disk": "full"}, NOW + HOUR)
            assert set(catalog.told()) == {"disk"}
    assert [item["title"] for item in came] == ["me: disk"]


async def test_a_broken_channel_does_not_repeat_the_good_one() -> None:
    """Each channel is tried by itself; one that took it is enough."""
    async with listener() as (good, came, _), listener() as (bad, _, answers):
        answers["status"] = 500
        urls = [f"json://{bad}/", f"json://{good}/"]
        with logs() as found:
            async with Messenger(urls, None, user_agent="t", patience=5.0) as messenger:
                messenger.send(Message("disk", "t", "b"), delivered)
        assert len(came) == 1
        assert [line["event"] for line in found] == ["notify.channel_failed"]


def test_a_hook_that_hangs_and_a_notifier_that_hangs_do_not_hold_up_the_end(outside: Site) -> None:
    """Together they have a few seconds, and the threads that send are waited for by nobody."""
    outside.sandbox.account.add(RUN, "a", payload=adapter(0))
    hook = program(outside.home, "trap '' TERM; sleep 60; sleep 60")
    (outside.root / ".tinker-sync").mkdir(parents=True)
    (outside.root / ".tinker-sync" / "stop").write_text("something to tell")
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        urls = f'urls = ["json://127.0.0.1:{deaf.getsockname()[1]}/?rto=30"]'
        with serving(outside, f'{QUICK}[hooks]\ncommitted = ["{hook[0]}"]\n[notify]\n{urls}\n') as service:
            deaf.settimeout(20)
            connection, _ = deaf.accept()
            service.until(lambda: replicas(outside) == {"a"})
            code, seconds = service.end()
            connection.close()
    assert (code, seconds < 8) == (0, True)
