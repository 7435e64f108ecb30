"""What the page shows, as values: runs, marks, growth. Built from the catalog and the engine, through ports.

What is built from all checkpoints is kept until something was written; what depends on rules is worked out only for the
runs that are shown. What a page costs then depends on what it shows, and hardly on how much there is.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from tinker_sync.model.moments import rfc3339
from tinker_sync.model.work import Trouble
from tinker_sync.overview import judge, overview, take_stock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from concurrent.futures import Executor
    from datetime import datetime

    from tinker_sync.activity import Activity, Vitals
    from tinker_sync.model.checkpoint import Checkpoint
    from tinker_sync.model.paths import TinkerPath
    from tinker_sync.model.work import Failure, Replica
    from tinker_sync.overview import Stock, Surroundings
    from tinker_sync.planning import Known, Selection
    from tinker_sync.ports import Catalog, Clock, Engine
    from tinker_sync.retention import Verdict

T = TypeVar("T")

RUNS_PER_PAGE: Final = 12
MARKS_PER_RUN: Final = 40
ROWS_PER_PAGE: Final = 200
EVENTS: Final = 20
_POINTS: Final = 48
"""Of the curve of growth."""
_FRESH_FOR: Final = 2.0
"""Seconds for which what was read from the whole catalog is good, at least; longer where reading takes long."""
_WORTH: Final = 20.0
"""What took so long to read is kept for so many times as long."""
STATES: Final[Mapping[str, tuple[str, str]]] = {
    "copied": ("●", "copied"),
    "copying": ("◐", "being copied"),
    "waiting": ("○", "waiting to be copied"),
    "failing": ("✕", "failing"),
    "skipped": ("·", "not wanted, or a rolling save"),
    "gone": ("◆", "gone upstream, here only"),
    "leaving": ("▽", "to be deleted"),
}
"""State to glyph and words; the order of the legend."""


@dataclass(frozen=True, slots=True)
class ViewSettings:
    """Plain arguments of the page."""

    selection: Selection
    price_per_gb_month: float | None


@dataclass(frozen=True, slots=True)
class Mark:
    """One checkpoint of a timeline."""

    path: TinkerPath
    time: datetime
    size_bytes: int | None
    state: str
    why: tuple[str, ...]
    """The rule and its reason, for each side that has one."""

    @property
    def glyph(self) -> str:
        """How it is drawn."""
        return STATES[self.state][0]

    @property
    def words(self) -> str:
        """What the glyph means."""
        return STATES[self.state][1]


@dataclass(frozen=True, slots=True)
class Row:
    """One training run."""

    run_id: str
    first: datetime
    last: datetime
    checkpoints: int
    here: int
    bytes_here: int
    marks: tuple[Mark, ...]
    """The newest, in order of time."""

    @property
    def earlier(self) -> int:
        """Checkpoints before the first mark."""
        return self.checkpoints - len(self.marks)


@dataclass(frozen=True, slots=True)
class Growth:
    """The mirror's size over time, from the replicas that are here."""

    points: tuple[tuple[datetime, int], ...]
    """Moment and bytes until then, ascending; empty without replicas."""


@dataclass(frozen=True, slots=True)
class PageModel:
    """All that the first page needs."""

    state: Mapping[str, Any]
    rows: tuple[Row, ...]
    runs: int
    number: int
    pages: int
    growth: Growth
    savings: Mapping[str, int]
    """Bytes: `deleted` by us upstream, `due` to go."""
    events: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class RunModel:
    """All checkpoints of one run, a page of them."""

    run_id: str
    marks: tuple[Mark, ...]
    checkpoints: int
    number: int
    pages: int


@dataclass(slots=True)
class _Run:
    run_id: str
    paths: list[tuple[datetime, TinkerPath]] = field(default_factory=list)
    here: int = 0
    bytes_here: int = 0


@dataclass(frozen=True, slots=True)
class _Index:
    """Everything, grouped: runs with the newest first."""

    runs: Mapping[str, _Run]
    growth: Growth
    deleted_bytes: int


@dataclass(frozen=True, slots=True)
class _Kept:
    value: Any
    key: object
    made_at: float
    cost: float


