"""Transfers beside the programs that one would use otherwise: the same bytes, from the same server, onto the same disk.

    python benchmarks/transfer.py [case …] [--rounds N] [--scale F] [--dir DIR] [--tinker-cli PATH] [--json FILE]

Every contender does the whole job: download, extract, SHA-256 of every file, all of it synced to the disk. What it left is
compared with what was served, names, sizes and digests, before its time counts. Peers are told the URLs; only tinker-sync
and the official command ask the API for them. Rounds alternate, each in another order. nginx serves with TLS on loopback,
from memory where there is enough. Cases:

    1  one archive of 2 GB, uncapped
    2  one archive of 1 GB, 40 MB/s per connection, 50 ms to the first byte
    3  48 archives of 32 MB, 40 MB/s per connection, 50 ms to the first byte
    4  1,000 archives of 64 KB, 50 ms to the first byte
    5  20 files of 100 MB of one external checkpoint, uncapped
    6  a second pass with nothing to do, 10^4 and 10^5 checkpoints known
    7  verify of 4 GB, beside sha256sum on all cores

Peak RSS is the largest single process's, and never less than the some 10 MB of what starts it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from origin import Origin, program, version
from served import Api, Piece, archives, external
from table import show

from tinker_sync.catalog.store import SqlCatalog
from tinker_sync.model.manifest import Manifest
from tinker_sync.model.paths import TinkerPath
from tinker_sync.model.work import Replica

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

COMMAND = str(Path(sys.executable).parent / "tinker-sync")
OURS = "tinker-sync"
MB = 1_000_000
AT_A_TIME = 8
"""How many transfers a peer makes at once."""
CONNECTIONS = 16
"""How many connections tinker-sync opens at most, by default."""
SAMPLE = 8
"""How many of many checkpoints the official command is asked for: one round of AT_A_TIME."""
LONGEST = 1800.0
"""Seconds after which a run has failed."""
VERDICTS = {True: "met", False: "MISSED", None: "not judged at this scale"}
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


# Who takes part


@dataclass(frozen=True, slots=True)
class Contender:
    """A program and what it is told, in shell; $OUT, $SUMS, $LIST, $ARIA, $PATHS, $CA and $CONFIG are set."""

    name: str
    needs: str
    """What must be installed."""
    archives: str = ""
    """How it does the archives on $LIST; empty when it cannot."""
    files: str = ""
    """How it does the files on $LIST."""
    sampled: bool = False
    """Whether it does only SAMPLE of many, and the rest is reckoned."""


_EACH = f"xargs -P{AT_A_TIME} -n2 sh -c '{{}}' _ < \"$LIST\""
_UNPACK = 'mkdir "$OUT/$2" && {} && cd "$OUT/$2" && sha256sum -- * >> "$SUMS"'
_HASH = f'cd "$OUT" && find . -type f -print0 | xargs -0 -n4 -P{AT_A_TIME} sha256sum >> "$SUMS"'
_CURL = 'curl -fsS --cacert "$CA" "$1"'
_RCLONE = 'rclone copyurl --config "" -q --ca-cert "$CA" "$1"'
_ARIA = (
    f"aria2c --no-conf -q -x{AT_A_TIME} -j{AT_A_TIME} -s{AT_A_TIME} -k1M --file-allocation=none "
    '--ca-certificate="$CA" -d "$OUT" -i "$ARIA"'
)
_OURS = '"$COMMAND" --config "$CONFIG" sync'
CONTENDERS = (
    Contender(OURS, COMMAND, _OURS, _OURS),
    Contender(
        "curl",
        "curl",
        _EACH.format(_UNPACK.format(f'{_CURL} | tar xf - -C "$OUT/$2"')),
        _EACH.format(f'{_CURL} -o "$OUT/$2" && sha256sum "$OUT/$2" >> "$SUMS"'),
    ),
    Contender(
        "aria2c",
        "aria2c",
        f"{_ARIA}; " + _EACH.format(_UNPACK.format('tar xf "$OUT/$2.tar" -C "$OUT/$2" && rm "$OUT/$2.tar"')),
        f"{_ARIA}; {_HASH}",
    ),
    Contender(
        "rclone",
        "rclone",
        _EACH.format(_UNPACK.format(f'{_RCLONE} --stdout | tar xf - -C "$OUT/$2"')),
        _EACH.format(f'{_RCLONE} "$OUT/$2" && sha256sum "$OUT/$2" >> "$SUMS"'),
    ),
    Contender(
        "tinker checkpoint download",
        "",
        f'xargs -P{AT_A_TIME} -n1 "$TINKER" -f json checkpoint download -o "$OUT" < "$PATHS"; {_HASH}',
        sampled=True,
    ),
)


@dataclass(frozen=True, slots=True)
class Measure:
    """What a run cost."""

    wall: float
    cpu: float
    rss: float
    """MB."""
    out: str = ""


class RunError(RuntimeError):
    """It did not do its job; the words say how."""


_WRAPPER = """
import json, resource, subprocess, sys, time
begun = time.monotonic()
done = subprocess.run(sys.argv[1:], capture_output=True, text=True, errors="replace")
wall, used = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, done.stdout, done.stderr, done.returncode]))
"""


def measured(command: Sequence[str], variables: dict[str, str]) -> Measure:
    """Run it. Raises RunError when it says so itself, or takes too long."""
    process = subprocess.Popen(
        [sys.executable, "-c", _WRAPPER, *command],
        stdout=subprocess.PIPE,
        text=True,
        env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8", **variables},
        start_new_session=True,
    )
    try:
        answer, _ = process.communicate(timeout=LONGEST)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            message = f"not done after {LONGEST:g} s"
            raise RunError(message) from None
        raise
    wall, cpu, rss, out, err, code = json.loads(answer)
    if code:
        message = f"exit code {code}: {' '.join((err or out).split())[-300:]}"
        raise RunError(message)
    return Measure(wall, cpu, rss, out)


# One job


@dataclass(slots=True)
class Job:
    """The pieces that all contenders fetch, and a place on the disk for it."""

    home: Path
    api: Api
    origin: Origin
    pieces: list[Piece]
    tinker: str | None
    lists: dict[str, str] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        """Where a run puts its files."""
        return self.home / "out"

    @property
    def size(self) -> int:
        """All bytes."""
        return sum(piece.size for piece in self.pieces)

    @property
    def requests(self) -> int:
        """GETs that the bytes take at least."""
        return sum(len(piece.urls) for piece in self.pieces)

    def prepare(self) -> None:
        """Write what the programs are told."""
        wanted = [(url, name or piece.name) for piece in self.pieces for name, url in piece.urls.items()]
        ending = "" if self.by_file else ".tar"
        (self.home / "list").write_text("".join(f"{url} {name}\n" for url, name in wanted))
        (self.home / "aria").write_text("".join(f"{url}\n  out={name}{ending}\n" for url, name in wanted))
        (self.home / "paths").write_text("".join(f"{piece.path}\n" for piece in self.pieces[:SAMPLE]))
        write_config(self.home, self.api, self.out)

    @property
    def by_file(self) -> bool:
        """Whether there is no archive."""
        return "" not in self.pieces[0].urls

    def script(self, contender: Contender) -> str:
        """What it does; empty when it cannot."""
        return contender.files if self.by_file else contender.archives

    def share(self, contender: Contender) -> float:
        """How much of the job it does."""
        return min(1.0, SAMPLE / len(self.pieces)) if contender.sampled else 1.0

    def run(self, contender: Contender) -> Measure:
        """Do it once, into nothing, and look at what came of it. Raises RunError."""
        self.clean()
        self.out.mkdir()
        for name in ("home", "tmp"):
            (self.home / name).mkdir(exist_ok=True)
        try:
            done = measured(["sh", "-c", f'{{ {self.script(contender)}; }} && sync -f "$OUT"'], self._variables())
            pieces = self.pieces[:SAMPLE] if contender.sampled else self.pieces
            check(self.out, pieces, _by_manifests if contender.name == OURS else _by_sums)
        finally:
            self.clean()
        share = self.share(contender)
        return Measure(done.wall / share, done.cpu / share, done.rss)

    def clean(self) -> None:
        """Take away what a run left."""
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.rmtree(self.home / "tmp", ignore_errors=True)
        (self.home / "sums").unlink(missing_ok=True)
        os.sync()

    def _variables(self) -> dict[str, str]:
        home, ca = self.home, str(self.origin.ca)
        return {
            **tells(self.api),
            "HOME": str(home / "home"),
            "TMPDIR": str(home / "tmp"),
            "OUT": str(self.out),
            "SUMS": str(home / "sums"),
            "LIST": str(home / "list"),
            "ARIA": str(home / "aria"),
            "PATHS": str(home / "paths"),
            "CONFIG": str(home / "config.toml"),
            "COMMAND": COMMAND,
            "TINKER": self.tinker or "",
            "CA": ca,
            "SSL_CERT_FILE": ca,
        }


def tells(api: Api) -> dict[str, str]:
    """Where the official command finds the API."""
    return {"TINKER_BASE_URL": api.base_url, "TINKER_API_KEY": api.key, "TINKER_TELEMETRY": "0"}


def write_config(home: Path, api: Api, root: Path) -> None:
    """A configuration with the defaults of everything that matters here."""
    (home / "key").write_text(api.key)
    (home / "config.toml").write_text(
        f'[tinker]\nbase_url = "{api.base_url}"\napi_key_file = "{home / "key"}"\n'
        f'[mirror]\nroot = "{root}"\nmin_free = "0"\n[log]\nlevel = "error"\n'
    )


def check(out: Path, pieces: Sequence[Piece], digests: Callable[[Path], Counter[str]]) -> None:
    """Raises RunError unless every file is there, of its size, and its digest was noted."""
    wanted = Counter((name, size) for piece in pieces for name, size, _ in piece.files)
    names = {name for name, _ in wanted}
    found = Counter(
        (path.name, path.stat().st_size)
        for path in out.rglob("*")
        if path.name in names and path.is_file() and not path.is_symlink() and not _through_link(path, out)
    )
    if found != wanted:
        message = f"{found.total()} files of {wanted.total()} are there, {(found & wanted).total()} of the right size"
        raise RunError(message)
    if digests(out) != Counter(digest for piece in pieces for *_, digest in piece.files):
        message = "the digests are not those of what was served"
        raise RunError(message)


def _through_link(path: Path, out: Path) -> bool:
    return any(parent.is_symlink() for parent in path.relative_to(out).parents if parent != Path())


def _by_sums(out: Path) -> Counter[str]:
    return Counter(line.split()[0] for line in (out.parent / "sums").read_text().splitlines())


def _by_manifests(out: Path) -> Counter[str]:
    manifests = [Manifest.from_bytes(path.read_bytes()) for path in out.glob("*/*/*/.tinker-sync.json")]
    return Counter(entry.sha256 for manifest in manifests for entry in manifest.files)


# Cases 1 to 5


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of job."""

    title: str
    goal: float
    """The most that tinker-sync may take of the best peer's time."""
    count: int
    size: int
    fewer: bool = False
    """Whether `--scale` takes of the count, else of the size."""
    rate: int = 0
    delay: float = 0.0
    make: Callable[[Origin, int, int], list[Piece]] = archives


