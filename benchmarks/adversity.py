"""What happens when things go wrong in the middle of a large archive, and what 20 GB cost in memory.

    python benchmarks/adversity.py [memory] [cut] [restart] [expiry] [change] [full] [stall] [kill] [--dir DIR] [--gigabytes N]

Runs the installed command of this interpreter's environment against the local server, everything on loopback. `full` needs
root, for a tmpfs. Prints a row for each: how it ended, how long it took, how much was sent for each byte of the archive.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from tinker_sync.sandbox import Fault, Sandbox, adapter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

COMMAND = str(Path(sys.executable).parent / "tinker-sync")
RUN = "39aa5eb2-e234-5a95-ab68-896e4cac8c45:train:0"
MB = 1_000_000
TOLD = ("transfer.resumed", "transfer.starts_over", "transfer.again", "transfer.failed", "transfer.committed")


class Server:
    """A sandbox in a thread of its own, which can be stopped and started again on the same ports."""

    def __init__(self) -> None:
        self.sandbox = Sandbox()
        self._ports = (0, 0)
        self._loop = asyncio.new_event_loop()

    def start(self) -> None:
        """Serve."""
        ready, self._stop = threading.Event(), asyncio.Event()

        async def serve() -> None:
            async with self.sandbox.running(*self._ports):
                self._ports = tuple(
                    int(url.rpartition(":")[2].partition("/")[0])
                    for url in (self.sandbox.base_url, self.sandbox.storage_url)
                )
                ready.set()
                await self._stop.wait()

        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(serve()))
        self._thread.start()
        ready.wait()

    def stop(self) -> None:
        """Serve no more."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()


@dataclass
class Scene:
    """One checkpoint on one server, and a mirror of it."""

    home: Path
    size: int
    server: Server = field(default_factory=Server)
    transfer: str = ""
    root: Path | None = None

    def __post_init__(self) -> None:
        self.made = self.sandbox.account.add(RUN, "big", payload=adapter(1, pad_to=self.size), time=datetime.now(UTC))

    @property
    def sandbox(self) -> Sandbox:
        """The server's."""
        return self.server.sandbox

    def start(self) -> subprocess.Popen[str]:
        """The command, with its log on a pipe."""
        (self.home / "key").write_text(self.sandbox.key)
        config = self.home / "config.toml"
        config.write_text(
            f'[tinker]\nbase_url = "{self.sandbox.base_url}"\napi_key_file = "{self.home / "key"}"\n'
            f'[mirror]\nroot = "{self.root or self.home / "mirror"}"\nmin_free = "0"\n'
            f"[transfer]\n{self.transfer}\n"
        )
        arguments = [COMMAND, "--config", str(config), "--log-format", "json", "sync", "--json"]
        return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def finish(self, name: str, running: subprocess.Popen[str], begun: float, *, size: int | None = None) -> bool:
        """Wait for its end and tell about it; whether it copied the checkpoint, byte for byte."""
        out, log = running.communicate(timeout=900)
        seconds = time.monotonic() - begun
        events = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
        told = [event["event"].partition(".")[2] for event in events if event["event"] in TOLD]
        notes = {event.get("reason") or event.get("error") for event in events if event["event"] in TOLD} - {None}
        result = json.loads(out)
        copied = str(self.made.path) in result.get("transferred", ())
        whole = self._is_right() if copied else None
        sent = self.sandbox.sent_bytes / (size or self.size)
        print(
            f"{name:10} exit {running.returncode}, {seconds:5.1f} s, sent {sent:.3f} of the archive in "
            f"{len(self.sandbox.storage_requests)} requests; {', '.join(told)}; bytes right: {whole}"
        )
        for note in sorted(notes):
            print(f"{'':10} {note}")
        return copied

    def _is_right(self) -> bool:
        wanted = {file.name: file for file in self.made.payload.files}
        directory = (self.root or self.home / "mirror") / RUN / "weights" / "big"
        for name, file in wanted.items():
            with (directory / name).open("rb") as found:
                if any(found.read(len(chunk)) != chunk for chunk in file.chunks()) or found.read(1):
                    return False
        return True

    def when_sent(self, size: int, do: Callable[[], object]) -> None:
        """Do something once the storage has sent so much."""

        def wait() -> None:
            deadline = time.monotonic() + 600
            while self.sandbox.sent_bytes < size and time.monotonic() < deadline:
                time.sleep(0.01)
            do()

        threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def scene(below: Path, size: int, transfer: str = "") -> Iterator[Scene]:
    """A server that runs, and a place for the mirror."""
    with tempfile.TemporaryDirectory(dir=below) as text:
        made = Scene(Path(text), size, transfer=transfer)
        made.server.start()
        try:
            yield made
        finally:
            made.server.stop()


def run(name: str, made: Scene) -> bool:
    """One pass."""
    begun = time.monotonic()
    return made.finish(name, made.start(), begun)


def cut(below: Path) -> None:
    """Every answer is cut after 1 MB."""
    with scene(below, 500 * MB) as made:
        made.sandbox.faults.append(Fault("storage", "cut", at=MB))
        run("cut", made)


def restart(below: Path) -> None:
    """The whole server is gone for three seconds, at a third and at two thirds."""
    with scene(below, 900 * MB) as made:

        def again() -> None:
            made.server.stop()
            time.sleep(3)
            made.server.start()

        made.when_sent(300 * MB, again)
        made.when_sent(600 * MB, again)
        run("restart", made)