class Views:
    """What the page, the metrics and `status.json` are made of. Reads in a thread of its own."""

    def __init__(
        self,
        *,
        catalog: Catalog,
        engine: Engine,
        activity: Activity,
        vitals: Vitals,
        clock: Clock,
        reader: Executor,
        surroundings: Callable[[], Surroundings],
        events: Callable[[int], Sequence[Mapping[str, Any]]],
        settings: ViewSettings,
    ) -> None:
        self._catalog = catalog
        self._engine = engine
        self.activity = activity
        self.vitals = vitals
        self._clock = clock
        self._reader = reader
        self._surroundings = surroundings
        self._events = events
        self._settings = settings
        self._kept: dict[str, _Kept] = {}

    def configure(self, settings: ViewSettings) -> None:
        """Other settings from now on."""
        self._settings = settings
        self._kept = {}

    # What is asked for

    def read_document(self) -> dict[str, Any]:
        """The document of `status --json`. Blocking, for any thread. Raises CatalogUnusable."""
        return self._document()

    async def document(self) -> dict[str, Any]:
        """The document of `status --json`. Raises CatalogUnusable."""
        return await self._read(self._document)

    async def state(self) -> dict[str, Any]:
        """The document of `status --json`, with what goes on now under `service`."""
        return self._with_life(await self.document())

    async def page(self, number: int) -> PageModel:
        """The first page; `number` is the page of runs, from 1."""
        document = await self.document()
        found = await self._read(partial(self._page, number))
        rows, runs, pages, number, index, events = found
        due = document["last_pass"] or {}
        return PageModel(
            state=self._with_life(document),
            rows=rows,
            runs=runs,
            number=number,
            pages=pages,
            growth=index.growth,
            savings={"deleted": index.deleted_bytes, "due": int(due.get("due_bytes") or 0)},
            events=events,
        )

    async def run(self, run_id: str, number: int) -> RunModel | None:
        """One run's checkpoints, newest first; None when there is no such run."""
        return await self._read(partial(self._run, run_id, number))

    # Reading, in the thread

    async def _read(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._reader, work)

    def _keep(self, name: str, key: object, make: Callable[[], T], *, exact: bool = False) -> T:
        """What was made before, while nothing was written since, or (not `exact`) while it is still fresh."""
        now, kept = time.monotonic(), self._kept.get(name)
        fresh = kept is not None and not exact and now - kept.made_at < max(_FRESH_FOR, _WORTH * kept.cost)
        if kept is not None and (kept.key == key or fresh):
            value: T = kept.value
            return value
        value = make()
        self._kept[name] = _Kept(value, key, now, time.monotonic() - now)
        return value

    def _document(self) -> dict[str, Any]:
        key = self._catalog.generation()
        stock: Stock = self._keep("stock", key, lambda: take_stock(self._catalog, self._settings.selection))
        document = overview(stock, self._surroundings(), now=self._clock.now())
        document["last_pass"] = self._catalog.last_pass()
        return document

    def _page(self, number: int) -> tuple[tuple[Row, ...], int, int, int, _Index, Sequence[Mapping[str, Any]]]:
        index = self._indexed()
        pages = max(1, -(-len(index.runs) // RUNS_PER_PAGE))
        number = min(max(1, number), pages)
        runs = list(index.runs.values())[(number - 1) * RUNS_PER_PAGE : number * RUNS_PER_PAGE]
        shown = {run.run_id: run.paths[-MARKS_PER_RUN:] for run in runs}
        marks = self._marks(runs, {path for paths in shown.values() for _, path in paths})
        rows = tuple(
            Row(
                run.run_id,
                run.paths[0][0],
                run.paths[-1][0],
                len(run.paths),
                run.here,
                run.bytes_here,
                tuple(marks[path] for _, path in shown[run.run_id]),
            )
            for run in runs
        )
        return rows, len(index.runs), pages, number, index, self._events(EVENTS)

    def _run(self, run_id: str, number: int) -> RunModel | None:
        run = self._indexed().runs.get(run_id)
        if run is None:
            return None
        pages = max(1, -(-len(run.paths) // ROWS_PER_PAGE))
        number = min(max(1, number), pages)
        newest_first = run.paths[::-1][(number - 1) * ROWS_PER_PAGE : number * ROWS_PER_PAGE]
        marks = self._marks([run], {path for _, path in newest_first})
        return RunModel(run_id, tuple(marks[path] for _, path in newest_first), len(run.paths), number, pages)

    def _indexed(self) -> _Index:
        rows = self._engine.rows
        return self._keep("index", (self._catalog.generation(), id(rows)), partial(self._make_index, rows))

    def _make_index(self, rows: Mapping[TinkerPath, Checkpoint]) -> _Index:
        replicas = self._catalog.known().replicas
        runs: dict[str, _Run] = {}
        for path, row in list(rows.items()):
            runs.setdefault(path.run_id, _Run(path.run_id)).paths.append((row.time, path))
        for path, replica in replicas.items():
            run = runs.setdefault(path.run_id, _Run(path.run_id))
            run.here += 1
            run.bytes_here += replica.total_bytes
            if path not in rows:
                run.paths.append((replica.time, path))
        for run in runs.values():
            run.paths.sort()
        ordered = sorted(runs.values(), key=lambda run: run.paths[-1][0], reverse=True)
        deleted = sum(
            deed.size_bytes or 0
            for deed in list(self._catalog.deeds().values())
            if deed.state in ("deleted", "confirmed")
        )
        return _Index({run.run_id: run for run in ordered}, _growth(replicas.values()), deleted)

    def _marks(self, runs: Sequence[_Run], wanted: set[TinkerPath]) -> dict[TinkerPath, Mark]:
        rows, known, now = self._engine.rows, self._catalog.known(), self._clock.now()
        names = [path for run in runs for _, path in run.paths]
        listed = {path: rows[path] for path in names if path in rows}
        replicas = {path: known.replicas[path] for path in names if path in known.replicas}
        key = (self._catalog.generation(), id(rows), tuple(run.run_id for run in runs), int(now.timestamp() / 60))
        explaining = partial(self._engine.explain, listed, replicas, now)
        verdicts: Mapping[TinkerPath, Sequence[Verdict]] = self._keep(
            f"verdicts {len(runs)}", key, explaining, exact=True
        )
        return {path: self._mark(path, listed.get(path), known, verdicts) for path in wanted}

    def _mark(
        self,
        path: TinkerPath,
        row: Checkpoint | None,
        known: Known,
        verdicts: Mapping[TinkerPath, Sequence[Verdict]],
    ) -> Mark:
        replica, failure = known.replicas.get(path), known.failures.get(path)
        if replica is not None and row is not None and not replica.identity.matches(row.identity):
            replica = None  # overwritten since
        mine = verdicts.get(path, ())
        why = [*self._why(path, row, replica, failure), *(_verdict_words(verdict) for verdict in mine)]
        state = self._state(path, row, replica, failure)
        if state in ("copied", "gone") and any(verdict.action != "keep" for verdict in mine):
            state = "leaving"
        time_of = row.time if row is not None else replica.time if replica is not None else self._clock.now()
        size = replica.total_bytes if replica is not None else row.size_bytes if row is not None else None
        return Mark(path, time_of, size, state, tuple(why))

    def _state(self, path: TinkerPath, row: Checkpoint | None, replica: Replica | None, failure: Failure | None) -> str:
        if self.activity.of(path) is not None:
            return "copying"
        if replica is not None:
            return "failing" if replica.damaged else "gone" if row is None else "copied"
        if failure is not None and failure.trouble is not Trouble.NOT_SERVED:
            return "failing"
        if failure is not None or self._engine.skipped.get(path) is not None:
            return "skipped"
        return "waiting"

    def _why(
        self, path: TinkerPath, row: Checkpoint | None, replica: Replica | None, failure: Failure | None
    ) -> Iterable[str]:
        if replica is not None and replica.damaged:
            yield f"damaged: {replica.damaged[0]}"
        if replica is None and failure is not None:
            yield f"{failure.error} (tried {failure.attempts} times, again at {_moment(failure.retry_at)})"
        elif replica is None and (reason := self._engine.skipped.get(path)) is not None:
            yield reason
        if row is not None and row.expires_at is not None:
            yield f"expires upstream at {_moment(row.expires_at)}"

    # What goes on now, on the event loop

    def _with_life(self, document: dict[str, Any]) -> dict[str, Any]:
        vitals, now = self.vitals, self._clock.now()
        level, sentence = judge(document, now=now)
        if vitals.trouble is not None:
            level, sentence = "bad", f"the service is in trouble: {vitals.trouble}"
        elif level == "well" and vitals.reload_error is not None:
            level, sentence = "bad", "a changed configuration was refused, the old one stays"
        return {
            **document,
            "level": level,
            "summary": sentence,
            "service": {
                "doing": vitals.doing,
                "started_at": rfc3339(vitals.started_at),
                "listed_at": _text(vitals.listed_at),
                "polled_at": _text(vitals.polled_at),
                "next_poll_at": _text(vitals.next_poll_at),
                "committed_at": _text(self.activity.committed_at),
                "retained_at": _text(vitals.retained_at),
                "scrubbed_at": _text(vitals.scrubbed_at),
                "credential_works": vitals.credential_works,
                "trouble": vitals.trouble,
                "reload_error": vitals.reload_error,
                "waiting_changes": list(vitals.waiting_changes),
                "waiting": self._engine.waiting,
                "bytes_per_second": round(self.activity.rate),
                "transfers": [
                    {
                        "tinker_path": str(running.path),
                        "received": running.received,
                        "expected": running.expected,
                        "bytes_per_second": round(running.rate),
                        "seconds_left": None if running.seconds_left is None else round(running.seconds_left),
                    }
                    for running in self.activity.running
                ],
            },
            "price_per_gb_month": self._settings.price_per_gb_month,
            "at": rfc3339(now),
        }


def _growth(replicas: Iterable[Replica]) -> Growth:
    """At most so many points, each at the end of its stretch of time."""
    when = sorted((replica.committed_at, replica.total_bytes) for replica in replicas)
    if not when:
        return Growth(())
    begin, end = when[0][0], when[-1][0]
    step = max((end - begin) / _POINTS, timedelta(seconds=1))
    total: Counter[int] = Counter()
    for at, size in when:
        total[int((at - begin) / step)] += size
    points, so_far = [(begin, 0)], 0
    for place in sorted(total):
        so_far += total[place]
        points.append((min(end, begin + (place + 1) * step), so_far))
    return Growth(tuple(points))


def _verdict_words(verdict: Verdict) -> str:
    side = "upstream" if verdict.side == "remote" else "here"
    action = {"keep": "kept", "delete": "to be deleted", "expire": "to be left to expire"}[verdict.action]
    policy = f" by “{verdict.policy}”" if verdict.policy else ""
    reasons = "; ".join(reason.detail for reason in verdict.reasons)
    return f"{action} {side}{policy}: {reasons}"


def _moment(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def _text(moment: datetime | None) -> str | None:
    return None if moment is None else rfc3339(moment.replace(microsecond=0))