CASES = {
    1: Case("one archive of 2 GB, uncapped", 0.9, 1, 2000 * MB),
    2: Case("one archive of 1 GB, 40 MB/s per connection, 50 ms", 0.5, 1, 1000 * MB, rate=40 * MB, delay=0.05),
    3: Case("48 archives of 32 MB, 40 MB/s per connection, 50 ms", 0.8, 48, 32 * MB, True, 40 * MB, 0.05),  # noqa: FBT003
    4: Case("1,000 archives of 64 KB, 50 ms", 0.8, 1000, 64_000, fewer=True, delay=0.05),
    5: Case("20 files of 100 MB, external, uncapped", 1.0, 20, 100 * MB, make=external),
}


@dataclass(slots=True)
class Row:
    """One contender's runs."""

    name: str
    size: int
    runs: list[Measure] = field(default_factory=list)
    failure: str = ""

    @property
    def wall(self) -> float:
        """The median."""
        return statistics.median(run.wall for run in self.runs)

    @property
    def cpu(self) -> float:
        """The median."""
        return statistics.median(run.cpu for run in self.runs)

    def as_json(self) -> dict[str, Any]:
        """Everything."""
        runs = [{"wall": run.wall, "cpu": run.cpu, "rss_mb": run.rss} for run in self.runs]
        return {"name": self.name, "bytes": self.size, "runs": runs, "failure": self.failure}


