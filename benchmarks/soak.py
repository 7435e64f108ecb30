"""The service for hours, against a local server that misbehaves now and then: memory, descriptors, tasks, and what was copied.

    python benchmarks/soak.py --minutes 30 --interval 1             # real time
    python benchmarks/soak.py --minutes 1440 --interval 60 --speed 96   # a day in a quarter of an hour (needs libfaketime)

At random: faults of every kind, restarts by SIGTERM and by kill -9 (in the first two fifths, so that one process lives
long), good and bad reloads. What lived longer than two polls and its transfer must have been copied; time in which the
server was ill or the service was down does not count as life, and a checkpoint's own back-off (a quarter of its life at
most) is allowed for.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from datetime import timedelta
from pathlib import Path
from typing import Any

from tinker_sync.sandbox import Fault, Sandbox, adapter

FAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1"
FAULTS = [
    ("list", "status", {"status": 500}),
    ("list", "body", {"status": 200, "body": b"<html>"}),
    ("list", "close", {}),
    ("archive", "status", {"status": 503}),
    ("archive", "status", {"status": 500}),
    ("storage", "cut", {"at": 3000}),
    ("storage", "drop", {"at": 3000}),
    ("storage", "corrupt", {"at": 3000}),
    ("storage", "stall", {"at": 3000, "seconds": 3.0}),
    ("storage", "status", {"status": 403}),
    ("any", "status", {"status": 429, "headers": {"Retry-After": "1"}}),
]


async def world(home: Path, seconds: float, interval: float, seed: int) -> None:
    """The account that lives: checkpoints come with all kinds of lives, and the server is ill one part in four."""
    chance = random.Random(seed)
    sandbox = Sandbox(key="tml-soak-key")
    born = (home / "born.jsonl").open("w", buffering=1)
    ill = (home / "ill.jsonl").open("w", buffering=1)
    step = 4 * interval

    async def births() -> None:
        number = 0
        while time.time() < ends - step:
            kind = chance.choice(["training", "sampler", "sampler"])
            run = f"39aa5eb2-e234-5a95-ab68-{number // 400:011d}{chance.randrange(3)}:train:0"
            life = chance.choice([None, 20, 40, 120, 400]) if chance.random() < 0.8 else 3
            ttl = None if life is None else timedelta(seconds=life * interval)
            made = sandbox.account.add(
                run,
                f"{number:06}",
                kind,
                payload=adapter(number % 97, pad_to=chance.choice([0, 0, 1_000_000])),
                ttl=ttl,
            )
            row = {"path": made.path.tail, "born": time.time(), "life": None if life is None else life * interval}
            born.write(json.dumps(row) + "\n")
            number += 1
            await asyncio.sleep(chance.uniform(0.2, 1.8) * step / 4)

    async def illness() -> None:
        while time.time() < ends - 300 * interval:  # then back-offs run out
            await asyncio.sleep(chance.uniform(10, 50) * interval)
            where, kind, more = chance.choice(FAULTS)
            fault = Fault(where, kind, **more)
            sandbox.faults.append(fault)
            begun = time.time()
            await asyncio.sleep(chance.uniform(2, 15) * interval)
            sandbox.faults.remove(fault)
            ill.write(json.dumps([begun, time.time()]) + "\n")

    async with sandbox.running():
        (home / "server").write_text(sandbox.base_url)
        ends = time.time() + seconds
        async with asyncio.TaskGroup() as group:
            group.create_task(births())
            group.create_task(illness())
        await asyncio.sleep(3600 * 24 * 365)


class Service:
    """The process under test."""

    def __init__(self, home: Path, interval: float, environment: dict[str, str]) -> None:
        self.home = home
        self.environment = environment
        self.config = home / "config.toml"
        (home / "key").write_text("tml-soak-key")
        self.text = (
            f'[tinker]\nbase_url = "{(home / "server").read_text()}"\napi_key_file = "{home / "key"}"\n'
            f'[mirror]\nroot = "{home / "mirror"}"\nmin_free = "0"\nshort_ttl = "{5 * interval:g}s"\n'
            f'verify_every = "{60 * interval:g}s"\n'
            f'[poll]\ninterval = "{interval:g}s"\nfull_interval = "{10 * interval:g}s"\n'
            '[transfer]\nconcurrency = 4\n[status]\nlisten = "127.0.0.1:0"\n'
            f'[retention]\nenforce = true\nmin_age = "{30 * interval:g}s"\nmax_deletes = 1000\nmax_delete_fraction = 1.0\n'
            '[[retention.remote]]\nname = "old samplers"\ntypes = ["sampler"]\nkeep_last = 5\n'
        )
        self.config.write_text(self.text)
        self.log = home / "log"
        self.down: list[tuple[float, float]] = []
        self.stopped_at = 0.0
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def start(self, now: float) -> None:
        """Start it, and wait for its page."""
        with self.log.open("ab") as log:
            before = log.tell()
            if self.environment:  # its clock starts where the account's is now
                self.environment["FAKETIME"] = re.sub(
                    r"\+\S+", f"+{now - time.time():.3f}", self.environment["FAKETIME"]
                )
            self.process = subprocess.Popen(
                [
                    str(Path(sys.executable).with_name("tinker-sync")),
                    "--log-format",
                    "json",
                    "--config",
                    str(self.config),
                    "run",
                ],
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment},
            )
        for _ in range(600):
            text = self.log.read_bytes()[before:].decode()
            found = re.search(r"http://127.0.0.1:\d+/", text)
            if found:
                self.url = found.group(0)
                break
            time.sleep(0.05)
        if self.stopped_at:
            self.down.append((self.stopped_at, now))

    def end(self, number: int, now: float) -> float:
        """Signal it, and wait for its end; seconds that it took."""
        assert self.process is not None
        begun = time.monotonic()
        self.stopped_at = now
        self.process.send_signal(number)
        code = self.process.wait(30)
        assert code == (0 if number == signal.SIGTERM else -number), (code, self.log.read_text()[-2000:])
        return time.monotonic() - begun

    def look(self) -> dict[str, float]:
        """RSS in MB, descriptors, threads, tasks."""
        assert self.process is not None
        proc = Path(f"/proc/{self.process.pid}")
        status = (proc / "status").read_text()
        text = urllib.request.urlopen(self.url + "metrics", timeout=20).read().decode()
        urllib.request.urlopen(self.url, timeout=20).read()
        return {
            "rss": int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024,  # type: ignore[index]
            "threads": int(re.search(r"Threads:\s+(\d+)", status)[1]),  # type: ignore[index]
            "fds": len(list((proc / "fd").iterdir())),
            "tasks": float(re.search(r"^tinker_sync_tasks (\S+)", text, re.MULTILINE)[1]),  # type: ignore[index]
        }


def soak(options: argparse.Namespace, home: Path) -> None:
    """Run it, and print what came of it."""
    chance = random.Random(options.seed)
    speed, seconds = options.speed, options.minutes * 60
    environment = {}
    if speed != 1:
        environment = {"LD_PRELOAD": FAKETIME, "FAKETIME": f"+0 x{speed}", "NO_FAKE_STAT": "1"}
    begun = time.time()

    def now() -> float:
        """As the processes see it."""
        return begun + (time.time() - begun) * speed

    with subprocess.Popen(
        [sys.executable, __file__, "--world", str(home), "--minutes", str(options.minutes), "--interval",
         str(options.interval), "--seed", str(options.seed)],
        env={**os.environ, **environment},
    ) as account:  # fmt: skip
        try:
            while not (home / "server").exists() or not (home / "server").read_text():
                time.sleep(0.1)
            service = Service(home, options.interval, environment)
            service.start(now())
            counts = {"terms": 0, "kills": 0, "good reloads": 0, "bad reloads": 0}
            longest, looks = 0.0, []
            since = now()
            while now() < begun + seconds:
                time.sleep(max(0.5, 10 * options.interval / speed))
                roll = chance.random()
                if now() < begun + 0.4 * seconds and roll < 0.04:
                    number = chance.choice([signal.SIGTERM, signal.SIGKILL])
                    longest = max(longest, service.end(number, now()))
                    time.sleep(3 * options.interval / speed)
                    service.start(now())
                    since = now()
                    counts["terms" if number == signal.SIGTERM else "kills"] += 1
                elif roll < 0.08:
                    good = chance.random() < 0.7
                    text = service.text.replace("concurrency = 4", f"concurrency = {chance.randrange(2, 9)}")
                    service.config.write_text(text if good else text + "nonsense = 1\n")
                    counts["good reloads" if good else "bad reloads"] += 1
                looks.append({"at": now() - begun, "age": now() - since, **service.look()})
            longest = max(longest, service.end(signal.SIGTERM, now()))
        finally:
            account.terminate()
    report(options, home, service, looks, counts, longest, now() - begun)


def report(
    options: argparse.Namespace,
    home: Path,
    service: Service,
    looks: list[dict[str, float]],
    counts: dict[str, int],
    longest: float,
    lasted: float,
) -> None:
    """Figures, and the verdict."""
    born = [json.loads(line) for line in (home / "born.jsonl").read_text().splitlines()]
    away = [json.loads(line) for line in (home / "ill.jsonl").read_text().splitlines()] + service.down
    ends = max(row["born"] for row in born)
    missing, required = [], 0
    for row in born:
        until = min(ends, row["born"] + (row["life"] or 1e12))
        healthy = (until - row["born"]) - sum(max(0.0, min(until, b) - max(row["born"], a)) for a, b in away)
        allowance = 2 * options.interval + 3 * options.speed + (until - row["born"]) / 4
        if row["life"] is not None and row["life"] < 5 * options.interval:
            continue  # short-lived: their own rule
        if healthy <= allowance + 30 * options.interval * bool(away and _recent(row["born"], until, away)):
            continue
        required += 1
        if not (home / "mirror" / row["path"] / ".tinker-sync.json").exists():
            missing.append(row)
    log = service.log.read_text()
    service.config.write_text(service.text)
    history = subprocess.run(
        [str(Path(sys.executable).with_name("tinker-sync")), "--config", str(service.config), "verify", "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    verified: dict[str, Any] = json.loads(history.stdout)
    last = [look for look in looks if look["age"] > 0.1 * lasted]
    print(
        f"lasted       {lasted / 60:.0f} min at {options.speed}x, interval {options.interval:g} s; longest stop {longest:.2f} s"
    )
    print(f"happened     {counts}, {len((home / 'ill.jsonl').read_text().splitlines())} spells of illness")
    print(f"copied       {len(born)} born, {required} had to be copied, {len(missing)} of them missing; "
          f"{verified['ok']} of {verified['checked']} replicas verify; {log.count('checkpoint.deleted')} deleted upstream")  # fmt: skip
    for what in ("rss", "fds", "threads", "tasks"):
        values = [look[what] for look in last]
        quarter = max(1, len(values) // 4)
        first, final = sum(values[:quarter]) / quarter, sum(values[-quarter:]) / quarter
        print(
            f"{what:12} first quarter of the last process {first:.1f}, last quarter {final:.1f}, most {max(values):.0f}"
        )
    for row in missing[:10]:
        print("missing     ", row)
    unforeseen = [
        line for line in log.splitlines() if "internal error" in line or "Traceback" in line or "exception" in line
    ]
    print(f"unforeseen   {len(unforeseen)}", *unforeseen[:5], sep="\n             ")


def _recent(born: float, until: float, away: list[Any]) -> bool:
    return any(a < until and b > born - 60 for a, b in away)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="as the processes see them")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between polls")
    parser.add_argument("--speed", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="leave everything in this directory")
    parser.add_argument("--world", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.world:
        asyncio.run(world(chosen.world, chosen.minutes * 60, chosen.interval, chosen.seed))
    elif chosen.keep:
        chosen.keep.mkdir(parents=True)
        soak(chosen, chosen.keep)
    else:
        with tempfile.TemporaryDirectory() as directory:
            soak(chosen, Path(directory))
