"""Figures of the mirror: start-up, memory, a second pass, and kills at random moments.

    python benchmarks/mirror.py [startup] [memory] [second-pass] [kills] [planning]

Runs the installed command of this interpreter's environment against the local server, everything on loopback and in a
temporary directory. Prints one line per figure.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path

from tinker_sync.model.manifest import Manifest
from tinker_sync.sandbox import Payload, Sandbox, adapter

COMMAND = str(Path(sys.executable).parent / "tinker-sync")
RUN = "39aa5eb2-e234-5a95-ab68-896e4cac8c45:train:0"


@contextlib.contextmanager
def serving():
    """A sandbox in a thread of its own."""
    sandbox = Sandbox()
    loop = asyncio.new_event_loop()
    ready, stop = threading.Event(), asyncio.Event()

    async def serve():
        async with sandbox.running():
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    ready.wait()
    try:
        yield sandbox
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()


def config(home: Path, sandbox: Sandbox) -> list[str]:
    """A configuration for it, as arguments."""
    (home / "key").write_text(sandbox.key)
    path = home / "config.toml"
    path.write_text(
        f'[tinker]\nbase_url = "{sandbox.base_url}"\napi_key_file = "{home / "key"}"\n'
        f'[mirror]\nroot = "{home / "mirror"}"\nmin_free = "0"\n[log]\nlevel = "error"\n'
    )
    return [COMMAND, "--config", str(path)]


def measured(arguments: list[str]) -> tuple[float, float, float, str]:
    """Wall seconds, CPU seconds, peak RSS in MB, stdout."""
    code = (
        "import resource,subprocess,sys,time,json\nb=time.monotonic()\n"
        "d=subprocess.run(sys.argv[1:],stdout=subprocess.PIPE,text=True)\n"
        "u=resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(json.dumps([time.monotonic()-b,u.ru_utime+u.ru_stime,u.ru_maxrss/1024,d.stdout,d.returncode]))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    wall, cpu, rss, out, returned = json.loads(done.stdout)
    assert returned == 0, out
    return wall, cpu, rss, out


def startup() -> None:
    """`--help` and `status`, the best of ten after one warm-up."""
    with serving() as sandbox, tempfile.TemporaryDirectory() as text:
        home = Path(text)
        base = config(home, sandbox)
        for n in range(20):
            sandbox.account.add(RUN, f"{n:06}", payload=adapter(n))
        measured([*base, "sync"])
        for name, arguments in (("--help", [COMMAND, "--help"]), ("status", [*base, "status"])):
            walls = sorted(measured(arguments)[0] for _ in range(11))
            print(f"startup      {name:10} best {walls[0]:.3f} s, median {walls[5]:.3f} s")


def memory() -> None:
    """Peak RSS while one 2 GB archive is mirrored."""
    with serving() as sandbox, tempfile.TemporaryDirectory() as text:
        home = Path(text)
        sandbox.account.add(RUN, "big", payload=adapter(1, pad_to=2_000_000_000))
        wall, cpu, rss, _ = measured([*config(home, sandbox), "sync"])
        print(
            f"memory       2 GB archive: peak RSS {rss:.0f} MB, {wall:.1f} s, {2000 / wall:.0f} MB/s, CPU {cpu:.1f} s"
        )


def second_pass(count: int = 10_000) -> None:
    """A pass over so many mirrored checkpoints with nothing to do."""
    with serving() as sandbox, tempfile.TemporaryDirectory() as text:
        home = Path(text)
        base = config(home, sandbox)
        payload = Payload(adapter(1, hidden=2, layers=1, rank=1).files)
        for n in range(count):
            sandbox.account.add(f"run-{n // 200}:train:0", f"{n:06}", payload=payload, ttl=timedelta(days=30))
        wall, cpu, rss, _ = measured([*base, "sync"])
        print(f"first pass   {count:,} checkpoints: {wall:.1f} s, CPU {cpu:.1f} s, peak RSS {rss:.0f} MB")
        sandbox.requests.clear()
        sandbox.storage_requests.clear()
        wall, cpu, rss, _ = measured([*base, "sync", "--json"])
        routes = [f"{method} {raw}" for method, raw in sandbox.requests]
        print(
            f"second pass  {count:,} checkpoints: {wall:.2f} s, CPU {cpu:.2f} s, peak RSS {rss:.0f} MB, "
            f"{len(routes)} API requests ({', '.join(sorted(set(routes)))}), {len(sandbox.storage_requests)} to storage"
        )


def kills(times: int = 50) -> None:
    """`kill -9` at random moments of a sync, looked at after each, then one more sync."""
    chance = random.Random(1)
    with serving() as sandbox, tempfile.TemporaryDirectory() as text:
        home = Path(text)
        base = config(home, sandbox)
        for n in range(1000):
            sandbox.account.add(RUN, f"{n:06}", payload=adapter(n, pad_to=3_000_000), ttl=timedelta(days=7))
        seen = []
        for _ in range(times):
            with subprocess.Popen([*base, "sync"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
                time.sleep(chance.uniform(0.2, 1.2))
                running.kill()
            seen.append(whole(home / "mirror"))
        before = len(list((home / "mirror" / ".tinker-sync" / "staging").iterdir()))
        measured([*base, "sync"])
        *_, out = measured([*base, "verify", "--json"])
        report = json.loads(out)
        left = len(list((home / "mirror" / ".tinker-sync" / "staging").iterdir()))
        print(
            f"kills        {times} of kill -9: replicas after each {seen[0]}…{seen[-1]}, all whole; then one sync: "
            f"{report['ok']} of 1,000 ok, stages {before} before it, {left} after"
        )


def planning() -> None:
    """Retention over 10^4, 10^5 and 10^6 checkpoints: seconds and memory, each in a process of its own."""
    code = """