def transfers(number: int, options: argparse.Namespace) -> dict[str, Any]:
    """One case, all contenders, all rounds."""
    case = CASES[number]
    count = max(2, round(case.count * options.scale)) if case.fewer else case.count
    size = case.size if case.fewer else round(case.size * options.scale)
    print(f"\n## case {number}: {case.title}\n")
    with (
        Origin(rate=case.rate, delay=case.delay, room=int(count * size * 1.05)) as origin,
        Api() as api,
        place(options.dir) as home,
    ):
        pieces = case.make(origin, count, size)
        api.add(pieces)
        job = Job(home, api, origin, pieces, options.tinker_cli)
        job.prepare()
        print(f"GETs: {job.requests:,}; MB: {job.size / MB:,.1f}; rounds: {options.rounds}")
        limits(job, case)
        rows = compete(job, options)
    verdict = judge(rows, case.goal, options.scale)
    return {"case": number, "title": case.title, "rows": [row.as_json() for row in rows], **verdict}


def compete(job: Job, options: argparse.Namespace) -> list[Row]:
    """Alternate; a contender that fails once is out."""
    rows, chosen = [], []
    for contender in CONTENDERS:
        missing = absent(contender, options)
        if not job.script(contender):
            missing = "cannot do these"
        if missing:
            print(f"{contender.name}: skipped, {missing}")
            continue
        share = job.share(contender)
        name = contender.name if share == 1 else f"{contender.name} ({SAMPLE} of {len(job.pieces):,}, reckoned)"
        rows.append(Row(name, job.size))
        chosen.append(contender)
    alternate(rows, [lambda contender=contender: job.run(contender) for contender in chosen], options.rounds)
    return rows