def expiry(below: Path) -> None:
    """Signed URLs live for ten seconds, the transfer takes fifty."""
    with scene(below, 600 * MB, 'bandwidth = "12MB"') as made:
        made.sandbox.quirks.url_life = 10
        run("expiry", made)
        signed = sum(1 for _, raw in made.sandbox.requests if raw.endswith("/archive"))
        print(f"{'':10} signed {signed} times")


def change(below: Path) -> None:
    """Another object under the same path, at half."""
    with scene(below, 500 * MB) as made:

        def replace() -> None:
            made.made.payload, made.made.time = adapter(2, pad_to=made.size), datetime.now(UTC)

        made.when_sent(250 * MB, replace)
        run("change", made)
        run("(then)", made)


def full(below: Path) -> None:
    """A tmpfs of 600 MB for 1 GB; one that somebody else fills at 60 %."""
    if os.geteuid() != 0:
        print("full       skipped: a tmpfs needs root")
        return
    for name, room, other in (("full", 600, 0), ("filled", 1200, 600)):
        with scene(below, 1000 * MB) as made, _tmpfs(made.home / "disk", room) as disk:
            made.root = disk / "mirror"
            small = made.sandbox.account.add(RUN, "small", payload=adapter(3))
            if other:
                made.when_sent(500 * MB, lambda disk=disk, other=other: _fill(disk / "other", other))
            run(name, made)
            left = sum(file.stat().st_size for file in (made.root / ".tinker-sync" / "staging").rglob("*"))
            here = (made.root / RUN / "weights" / small.path.name).is_dir()
            print(f"{'':10} the small one beside it is here: {here}; bytes left in staging: {left:,}")


@contextlib.contextmanager
def _tmpfs(path: Path, megabytes: int) -> Iterator[Path]:
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def _fill(path: Path, megabytes: int) -> None:
    with contextlib.suppress(OSError), path.open("wb") as file:
        for _ in range(megabytes):
            file.write(bytes(MB))


def stall(below: Path) -> None:
    """All connections stall at 40 %, for twenty seconds; a silence of four seconds is a stall."""
    with scene(below, 500 * MB, 'stall_timeout = "4s"') as made:

        def stop() -> None:
            made.sandbox.faults.append(Fault("storage", "stall", seconds=600))
            time.sleep(20)
            made.sandbox.faults.clear()

        made.when_sent(200 * MB, stop)
        run("stall", made)
        made.sandbox.faults.clear()
        run("(then)", made)


def kill(below: Path) -> None:
    """`kill -9` at 60 %, then another pass."""
    with scene(below, 1000 * MB) as made:
        running = made.start()
        while made.sandbox.sent_bytes < 600 * MB:
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
        running.communicate()
        before, made.sandbox.sent_bytes = made.sandbox.sent_bytes, 0
        run("kill", made)
        print(f"{'':10} sent before the kill: {before / made.size:.3f}")


def memory(below: Path, gigabytes: int = 20) -> None:
    """RSS over time while a large archive comes, and whether the host's page cache keeps what it held."""
    hot = below / "hot"
    with contextlib.suppress(OSError), hot.open("wb") as file:
        for _ in range(1000):
            file.write(os.urandom(MB))
    cached = _resident(hot)
    with scene(below, gigabytes * 1000 * MB) as made:
        begun, rows, peak = time.monotonic(), [], 0.0
        running = made.start()
        while running.poll() is None:
            rss = _rss(running.pid)
            peak = max(peak, rss)
            rows.append((time.monotonic() - begun, made.sandbox.sent_bytes / 1e9, rss, _cached()))
            time.sleep(1)
        kept = _resident(hot)  # before the bytes are compared, which reads all of them
        for row in rows[:: max(1, len(rows) // 16)]:
            print("memory     {:6.1f} s  {:6.2f} GB sent  RSS {:5.1f} MB  page cache {:6.0f} MB".format(*row))
        made.finish("memory", running, begun)
        print(f"{'':10} peak RSS {peak:.1f} MB; of a file of 1 GB in the page cache before: {cached}, after: {kept}")
    hot.unlink()


def _rss(pid: int) -> float:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) * 1024 / MB
    return 0.0


def _cached() -> float:
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["Cached"].split()[0]) * 1024 / MB


def _resident(path: Path) -> str:
    program = shutil.which("fincore")
    if program is None:
        return "unknown (no fincore)"
    found = subprocess.run(
        [program, "--bytes", "--noheadings", "--output", "RES", str(path)], check=True, capture_output=True
    )
    return f"{int(found.stdout) / MB:,.0f} MB"


SCENES = {
    "memory": memory,
    "cut": cut,
    "restart": restart,
    "expiry": expiry,
    "change": change,
    "full": full,
    "stall": stall,
    "kill": kill,
}


def main() -> None:
    """All of them, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenes", nargs="*", metavar="SCENE", help=", ".join(SCENES))
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--gigabytes", type=int, default=20, help="of the archive in `memory`")
    options = parser.parse_args()
    unknown = set(options.scenes) - set(SCENES)
    if unknown:
        parser.error(f"no such scene: {', '.join(sorted(unknown))}; there are {', '.join(SCENES)}")
    for name in options.scenes or SCENES:
        if name == "memory":
            memory(options.dir, options.gigabytes)
        else:
            SCENES[name](options.dir)


if __name__ == "__main__":
    main()
