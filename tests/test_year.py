"""A simulated year: thirty runs, cookbook TTLs, rolling saves, failures and restarts, on a clock that is moved.

An oracle of its own looks at every delete at the moment when it happens: the replica must be whole on the disk, and the
checkpoint must be one that the policies, read once more in the simplest words, do not keep.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from tests.conftest import Site, hours, minutes
from tests.test_enforcement import START, MovedClock
from tinker_sync.errors import TinkerSyncError
from tinker_sync.sandbox.adapters import adapter
from tinker_sync.sandbox.faults import Fault

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

    from tinker_sync.model.paths import TinkerPath
    from tinker_sync.sandbox.account import SandboxCheckpoint

DAYS, RUNS = 365, 30
SIZE = {"sampler": 350_000_000, "training": 1_400_000_000}
PRICE = 0.31
REMOTE = [
    {"name": "samplers", "types": ["sampler"], "keep_last": 3, "keep_every_steps": 500, "keep_names": ["final"]},
    {"name": "states", "types": ["training"], "keep_last": 1, "keep_within": "3d", "keep_names": ["final"]},
]
LOCAL = [{"name": "here", "types": ["sampler"], "keep_last": 1, "keep_names": ["final"]}]


@dataclass
class Year:
    """What happened, for the oracle and for the bill."""

    site: Site
    born: dict[TinkerPath, datetime] = field(default_factory=dict)
    rolling: set[TinkerPath] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)
    stored: dict[str, float] = field(default_factory=lambda: {"kept": 0.0, "everything": 0.0})
    """GB-days upstream: as it was, and if nothing were ever deleted by policy."""

    def on_delete(self, checkpoint: SandboxCheckpoint) -> None:
        """The oracle."""
        self.counts["deleted"] += 1
        path = checkpoint.path
        assert whole(self.site.directory(path)), f"{path} was deleted without a whole replica"
        group = sorted(
            (other.time, other.path)
            for other in self.site.sandbox.account.living()
            if (other.path.run_id, other.path.segment) == (path.run_id, path.segment) and other.path not in self.rolling
        )
        newest = [member for _, member in group]
        assert path.name != "final"
        assert path not in self.rolling or newest
        if path.segment == "sampler_weights":
            assert path not in newest[-3:], "one of the last three"
            buckets: dict[int, TinkerPath] = {}
            for member in newest:
                if member.name.isdigit():
                    buckets[int(member.name) // 500] = member
            assert path not in buckets.values(), "the highest of its bucket"
        elif path not in self.rolling:
            assert path != newest[-1]
            assert group[-1][0] - self.born[path] > timedelta(days=3)


def whole(directory: Path) -> bool:
    """Whether a replica is what its manifest says."""
    manifest = json.loads((directory / ".tinker-sync.json").read_text())
    return bool(manifest["files"]) and all(
        hashlib.sha256((directory / entry["path"]).read_bytes()).hexdigest() == entry["sha256"]
        for entry in manifest["files"]
    )


@pytest.mark.timeout(600)
async def test_a_simulated_year(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing that a policy keeps was ever lost, no delete was without proof, nothing went on both sides."""
    chance = random.Random(20260115)
    clock = MovedClock()
    site.clock, site.sandbox.account.now = clock, clock.now
    site.tinker = {"types_apart": True}
    site.retention = {
        "enforce": True, "remote": REMOTE, "local": LOCAL, "trash": "7d", "max_deletes": 40, "max_delete_fraction": 0.6,
        "grace": "1d",
    }  # fmt: skip
    year = Year(site)
    real = site.sandbox._delete

    def watched(checkpoint: SandboxCheckpoint) -> None:
        year.on_delete(checkpoint)
        real(checkpoint)

    site.sandbox._delete = watched  # type: ignore[method-assign]
    starts = sorted(chance.uniform(0, DAYS - 20) for _ in range(RUNS))
    lasts = [chance.uniform(1.5, 12) for _ in range(RUNS)]
    ends = START + timedelta(days=DAYS)
    while clock.at < ends:
        step = hours(chance.uniform(24, 40))
        before = clock.at
        clock.at += step
        advance(year, chance, before, starts, lasts)
        bill(year, step)
        await one_pass(year, chance)
    site.sandbox.faults.clear()
    for _ in range(3):
        clock.at += timedelta(days=1)
        await site.sync()
    finish(year, capsys)


