"""The service at rest and at work: latency from appearance to commit, CPU of an idle hour, memory by size of the account.

    python benchmarks/service.py [latency] [idle]

Runs against the bundled local server. For `idle` the catalog is filled with replicas that are not on the disk, since nothing
reads them; an idle hour is put together from what is measured: a poll by one page, a full listing, and the loops between.
"""

from __future__ import annotations

import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path

from mirror import COMMAND, serving

from tinker_sync.catalog.store import SqlCatalog
from tinker_sync.model.work import Replica
from tinker_sync.sandbox import Sandbox, adapter


class Service:
    """`tinker-sync run`, and what it costs."""

    def __init__(self, home: Path, sandbox: Sandbox, extra: str) -> None:
        (home / "key").write_text(sandbox.key)
        (home / "config.toml").write_text(
            f'[status]\nlisten = "127.0.0.1:0"\n[tinker]\nbase_url = "{sandbox.base_url}"\napi_key_file = "{home / "key"}"\n'
            f'[mirror]\nroot = "{home / "mirror"}"\nmin_free = "0"\n{extra}'
        )
        self.log = (home / "log").open("w+")
        self.process = subprocess.Popen(
            [COMMAND, "--log-format", "json", "--config", str(home / "config.toml"), "run"],
            stdout=self.log,
            stderr=self.log,
        )
        self.url = ""
        while not self.url:
            time.sleep(0.05)
            found = re.search(r'"url": "(http://[^"]+)"', (home / "log").read_text())
            self.url = found.group(1) if found else ""

    def cpu(self) -> float:
        """Seconds so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss(self) -> float:
        """MB."""
        return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())[1]) / 1024  # type: ignore[index]

    def metric(self, name: str) -> float:
        """One value."""
        text = urllib.request.urlopen(self.url + "metrics", timeout=60).read().decode()
        found = re.search(rf"^{re.escape(name)} (\S+)", text, re.MULTILINE)
        return float(found.group(1)) if found else 0.0

    def page(self) -> float:
        """Seconds for the page."""
        begun = time.monotonic()
        urllib.request.urlopen(self.url, timeout=60).read()
        return time.monotonic() - begun

    def end(self) -> None:
        """In peace."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(30) == 0
        self.log.close()


def latency(count: int = 60) -> None:
    """From appearance to the final directory, at 1 s polls; 64 KB and 20 MB."""
    chance = random.Random(1)
    for size in (64_000, 20_000_000):
        with serving() as sandbox, tempfile.TemporaryDirectory() as text:
            service = Service(Path(text), sandbox, '[poll]\ninterval = "1s"\n')
            time.sleep(2)
            waits = []
            for n in range(count):
                path = sandbox.account.add("run:train:0", f"{n:06}", payload=adapter(n, pad_to=size)).path
                begun, final = time.monotonic(), Path(text) / "mirror" / path.tail
                while not final.exists():
                    time.sleep(0.005)
                waits.append(time.monotonic() - begun)
                time.sleep(chance.uniform(0, 1))
            service.end()
            waits.sort()
            print(
                f"latency      {count} of {size / 1e6:g} MB at 1 s polls: median {waits[count // 2]:.2f} s, "
                f"p95 {waits[int(count * 0.95)]:.2f} s, most {waits[-1]:.2f} s"
            )


def fill(home: Path, sandbox: Sandbox, count: int) -> None:
    """An account, and a catalog that says that all of it is here."""
    payload, now = adapter(1, hidden=2, layers=1, rank=1), datetime.now(UTC)
    replicas = []
    for n in range(count):
        made = sandbox.account.add(
            f"run-{n // 200}:train:0", f"{n:06}", payload=payload, time=now - timedelta(seconds=n)
        )
        replicas.append(
            Replica(
                path=made.path,
                time=made.time,
                size_bytes=made.size_bytes,
                directory=made.path.tail,
                total_bytes=made.size_bytes or 0,
                files=3,
                fidelity="exact",
                source="archive",
                committed_at=made.time,
                verified_at=now,
                manifest_sha256="0" * 64,
            )
        )
    with SqlCatalog.open(home / "mirror" / ".tinker-sync" / "catalog.db") as catalog:
        catalog.rebuild(replicas, [], catalog.facts())


def idle() -> None:
    """CPU and memory with 100, 10,000 and 100,000 known."""
    for count in (100, 10_000, 100_000):
        with serving() as sandbox, tempfile.TemporaryDirectory() as text:
            home = Path(text)
            Service(home, sandbox, "").end()  # makes the root
            fill(home, sandbox, count)
            service = Service(home, sandbox, '[poll]\ninterval = "600s"\nfull_interval = "900s"\n')
            while not service.metric('tinker_sync_last_success_timestamp_seconds{work="retention"}'):
                time.sleep(0.2)
            assert service.metric("tinker_sync_pending_checkpoints") == 0
            time.sleep(3)
            before = service.cpu()
            time.sleep(30)
            resting = (service.cpu() - before) / 30
            config = home / "config.toml"
            config.write_text(config.read_text() + "# touched\n")  # a reload lists in full
            at = service.metric('tinker_sync_last_success_timestamp_seconds{work="listing"}')
            before = service.cpu()
            while service.metric('tinker_sync_last_success_timestamp_seconds{work="listing"}') == at:
                time.sleep(0.5)
            time.sleep(5)
            full = service.cpu() - before - 5 * resting
            rss = service.rss()
            config.write_text(config.read_text().replace('interval = "600s"', 'interval = "1s"'))
            time.sleep(20)  # the reload, and its listing
            requests = len(sandbox.requests)
            before = service.cpu()
            time.sleep(30)
            polls = max(1, len(sandbox.requests) - requests)
            peek = (service.cpu() - before - 30 * resting) / polls
            first, again = service.page(), service.page()
            hour = 3600 * resting + 4 * full + 56 * peek if count > 5000 else 3600 * resting + 60 * full
            print(
                f"idle         {count:>7,} known: RSS {rss:.0f} MB (with the page {service.rss():.0f}), loops {1000 * resting:.1f} ms/s, "
                f"full listing {full:.2f} s CPU, poll by one page {1000 * peek:.1f} ms CPU and 1 request; "
                f"an hour at 60 s polls {hour:.0f} s CPU; page {first:.2f} s, again {again:.2f} s"
            )
            service.end()


if __name__ == "__main__":
    print(f"machine      {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    for name in sys.argv[1:] or ["latency", "idle"]:
        {"latency": latency, "idle": idle}[name]()