def alternate(rows: Sequence[Row], runs: Sequence[Callable[[], Measure]], rounds: int) -> None:
    """Each once in every round, another one first each time."""
    for turn in range(rounds):
        for n in range(len(rows)):
            place = (n + turn) % len(rows)
            if rows[place].failure:
                continue
            try:
                rows[place].runs.append(runs[place]())
            except RunError as failure:
                rows[place].failure = str(failure)


def absent(contender: Contender, options: argparse.Namespace) -> str:
    """Why it cannot take part; empty when it can."""
    if contender.needs:
        return "" if shutil.which(contender.needs) else "not installed"
    if options.tinker_cli is None:
        return "no --tinker-cli"
    return "" if shutil.which(options.tinker_cli) else f"{options.tinker_cli} is no program"


def judge(rows: Sequence[Row], goal: float, scale: float) -> dict[str, Any]:
    """The table, the ratio, and whether it is good enough."""
    whole = [row for row in rows if not row.failure]
    peers = [row for row in whole if row.name != OURS]
    best = min(peers, key=lambda row: row.wall, default=None)
    cells = [
        [
            row.name,
            f"{row.wall:.2f} ({min(run.wall for run in row.runs):.2f})",
            f"{row.size / MB / row.wall:,.0f}",
            "" if best is None else f"{row.wall / best.wall:.2f}",
            f"{row.cpu / row.size * 1e9:.2f}",
            f"{max(run.rss for run in row.runs):.0f}",
        ]
        for row in whole
    ]
    show(["", "seconds (min)", "MB/s", "of best peer", "CPU s/GB", "peak RSS MB"], cells)
    for row in rows:
        if row.failure:
            print(f"{row.name}: FAILED, {row.failure}")
    ours = next((row for row in whole if row.name == OURS), None)
    if ours is None or best is None:
        print("ratio: none, nothing to compare")
        return {"ratio": None, "goal": goal, "met": None}
    ratio = ours.wall / best.wall
    met = (ratio < goal if goal == 1 else ratio <= goal) if scale == 1 else None
    sign = "<" if goal == 1 else "≤"
    print(f"ratio tinker-sync / {best.name}: {ratio:.2f}; goal {sign} {goal:.2f}: {VERDICTS[met]}")
    return {"ratio": ratio, "best": best.name, "goal": goal, "met": met}