import gc, resource, sys, time
from datetime import UTC, datetime, timedelta
from tinker_sync.model.checkpoint import Checkpoint
from tinker_sync.model.paths import TinkerPath
from tinker_sync.model.work import Replica
from tinker_sync.retention import KeepBest, Member, Policy, RetentionRules, plan_retention
count, sides, now = int(sys.argv[1]), sys.argv[2], datetime(2026, 6, 1, tzinfo=UTC)
def member(n):
    path = TinkerPath(f"run-{n // 1000}:train:0", "sampler_weights", f"{n % 1000:06}")
    row = Checkpoint(path, now - timedelta(minutes=30 * (n % 1000)), 1000)
    replica = None
    if sides == "both":
        replica = Replica(path, row.time, 1000, str(path), 1000, 3, "exact", "archive", row.time, row.time, "")
    return Member(path, row.time, row, replica, step=n % 1000, user_metadata={"loss": str(n % 7)})
members = [member(n) for n in range(count)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
policy = Policy("p", ("sampler",), keep_last=3, keep_slots={"daily": 7}, keep_every_steps=100)
local = Policy("l", ("sampler",), keep_last=20, keep_within=timedelta(days=2), keep_slots={"monthly": 12, "weekly": 4},
    keep_every_steps=50, keep_names=("final", "best*"), keep_best=KeepBest("loss", "min", 5))
rules = RetentionRules(timezone=UTC, min_age=timedelta(hours=1), remote=(policy,), local=(local,))
gc.set_threshold(100_000, 20, 20)  # as the command does
begun = time.process_time()
plan = plan_retention(members, rules, now=now, complete=True)
spent = time.process_time() - begun
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(f"planning     {count:>9,} checkpoints, {sides:6}: {spent:.2f} s CPU, {before:.0f} MB inventory, {peak:.0f} MB peak")
"""
    for sides in ("remote", "both"):
        for count in (10_000, 100_000, 1_000_000):
            subprocess.run([sys.executable, "-c", code, str(count), sides], check=True)


def whole(root: Path) -> int:
    """How many final directories there are; raises when one is not whole."""
    count = 0
    for directory in root.glob("[!.]*/*/*"):
        if not directory.is_dir() or directory.parent.is_symlink():
            continue
        manifest = Manifest.from_bytes((directory / ".tinker-sync.json").read_bytes())
        for entry in manifest.files:
            assert (directory / str(entry.path)).stat().st_size == entry.size, directory
        count += 1
    return count


if __name__ == "__main__":
    print(f"machine      {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    chosen = sys.argv[1:] or ["startup", "memory", "second-pass", "kills", "planning"]
    for name in chosen:
        {"startup": startup, "memory": memory, "second-pass": second_pass, "kills": kills, "planning": planning}[name]()