def advance(year: Year, chance: random.Random, before: datetime, starts: list[float], lasts: list[float]) -> None:
    """The runs save: every eight hours in both types, a rolling one now and then, `final` at the end."""
    site, now = year.site, year.site.clock.now()
    for number, (start, last) in enumerate(zip(starts, lasts, strict=True)):
        run = f"00000000-0000-4000-8000-{number:012}:train:0"
        begin = START + timedelta(days=start)
        end = begin + timedelta(days=last)
        ttl = timedelta(days=7) if number % 2 else None

        def save(name: str, at: datetime, kind: str, ttl: timedelta | None, run: str = run) -> TinkerPath:
            made = site.sandbox.account.add(
                run, name, kind, payload=adapter(len(year.born)), time=at, ttl=ttl, size_bytes=SIZE[kind]
            )
            year.born[made.path] = at
            return made.path

        saves = int(last * 3)
        for index in range(1, saves + 1):
            at = begin + index * hours(8)
            if before < at <= now:
                for kind in ("training", "sampler"):
                    save(f"{index * 60:06}", at, kind, ttl)
        if before < end + hours(1) <= now:
            for kind in ("training", "sampler"):
                save("final", end + hours(1), kind, None)
        if begin < now < end and chance.random() < 0.5:
            path = save(f"rolling_{int(now.timestamp())}", now - minutes(chance.uniform(1, 110)), "training", hours(2))
            year.rolling.add(path)


def bill(year: Year, step: timedelta) -> None:
    """What is stored upstream, and what would be if nothing were deleted by policy (TTLs run out all the same)."""
    days, now = step / timedelta(days=1), year.site.clock.now()
    living = {checkpoint.path: checkpoint for checkpoint in year.site.sandbox.account.living()}
    for path, born in year.born.items():
        size = SIZE["sampler" if path.segment == "sampler_weights" else "training"] / 1e9
        odd = int(path.run_id[30:36]) % 2
        if path in living:
            year.stored["kept"] += size * days
        if path not in year.rolling and (path.name == "final" or not odd or now - born < timedelta(days=7)):
            year.stored["everything"] += size * days


async def one_pass(year: Year, chance: random.Random) -> None:
    """One pass, with what can go wrong: refusals, garbage, damage, and a process that dies at any moment."""
    site = year.site
    faults = site.sandbox.faults
    faults.clear()
    kind = chance.choice(["", "", "", "", "403", "gone", "garbage", "damage", "lost", "crash", "crash"])
    if kind == "403":
        faults.append(Fault("delete", "status", status=403, times=2))
    elif kind == "gone":
        faults.append(Fault("archive", "status", status=404, times=3))
    elif kind == "garbage":
        faults.append(Fault("list", "body", status=200, body=b"<html>", times=1))
    elif kind == "lost":
        faults.append(Fault("deleted", "drop", times=1))
    elif kind == "damage":
        victims = sorted(site.root.glob("*/*_weights/0*/adapter_model.safetensors"))
        if victims:
            victim = chance.choice(victims)
            victim.write_bytes(victim.read_bytes()[:-1] + b"!")
    task = asyncio.create_task(site.sync())
    if kind == "crash":
        await asyncio.sleep(chance.uniform(0.005, 0.25))
        task.cancel()
    try:
        result = await task
    except asyncio.CancelledError:
        year.counts["killed"] += 1
    except TinkerSyncError:
        year.counts["failed"] += 1
    else:
        year.counts["passes"] += 1
        year.counts["copied"] += len(result.transferred)
        year.counts["trashed"] += len(result.enforced.trashed)
        year.counts["breaker"] += result.enforced.breaker is not None
        assert result.enforced.stopped is None
    check_both_sides(year)


def check_both_sides(year: Year) -> None:
    """What lived through two days of passes is here, or there, or was let go here with its original living on."""
    site, now = year.site, year.site.clock.now()
    for path, born in year.born.items():
        if path in year.rolling or now - born < timedelta(days=3):
            continue
        there = site.sandbox.account.find(path) is not None
        assert there or site.directory(path).is_dir(), f"{path} is on neither side"


def finish(year: Year, capsys: pytest.CaptureFixture[str]) -> None:
    """The books are closed."""
    site = year.site
    events = site.events()
    intents = {event["tinker_path"] for event in events if event["event"] == "delete.intent"}
    confirmed = {event["tinker_path"] for event in events if event["event"] == "delete.confirmed"}
    assert {str(path) for path in site.sandbox.account.deleted} <= intents
    assert {str(path) for path in site.sandbox.account.deleted} <= confirmed
    lasting = [path for path in year.born if path not in year.rolling]
    assert all(site.directory(path).is_dir() or site.sandbox.account.find(path) for path in lasting)
    assert year.counts["deleted"] > len(lasting) / 4
    assert year.counts["killed"] > 20
    per_month = {name: value / 30.4 * PRICE / (DAYS / 30.4) for name, value in year.stored.items()}
    with capsys.disabled():
        print(  # noqa: T201 - the figures of the year
            f"\na year: {len(lasting)} checkpoints of {RUNS} runs and {len(year.rolling)} rolling saves; {dict(year.counts)}; "
            f"${per_month['kept']:.2f} per month instead of ${per_month['everything']:.2f}"
        )