def limits(job: Job, case: Case) -> None:
    """What the machine allows: the disk, and the caps."""
    blocks = max(1, job.size // 2**20)
    target = job.home / "dd"
    begun = time.monotonic()
    subprocess.run(
        ["dd", "if=/dev/zero", f"of={target}", "bs=1M", f"count={blocks}", "conv=fsync"],
        check=True,
        capture_output=True,
    )
    wall = time.monotonic() - begun
    target.unlink()
    os.sync()
    print(f"limit: dd of as much to this disk, with fsync: {wall:.2f} s, {blocks * 2**20 / MB / wall:,.0f} MB/s")
    for who, most in (("peers", AT_A_TIME), ("tinker-sync", CONNECTIONS)):
        if case.rate:
            seconds = job.size / (case.rate * most)
            print(f"limit: {most} connections ({who}): {most * case.rate / MB:.0f} MB/s, {seconds:.2f} s")
        if case.delay and job.requests > most:
            seconds = job.requests * case.delay / most
            print(f"limit: {most} connections ({who}): {seconds:.2f} s until the first bytes of all have come")


# Case 6


def second_pass(options: argparse.Namespace) -> dict[str, Any]:
    """A sync with nothing to do; the catalog is told that all is here, since a pass does not read it back."""
    print("\n## case 6: a second pass with nothing to do\n")
    rows, spent = [], 0.0
    for known in (10_000, 100_000):
        count = max(10, round(known * options.scale))
        with Api() as api, place(options.dir) as home:
            write_config(home, api, home / "mirror")
            command = [COMMAND, "--config", str(home / "config.toml"), "sync", "--json"]
            measured(command, {"HOME": str(home)})  # makes the root
            fill(home, api, count)
            runs = [nothing_done(command, home, count) for _ in range(options.rounds + 1)][1:]
        spent = statistics.median(run.cpu for run in runs)
        wall = statistics.median(run.wall for run in runs)
        rows.append([f"{count:,}", f"{spent:.2f}", f"{wall:.2f}", f"{max(run.rss for run in runs):.0f}"])
    show(["known", "CPU seconds", "seconds", "peak RSS MB"], rows)
    met = spent < 2 if options.scale == 1 else None
    print(f"CPU at {rows[-1][0]}: {spent:.2f} s; goal < 2 s at 100,000: {VERDICTS[met]}")
    return {"case": 6, "rows": rows, "cpu": spent, "goal": 2, "met": met}


def nothing_done(command: Sequence[str], home: Path, count: int) -> Measure:
    """One pass. Raises RunError when it did something, or did not see all `count`."""
    done = measured(command, {"HOME": str(home)})
    document = json.loads(done.out)
    if document["listed"] != count or any(document[what] for what in ("transferred", "failed", "skipped")):
        message = f"not a pass over {count:,} with nothing to do: {done.out[:300]}"
        raise RunError(message)
    return done


def fill(home: Path, api: Api, count: int) -> None:
    """An account, and a catalog that says that all of it is here."""
    now = datetime.now(UTC).replace(microsecond=0)
    pieces = [
        Piece(f"{n:06}", "training", now - timedelta(seconds=n), (("adapter_model.safetensors", 1000, ""),), {})
        for n in range(count)
    ]
    api.add(pieces)
    with SqlCatalog.open(home / "mirror" / ".tinker-sync" / "catalog.db") as catalog:
        catalog.rebuild([_replica(piece, now) for piece in pieces], [], catalog.facts())
    os.sync()


def _replica(piece: Piece, now: datetime) -> Replica:
    path = TinkerPath.parse(piece.path)
    return Replica(
        path=path,
        time=piece.time,
        size_bytes=piece.size,
        directory=path.tail,
        total_bytes=piece.size,
        files=1,
        fidelity="exact",
        source="archive",
        committed_at=piece.time,
        verified_at=now,
        manifest_sha256="0" * 64,
    )


# Case 7


def verifying(options: argparse.Namespace) -> dict[str, Any]:
    """Reading back, beside reading and hashing by what every system has, on all cores."""
    count, size = 40, round(100 * MB * options.scale)
    print("\n## case 7: verify of 40 replicas of 100 MB\n")
    with Origin(room=2 * size) as origin, Api() as api, place(options.dir) as home:
        one = archives(origin, 1, size)[0]
        pieces = [Piece(f"{n:06}", one.kind, one.time, one.files, one.urls) for n in range(count)]
        api.add(pieces)
        root = home / "mirror"
        write_config(home, api, root)
        variables = {"HOME": str(home), "SSL_CERT_FILE": str(origin.ca)}
        ours = [COMMAND, "--config", str(home / "config.toml")]
        measured([*ours, "sync"], variables)
        check(root, pieces, _by_manifests)
        os.sync()
        cores = len(os.sched_getaffinity(0))
        theirs = ["sh", "-c", f"find '{root}' -type f -print0 | xargs -0 -n1 -P{cores} sha256sum > '{home / 'sums'}'"]
        total = sum(piece.size for piece in pieces)
        verdicts = {}
        for cache in ("cold", "warm"):
            if cache == "cold" and not os.access(DROP_CACHES, os.W_OK):
                print("page cache cold: skipped, only root can drop it")
                continue
            rows = [Row(OURS, total), Row(f"sha256sum, {cores} at a time", total)]
            runs = [
                lambda cache=cache: verified([*ours, "verify", "--json"], variables, cache, count),
                lambda cache=cache: verified(theirs, variables, cache, 0),
            ]
            alternate(rows, runs, options.rounds)
            print(f"page cache {cache}; rounds: {options.rounds}")
            verdicts[cache] = {"rows": [row.as_json() for row in rows], **judge(rows, 1 / 0.9, options.scale)}
            print()
    return {"case": 7, **verdicts}


def verified(command: Sequence[str], variables: dict[str, str], cache: str, count: int) -> Measure:
    """One run. Raises RunError when not all of `count` are found well."""
    if cache == "cold":
        os.sync()
        DROP_CACHES.write_text("3\n")
    done = measured(command, variables)
    if count and json.loads(done.out)["ok"] != count:
        message = f"not all are well: {done.out[:300]}"
        raise RunError(message)
    return done


# All of it


@contextlib.contextmanager
def place(below: Path) -> Iterator[Path]:
    """A directory that is gone afterwards."""
    home = Path(tempfile.mkdtemp(prefix="transfer-", dir=below))
    try:
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


def machine(below: Path) -> dict[str, str]:
    """What it ran on."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "CPU": models[0].partition(":")[2].strip() if models else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "kernel": platform.release(),
        "python": f"{platform.python_version()} with {ssl.OPENSSL_VERSION}",
        "openssl": version("openssl", "version"),
        "nginx": version(program("nginx") or "nginx", "-v"),
        "disk": f"{filesystem(below)}, {shutil.disk_usage(below).free / 1e9:.0f} GB free",
        "tinker-sync": version(COMMAND, "--version"),
    }


def filesystem(below: Path) -> str:
    """Type and device."""
    done = subprocess.run(["df", "--output=fstype,source", str(below)], capture_output=True, text=True, check=True)
    return " on ".join(done.stdout.splitlines()[1].split())


def main() -> None:
    """All cases, or those that are named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("case", nargs="*", type=int, help="1 to 7; all of them unless named")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of sizes and counts, for a smoke test")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--tinker-cli", metavar="PATH", help="the official SDK's command")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures, also of single runs")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is taken away
    special = {6: second_pass, 7: verifying}
    wanted = options.case or [*CASES, *special]
    if not {*CASES, *special}.issuperset(wanted):
        parser.error("cases are 1 to 7")
    facts = machine(options.dir)
    for name, value in facts.items():
        print(f"{name:12} {value}")
    results = []
    for number in wanted:
        try:
            results.append(special[number](options) if number in special else transfers(number, options))
        except RuntimeError as failure:
            print(f"case {number}: FAILED, {failure}")
            results.append({"case": number, "failure": str(failure)})
        if options.json is not None:
            options.json.write_text(json.dumps({"machine": facts, "scale": options.scale, "cases": results}, indent=1))


if __name__ == "__main__":
    main()
