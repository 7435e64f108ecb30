"""Reads and writes the catalog. Blocking; flow calls it from a thread of its own.

A commit here is never the proof of anything: what counts is in the tree. So the database may lose its last writes in
a power cut (`synchronous=NORMAL`), and a broken file is answered by rebuilding it.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

from sqlalchemy import create_engine, delete, event, func, insert, select, update
from sqlalchemy.engine import URL
from sqlalchemy.exc import DatabaseError, SQLAlchemyError
from sqlalchemy.pool import StaticPool

from tinker_sync.catalog import schema
from tinker_sync.catalog.memory import Memory
from tinker_sync.errors import TinkerSyncError
from tinker_sync.model.checkpoint import Checkpoint
from tinker_sync.model.deeds import Deed, DeedKey, fold, key_of
from tinker_sync.model.moments import from_micros, parse_time, rfc3339, to_micros
from tinker_sync.model.paths import TinkerPath
from tinker_sync.model.work import Failure, Replica, Trouble
from tinker_sync.planning import Known, ServedRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
    from datetime import datetime
    from pathlib import Path
    from types import TracebackType

    from sqlalchemy import ColumnElement, Select, Table
    from sqlalchemy.engine import Connection, Engine, Row

_AT_A_TIME = 10_000
_LOST_KEPT = 1000


class CatalogUnusable(TinkerSyncError):
    """The file is no catalog of this version; `reindex` rebuilds it."""


class CatalogDamaged(CatalogUnusable):
    """The file is broken, or of another version: nothing but rebuilding helps, and loses nothing."""


class CatalogMissing(CatalogUnusable):
    """There is no catalog yet."""


class SqlCatalog:
    """A `Catalog` over SQLAlchemy Core; context manager. Thread-safe: transactions take turns on one connection."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._turn = threading.Lock()
        self._memory: Memory | None = None
        """Read at the first `known`, then kept by every write. The holder of the root's lock is the only writer, and a
        reader opens the catalog for one look."""
        self._deeds: dict[DeedKey, Deed] | None = None
        self._generation = 0
        self._all_mirrored_at: int | None = None
        """The generation in which everything that is listed was found to have a sound copy."""
        self._file: tuple[int, int] | None = None

    @classmethod
    def open(cls, path: Path, *, read_only: bool = False, network: bool = False) -> Self:
        """Open the SQLite file; a writer makes it when it is missing.

        `network` says that the filesystem cannot hold a WAL. Raises CatalogMissing, CatalogUnusable.
        """
        if read_only and not path.exists():
            message = f"no catalog at {path}: nothing was mirrored here yet, or run `tinker-sync reindex`"
            raise CatalogMissing(message)
        if read_only:
            engine = create_engine("sqlite://", poolclass=StaticPool, creator=lambda: _connect_for_reading(path))
        else:
            engine = create_engine(
                URL.create("sqlite", database=str(path)),
                poolclass=StaticPool,
                connect_args={"check_same_thread": False, "timeout": 10},
            )

        def set_up(connection: Any, _: object) -> None:
            cursor = connection.cursor()
            if read_only:
                cursor.execute("PRAGMA query_only = ON")
            else:
                cursor.execute(f"PRAGMA journal_mode = {'TRUNCATE' if network else 'WAL'}")
                cursor.execute("PRAGMA synchronous = NORMAL")
            cursor.close()

        event.listen(engine, "connect", set_up)
        catalog = cls(engine)
        try:
            catalog._check(read_only=read_only)
            if not read_only:
                path.chmod(0o600)
                found = path.stat()
                catalog._file = (found.st_dev, found.st_ino)
        except OSError as error:
            engine.dispose()
            raise _unusable(error) from error
        except CatalogUnusable:
            engine.dispose()
            raise
        return catalog

    def is_in_place(self, path: Path) -> bool:
        """Whether the file at `path` is still the one that was opened."""
        try:
            found = path.stat()
        except OSError:
            return False
        return self._file is None or (found.st_dev, found.st_ino) == self._file

    @contextmanager
    def _begin(self) -> Iterator[Connection]:
        """One transaction. Raises CatalogUnusable for everything that a database can do."""
        try:
            with self._turn, self._engine.begin() as connection:
                yield connection
        except SQLAlchemyError as error:
            raise _unusable(error) from error

    @contextmanager
    def _writing(self) -> Iterator[tuple[Connection, list[Callable[[Memory], None]]]]:
        """A transaction, and a list for what it changes in memory, which happens in the same turn."""
        changes: list[Callable[[Memory], None]] = []
        try:
            with self._turn:
                try:
                    with self._engine.begin() as connection:
                        yield connection, changes
                except BaseException:
                    self._memory = self._deeds = None  # whatever was written of it or not: it is read again
                    raise
                if changes:
                    self._generation += 1
                if self._memory is not None:
                    for change in changes:
                        change(self._memory)
        except SQLAlchemyError as error:
            raise _unusable(error) from error

    def _check(self, *, read_only: bool) -> None:
        with self._begin() as connection:
            if not read_only:
                schema.metadata.create_all(connection)
            version = _fact(connection, "schema_version")
            if version is None and not read_only:
                _set_fact(connection, "schema_version", schema.SCHEMA_VERSION)
            elif version != schema.SCHEMA_VERSION:
                message = (
                    f"the catalog has schema version {version}, this program uses {schema.SCHEMA_VERSION}: "
                    "run `tinker-sync reindex` to rebuild it from the tree"
                )
                raise CatalogDamaged(message)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine.dispose()

    def known(self) -> Known:
        """All that planning needs, read once."""
        with self._begin() as connection:
            if self._memory is None:
                present = _rows(connection, select(schema.replicas).where(~schema.replicas.c.superseded))
                failed = connection.execute(select(schema.failures))
                self._memory = Memory(map(_as_replica, present), map(_as_failure, failed), _first_expiry(connection))
            return self._memory.snapshot()

    def known_of_missing(self) -> Known:
        """What planning needs after `observe`, of what has no sound copy here; all, where that is in memory anyway.

        A command plans once: what is mirrored, which is nearly everything, then never becomes a value.
        """
        with self._begin() as connection:
            if self._memory is not None:
                return self._memory.snapshot()
            first_expiry = _first_expiry(connection, ~_copies(sound=True).exists())
            self._all_mirrored_at = None if first_expiry else self._generation
            present = _rows_of(connection, schema.replicas, list(map(str, first_expiry)))
            failed = connection.execute(select(schema.failures))
            return Known(
                {replica.path: replica for replica in map(_as_replica, present) if not replica.superseded},
                {failure.path: failure for failure in map(_as_failure, failed)},
                first_expiry,
                missing=frozenset(first_expiry),
            )

    def lacks(self, shown: Collection[TinkerPath], fraction: float) -> bool:
        """Whether more than this fraction of what the service showed last is not among these.

        Reads only until enough of it is found: half of the account, for the usual half.
        """
        with self._begin() as connection:
            if self._memory is not None:
                return self._memory.lacks(shown, fraction)
            listed = connection.execute(select(func.count()).select_from(schema.upstream)).scalar_one()
            texts, found = set(map(str, shown)), 0
            with connection.execute(select(schema.upstream.c.tinker_path)) as result:
                for rows in result.partitions(_AT_A_TIME):
                    found += sum(row[0] in texts for row in rows)
                    if listed - found <= fraction * listed:
                        return False
            return listed - found > fraction * listed

    def generation(self) -> int:
        """Another number after every change of replicas, failures, deeds or what is listed."""
        return self._generation

    def first_expiry(self) -> dict[TinkerPath, tuple[datetime, datetime | None]]:
        """Of everything that is listed: its time, and the first `expires_at` that was seen for it."""
        with self._begin() as connection:
            return _first_expiry(connection)

    def replicas(self, prefix: str = "") -> list[Replica]:
        """Every replica, superseded ones too, whose tinker path starts with `prefix`; by path, newest version first."""
        table = schema.replicas
        query = select(table).order_by(table.c.tinker_path, table.c.superseded, table.c.time.desc())
        if prefix:
            query = query.where(func.substr(table.c.tinker_path, 1, len(prefix)) == prefix)
        with self._begin() as connection:
            return [_as_replica(row) for row in connection.execute(query)]

    def verified_before(self, moment: datetime, limit: int) -> list[Replica]:
        """Replicas that nobody has read since, oldest first; what is known to be damaged is not read again."""
        table = schema.replicas
        query = (
            select(table)
            .where((table.c.verified_at < to_micros(moment)) & (table.c.damaged == "[]"))
            .order_by(table.c.verified_at)
            .limit(limit)
        )
        with self._begin() as connection:
            return [_as_replica(row) for row in connection.execute(query)]

    def has_directory(self, directory: str) -> bool:
        """Whether a replica is still known there."""
        table = schema.replicas
        with self._begin() as connection:
            query = select(func.count()).where(table.c.directory == directory)
            return connection.execute(query).scalar_one() > 0

    def counts(self) -> dict[str, int]:
        """`replicas`, `bytes`, `damaged`, `upstream`, `upstream_bytes`: small numbers, without reading rows."""
        table = schema.replicas
        with self._begin() as connection:
            number, total = connection.execute(
                select(func.count(), func.coalesce(func.sum(table.c.total_bytes), 0))
            ).one()
            damaged = connection.execute(select(func.count()).where(table.c.damaged != "[]")).scalar_one()
            size = func.coalesce(func.sum(schema.upstream.c.size_bytes), 0)
            upstream, billed = connection.execute(select(func.count(), size).select_from(schema.upstream)).one()
        return {
            "replicas": number,
            "bytes": int(total),
            "damaged": damaged,
            "upstream": upstream,
            "upstream_bytes": int(billed),
        }

    def unmirrored(self) -> list[tuple[Checkpoint, datetime | None, datetime]]:
        """What the service showed last and no replica is a copy of: the first expiry and the first sight of each."""
        if self._all_mirrored_at == self._generation:
            return []
        query = select(schema.upstream).where(~_copies().exists())
        with self._begin() as connection:
            return [
                (_as_checkpoint(row), _moment(row.first_expires_at), from_micros(row.first_seen_at))
                for row in connection.execute(query)
            ]

    def failures(self) -> list[Failure]:
        """Everything that failed and was not cured."""
        with self._begin() as connection:
            return [_as_failure(row) for row in connection.execute(select(schema.failures))]

    def listed(self) -> list[Checkpoint]:
        """What the service showed last."""
        with self._begin() as connection:
            return [_as_checkpoint(row) for row in connection.execute(select(schema.upstream))]

    def observe(
        self, checkpoints: Sequence[Checkpoint], seen_at: datetime, *, complete: bool
    ) -> tuple[Checkpoint, ...]:
        """Record what was shown; with `complete`, also what is gone, which it returns. Writes only differences."""
        table = schema.upstream
        with self._writing() as (connection, changes):
            shown = {str(checkpoint.path): checkpoint for checkpoint in checkpoints}
            fresh = dict(shown)
            differing: list[Row[Any]] = []
            gone: list[Row[Any]] = []
            whole = complete or len(shown) > _AT_A_TIME  # a page is looked up, a listing is compared
            for row in _rows(connection, select(table)) if whole else _rows_of(connection, table, list(shown)):
                checkpoint = fresh.pop(row[0], None)
                if checkpoint is not None and not _shows(row, checkpoint):
                    differing.append(row)
                elif checkpoint is None and complete:
                    gone.append(row)
            changed: dict[TinkerPath, tuple[datetime, datetime | None]] = {}
            for row in differing:
                checkpoint = shown[row.tinker_path]
                values = _upstream_row(checkpoint, seen_at)
                if row.time == values["time"]:  # the same object: it keeps what was seen of it first
                    values |= {"first_expires_at": row.first_expires_at, "first_seen_at": row.first_seen_at}
                changed[checkpoint.path] = (checkpoint.time, _moment(values["first_expires_at"]))
                connection.execute(update(table).where(table.c.tinker_path == row.tinker_path), values)
            changed |= {row.path: (row.time, row.expires_at) for row in fresh.values()}
            _insert(connection, table, [_upstream_row(checkpoint, seen_at) for checkpoint in fresh.values()])
            cured = _failures_of_nothing(connection, shown) if complete else []
            _delete(connection, schema.failures, cured)
            left = tuple(map(_as_checkpoint, gone))
            if changed or left or cured:
                changes.append(
                    lambda memory: memory.observe(changed, [row.path for row in left], map(TinkerPath.parse, cured))
                )
            if left:
                _suspect(connection, left)
                paths = [str(row.path) for row in left]
                _delete(connection, table, paths)
                _delete(connection, schema.standing, paths)
            return left

    def add_replica(self, replica: Replica) -> None:
        """A replica is there. What held its name is superseded or replaced; its failures are forgotten."""
        table = schema.replicas
        with self._writing() as (connection, changes):
            changes.append(lambda memory: memory.add_replica(replica))
            connection.execute(delete(table).where(table.c.directory == replica.directory))
            connection.execute(insert(table), _replica_row(replica))
            if not replica.superseded:
                connection.execute(delete(schema.failures).where(schema.failures.c.tinker_path == str(replica.path)))

    def replace_superseded(self, path: TinkerPath, replicas: Sequence[Replica]) -> None:
        """The superseded versions of a path are exactly these."""
        table = schema.replicas
        with self._writing() as (connection, changes):
            connection.execute(delete(table).where((table.c.tinker_path == str(path)) & table.c.superseded))
            for replica in replicas:
                changes.append(partial(Memory.add_replica, replica=replica))
                connection.execute(delete(table).where(table.c.directory == replica.directory))
            _insert(connection, table, [_replica_row(replica) for replica in replicas])

    def remove_replica(self, directory: str) -> None:
        """A replica is no longer there."""
        with self._writing() as (connection, changes):
            changes.append(lambda memory: memory.remove_replica(directory))
            connection.execute(delete(schema.replicas).where(schema.replicas.c.directory == directory))

    def mark_verified(self, directory: str, verified_at: datetime, damaged: Sequence[str]) -> None:
        """The outcome of a look at the bytes."""
        table = schema.replicas
        values: dict[str, Any] = {"damaged": json.dumps(list(damaged))}
        if not damaged:
            values["verified_at"] = to_micros(verified_at)
        with self._writing() as (connection, changes):
            changes.append(lambda memory: memory.mark_verified(directory, verified_at, damaged))
            connection.execute(update(table).where(table.c.directory == directory), values)

    def add_failure(self, failure: Failure) -> None:
        """A transfer failed."""
        table = schema.failures
        with self._writing() as (connection, changes):
            changes.append(lambda memory: memory.add_failure(failure))
            connection.execute(delete(table).where(table.c.tinker_path == str(failure.path)))
            connection.execute(insert(table), _failure_row(failure))

    def deeds(self) -> Mapping[DeedKey, Deed]:
        """What was last done to each object upstream."""
        with self._begin() as connection:
            if self._deeds is None:
                self._deeds = {deed.key: deed for deed in map(_as_deed, connection.execute(select(schema.deeds)))}
            return self._deeds

    def unsettled_deeds(self) -> list[Deed]:
        """Those of which a listing can still tell something new."""
        table = schema.deeds
        query = select(table).where(table.c.state.not_in(("confirmed", "withheld", "declined")))
        with self._begin() as connection:
            return [_as_deed(row) for row in connection.execute(query)]

    def journal_position(self) -> tuple[int, int]:
        """Up to where the journal's events are in here."""
        with self._begin() as connection:
            number, offset = _fact(connection, "journal") or (0, 0)
        return int(number), int(offset)

    def apply(self, events: Iterable[tuple[tuple[int, int], Mapping[str, Any]]]) -> None:
        """Take up what the journal tells, with the position behind each event."""
        with self._writing() as (connection, _):
            position: tuple[int, int] | None = None
            for at, event in events:
                position = at
                self._apply(connection, event)
            if position is not None:
                _set_fact(connection, "journal", list(position))

    def _apply(self, connection: Connection, event: Mapping[str, Any]) -> None:
        kind, table = event["event"], schema.deeds
        if kind == "server.types":
            _set_fact(connection, "types_apart", bool(event.get("apart")))
        elif kind == "enforcement.suspects":
            _set_fact(connection, "suspects", event.get("rows") or [])
        elif kind == "enforcement.judged":
            _set_fact(connection, "suspects", [])
        elif kind == "local.intent":
            _set_fact(connection, "moving", [event.get("tinker_path"), event.get("directory")])
        elif kind.startswith("local."):
            _set_fact(connection, "moving", None)
        try:
            path, second = key_of(event)
            where = (table.c.tinker_path == str(path)) & (table.c.second == to_micros(second))
            row = connection.execute(select(table).where(where)).one_or_none()
            before = None if row is None else _as_deed(row)
            after = fold(before, event)
        except (KeyError, ValueError, TypeError, AttributeError):
            return  # about no object; or edited, or a later version's: `history --check` tells
        if after != before:
            self._generation += 1
            connection.execute(delete(table).where(where))
            if self._deeds is not None:
                self._deeds.pop((path, second), None)
            if after is not None:
                connection.execute(insert(table), _deed_row(after))
                if self._deeds is not None:
                    self._deeds[after.key] = after

    def keep_deeds(self, deeds: Sequence[Deed]) -> int:
        """Add those of which nothing is known here; returns how many."""
        missing = [deed for deed in deeds if deed.key not in self.deeds()]
        with self._begin() as connection:
            self._deeds = None
            _insert(connection, schema.deeds, [_deed_row(deed) for deed in missing])
        return len(missing)

    def moving(self) -> tuple[TinkerPath, str] | None:
        """The replica that was on its way into or out of the trash when the process died."""
        with self._begin() as connection:
            found = _fact(connection, "moving")
        return None if not found else (TinkerPath.parse(found[0]), str(found[1]))

    def suspects(self) -> tuple[Checkpoint, ...]:
        """What went from runs that we deleted in, and was not judged yet."""
        with self._begin() as connection:
            found = _fact(connection, "suspects") or []
        return tuple(
            Checkpoint(TinkerPath.parse(path), parse_time(time), size, expires_at=_parsed(expires_at))
            for path, time, size, expires_at in found
        )

    def types_apart(self) -> bool | None:
        """Whether the server was found to keep types apart; None when nobody knows."""
        with self._begin() as connection:
            found = _fact(connection, "types_apart")
        return found if isinstance(found, bool) else None

    def standing(self) -> dict[TinkerPath, tuple[datetime, datetime]]:
        """Of everything that may go upstream: the object's time, and since when the verdict has stood."""
        with self._begin() as connection:
            rows = connection.execute(select(schema.standing))
            return {TinkerPath.parse(row.tinker_path): (from_micros(row.time), from_micros(row.since)) for row in rows}

    def stand(self, going: Mapping[TinkerPath, datetime], now: datetime) -> dict[TinkerPath, datetime]:
        """These may go (path and the object's time), and nothing else; returns since when. Writes only differences."""
        before = self.standing()
        table = schema.standing
        since = {
            path: before[path][1] if path in before and before[path][0] == time else now for path, time in going.items()
        }
        over = [str(path) for path in before if path not in going]
        new = [path for path in going if path not in before or before[path] != (going[path], since[path])]
        if over or new:
            with self._begin() as connection:
                _delete(connection, table, [*over, *map(str, new)])
                rows = [
                    {"tinker_path": str(path), "time": to_micros(going[path]), "since": to_micros(since[path])}
                    for path in new
                ]
                _insert(connection, table, rows)
        return since

    def other_bytes(self) -> int:
        """What superseded versions weigh."""
        table = schema.replicas
        with self._begin() as connection:
            query = select(func.coalesce(func.sum(table.c.total_bytes), 0)).where(table.c.superseded)
            return int(connection.execute(query).scalar_one())

    def bind(self, root_id: str) -> bool:
        """Tie the catalog to a root; False when it is another root's already."""
        with self._begin() as connection:
            known = _fact(connection, "root_id")
            if known is None:
                _set_fact(connection, "root_id", root_id)
        return known in (None, root_id)

    def served(self) -> ServedRecord:
        """What was learnt about whether this server hands out archives."""
        with self._begin() as connection:
            document = _fact(connection, "served")
        if not isinstance(document, dict):
            return ServedRecord()
        return ServedRecord(
            refused={path: parse_time(when) for path, when in document["refused"].items()},
            last_success=_parsed(document["last_success"]),
            last_probe=_parsed(document["last_probe"]),
        )

    def save_served(self, record: ServedRecord) -> None:
        """Keep it."""
        document = {
            "refused": {path: rfc3339(when) for path, when in record.refused.items()},
            "last_success": None if record.last_success is None else rfc3339(record.last_success),
            "last_probe": None if record.last_probe is None else rfc3339(record.last_probe),
        }
        with self._begin() as connection:
            _set_fact(connection, "served", document)

    def save_pass(self, summary: Mapping[str, object]) -> None:
        """Keep the summary of the last pass, for `status`."""
        with self._begin() as connection:
            _set_fact(connection, "last_pass", dict(summary))

    def last_pass(self) -> dict[str, Any] | None:
        """The summary of the last pass, or None."""
        with self._begin() as connection:
            document = _fact(connection, "last_pass")
        return document if isinstance(document, dict) else None

    def add_lost(self, lost: Sequence[tuple[TinkerPath, datetime]]) -> None:
        """These ended upstream, then, before they were copied."""
        with self._begin() as connection:
            before = _fact(connection, "lost") or []
            _set_fact(connection, "lost", [*before, *([str(path), rfc3339(at)] for path, at in lost)][-_LOST_KEPT:])
            self._generation += 1

    def lost(self) -> list[tuple[TinkerPath, datetime]]:
        """What ended so, the last of it; not what was copied in the end."""
        table = schema.replicas
        with self._begin() as connection:
            found = [(str(path), parse_time(at)) for path, at in _fact(connection, "lost") or []]
            query = select(table.c.tinker_path).where(table.c.tinker_path.in_([path for path, _ in found]))
            here = set(connection.execute(query).scalars()) if found else set()
            return [(TinkerPath.parse(path), at) for path, at in found if path not in here]

    def told(self) -> dict[str, Any]:
        """What people were told of, as JSON."""
        with self._begin() as connection:
            document = _fact(connection, "told")
        return document if isinstance(document, dict) else {}

    def save_told(self, told: Mapping[str, Any]) -> None:
        """Keep it."""
        with self._begin() as connection:
            _set_fact(connection, "told", dict(told))

    def facts(self) -> dict[str, Any]:
        """What only the catalog knows: the last pass, what was learnt about the server."""
        with self._begin() as connection:
            return {row.name: json.loads(row.value) for row in connection.execute(select(schema.facts))}

    def rebuild(
        self, replicas: Sequence[Replica], quarantined: Iterable[Failure], kept: Mapping[str, Any] | None = None
    ) -> None:
        """Forget everything and take this for the truth: what `reindex` found in the tree.

        `kept` are the facts of the catalog before, where they could be read.
        """
        with self._begin() as connection:
            self._memory = self._deeds = self._all_mirrored_at = None
            here = {str(replica.path): replica for replica in replicas if not replica.superseded}
            failed: dict[TinkerPath, Failure] = {}
            for failure in sorted(quarantined, key=lambda failure: failure.failed_at):
                copy = here.get(str(failure.path))
                if copy is None or not copy.identity.matches(failure.identity):
                    failed[failure.path] = failure
            schema.metadata.drop_all(connection)
            schema.metadata.create_all(connection)
            _set_fact(connection, "schema_version", schema.SCHEMA_VERSION)
            for name, value in (kept or {}).items():
                if name not in ("schema_version", "journal", "suspects", "moving"):
                    _set_fact(connection, name, value)
            _insert(connection, schema.replicas, [_replica_row(replica) for replica in replicas])
            _insert(connection, schema.failures, [_failure_row(failure) for failure in failed.values()])


def _connect_for_reading(path: Path) -> sqlite3.Connection:
    """Read-only, also where nothing can be written: a WAL wants its side files, an unchanging file does not."""
    for options in ("mode=ro", "mode=ro&immutable=1"):
        connection = sqlite3.connect(
            f"file:{quote(str(path))}?{options}", uri=True, check_same_thread=False, timeout=10
        )
        try:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.OperationalError:
            connection.close()
            if "immutable" in options:
                raise
        else:
            break
    return connection


def remove_catalog(path: Path) -> None:
    """Delete the file and its side files, so that a new one can be made. Raises OSError."""
    for suffix in ("", "-wal", "-shm", "-journal"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _unusable(error: Exception) -> CatalogUnusable:
    """Broken is something else than unwritable: only a broken catalog may be thrown away."""
    reason = error.orig if isinstance(error, DatabaseError) else error
    if getattr(reason, "sqlite_errorname", "").startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return CatalogDamaged(f"the catalog is damaged ({reason}): `tinker-sync reindex` rebuilds it from the tree")
    return CatalogUnusable(f"the catalog cannot be used ({reason}): look at space and permissions in [mirror] state")


def _copies(*, sound: bool = False) -> Select[Any]:
    """The replicas that are copies of a row of `upstream`, for a subquery; with `sound`, those not known to be damaged."""
    up, here = schema.upstream, schema.replicas
    query = select(here.c.directory).where(
        (here.c.tinker_path == up.c.tinker_path)
        & ~here.c.superseded
        & (here.c.time // 1_000_000 == up.c.time // 1_000_000)
        & (here.c.size_bytes.is_(None) | up.c.size_bytes.is_(None) | (here.c.size_bytes == up.c.size_bytes))
    )
    return query.where(here.c.damaged == "[]") if sound else query


def _first_expiry(
    connection: Connection, wanted: ColumnElement[bool] | None = None
) -> dict[TinkerPath, tuple[datetime, datetime | None]]:
    table = schema.upstream
    query = select(table.c.tinker_path, table.c.time, table.c.first_expires_at)
    rows = _rows(connection, query if wanted is None else query.where(wanted))
    return {TinkerPath.parse(path): (from_micros(time), _moment(expires)) for path, time, expires in rows}


def _rows(connection: Connection, query: Select[Any]) -> Iterator[Any]:
    """What a query gives, thousands of rows at a time: one by one each costs twice as much."""
    for rows in connection.execute(query).partitions(_AT_A_TIME):
        yield from rows


def _rows_of(connection: Connection, table: Table, paths: Sequence[str]) -> Iterator[Any]:
    """The rows of these tinker paths."""
    for start in range(0, len(paths), 500):
        yield from connection.execute(select(table).where(table.c.tinker_path.in_(paths[start : start + 500])))


def _insert(connection: Connection, table: Any, rows: list[dict[str, Any]]) -> None:
    for start in range(0, len(rows), _AT_A_TIME):
        connection.execute(insert(table), rows[start : start + _AT_A_TIME])


def _delete(connection: Connection, table: Any, paths: list[str]) -> None:
    for start in range(0, len(paths), 500):
        connection.execute(delete(table).where(table.c.tinker_path.in_(paths[start : start + 500])))


def _suspect(connection: Connection, gone: Sequence[Checkpoint]) -> None:
    """Set aside what went from runs with deletes that are not settled, in the transaction that forgets it."""
    table = schema.deeds
    query = select(table.c.tinker_path).where(table.c.state.in_(("deleting", "deleted")))
    runs = {TinkerPath.parse(path).run_id for path in connection.execute(query).scalars()}
    if not runs:
        return
    found = [
        [str(row.path), rfc3339(row.time), row.size_bytes, None if row.expires_at is None else rfc3339(row.expires_at)]
        for row in gone
        if row.path.run_id in runs
    ]
    if found:
        _set_fact(connection, "suspects", [*(_fact(connection, "suspects") or []), *found])


def _failures_of_nothing(connection: Connection, shown: Container[str]) -> list[str]:
    """Failures of what is no longer listed; not the quarantined, whose bytes here may be the only ones that are left."""
    table = schema.failures
    query = select(table.c.tinker_path).where(table.c.trouble != Trouble.QUARANTINED.value)
    return [path for path in connection.execute(query).scalars() if path not in shown]


def _fact(connection: Connection, name: str) -> Any:
    table = schema.facts
    text = connection.execute(select(table.c.value).where(table.c.name == name)).scalar_one_or_none()
    return None if text is None else json.loads(text)


def _set_fact(connection: Connection, name: str, value: object) -> None:
    table = schema.facts
    connection.execute(delete(table).where(table.c.name == name))
    connection.execute(insert(table), {"name": name, "value": json.dumps(value)})


def _moment(micros: int | None) -> datetime | None:
    return None if micros is None else from_micros(micros)


def _parsed(text: str | None) -> datetime | None:
    return None if text is None else parse_time(text)


def _micros(moment: datetime | None) -> int | None:
    return None if moment is None else to_micros(moment)


def _as_text(metadata: Mapping[str, str] | None) -> str | None:
    return None if metadata is None else json.dumps(dict(metadata), sort_keys=True)


def _as_metadata(text: str | None) -> dict[str, str] | None:
    return None if text is None else json.loads(text)


def _upstream_row(checkpoint: Checkpoint, seen_at: datetime) -> dict[str, Any]:
    """As it is written when it is seen for the first time."""
    expires_at = _micros(checkpoint.expires_at)
    return {
        "tinker_path": str(checkpoint.path),
        "time": to_micros(checkpoint.time),
        "size_bytes": checkpoint.size_bytes,
        "public": checkpoint.public,
        "expires_at": expires_at,
        "first_expires_at": expires_at,
        "user_metadata": _as_text(checkpoint.user_metadata),
        "listed_id": checkpoint.listed_id,
        "first_seen_at": to_micros(seen_at),
    }


def _shows(row: Any, checkpoint: Checkpoint) -> bool:
    """Whether a row of `upstream` is what is shown now."""
    _, time, size_bytes, public, expires_at, _, user_metadata, listed_id, _ = row
    return (
        size_bytes == checkpoint.size_bytes
        and public == checkpoint.public
        and listed_id == checkpoint.listed_id
        and time == to_micros(checkpoint.time)
        and expires_at == _micros(checkpoint.expires_at)
        and _as_metadata(user_metadata) == checkpoint.user_metadata
    )


def _as_checkpoint(row: Any) -> Checkpoint:
    tinker_path, time, size_bytes, public, expires_at, _, user_metadata, listed_id, _ = row
    return Checkpoint(
        TinkerPath.parse(tinker_path),
        from_micros(time),
        size_bytes,
        public,
        _as_metadata(user_metadata),
        _moment(expires_at),
        listed_id,
    )


def _replica_row(replica: Replica) -> dict[str, Any]:
    return {
        "directory": replica.directory,
        "tinker_path": str(replica.path),
        "time": to_micros(replica.time),
        "size_bytes": replica.size_bytes,
        "total_bytes": replica.total_bytes,
        "files": replica.files,
        "fidelity": replica.fidelity,
        "source": replica.source,
        "committed_at": to_micros(replica.committed_at),
        "verified_at": to_micros(replica.verified_at),
        "manifest_sha256": replica.manifest_sha256,
        "expires_at": _micros(replica.expires_at),
        "first_expires_at": _micros(replica.first_expires_at),
        "superseded": replica.superseded,
        "user_metadata": _as_text(replica.user_metadata),
        "damaged": json.dumps(list(replica.damaged)),
    }


def _as_replica(row: Any) -> Replica:
    """By place, in the table's order: by name it costs three times as much, and there is a row for each checkpoint."""
    (
        directory,
        tinker_path,
        time,
        size_bytes,
        total_bytes,
        files,
        fidelity,
        source,
        committed_at,
        verified_at,
        manifest_sha256,
        expires_at,
        first_expires_at,
        superseded,
        user_metadata,
        damaged,
    ) = row
    return Replica(
        path=TinkerPath.parse(tinker_path),
        time=from_micros(time),
        size_bytes=size_bytes,
        directory=directory,
        total_bytes=total_bytes,
        files=files,
        fidelity=fidelity,
        source=source,
        committed_at=from_micros(committed_at),
        verified_at=from_micros(verified_at),
        manifest_sha256=manifest_sha256,
        expires_at=_moment(expires_at),
        first_expires_at=_moment(first_expires_at),
        superseded=superseded,
        user_metadata=_as_metadata(user_metadata),
        damaged=tuple(json.loads(damaged)) if damaged != "[]" else (),
    )


def _deed_row(deed: Deed) -> dict[str, Any]:
    return {
        "tinker_path": str(deed.path),
        "second": to_micros(deed.key[1]),
        "time": to_micros(deed.time),
        "size_bytes": deed.size_bytes,
        "state": deed.state,
        "action": deed.action,
        "at": to_micros(deed.at),
        "retry_at": _micros(deed.retry_at),
        "former_expires_at": _micros(deed.former_expires_at),
        "ends_at": _micros(deed.ends_at),
        "detail": deed.detail,
    }


def _as_deed(row: Row[Any]) -> Deed:
    return Deed(
        path=TinkerPath.parse(row.tinker_path),
        time=from_micros(row.time),
        size_bytes=row.size_bytes,
        state=row.state,
        action=row.action,
        at=from_micros(row.at),
        retry_at=_moment(row.retry_at),
        former_expires_at=_moment(row.former_expires_at),
        ends_at=_moment(row.ends_at),
        detail=row.detail,
    )


def _failure_row(failure: Failure) -> dict[str, Any]:
    return {
        "tinker_path": str(failure.path),
        "time": to_micros(failure.time),
        "size_bytes": failure.size_bytes,
        "trouble": failure.trouble.value,
        "attempts": failure.attempts,
        "error": failure.error,
        "failed_at": to_micros(failure.failed_at),
        "retry_at": to_micros(failure.retry_at),
        "defects": json.dumps(list(failure.defects)),
        "quarantine": failure.quarantine,
    }


def _as_failure(row: Row[Any]) -> Failure:
    return Failure(
        path=TinkerPath.parse(row.tinker_path),
        time=from_micros(row.time),
        size_bytes=row.size_bytes,
        trouble=Trouble(row.trouble),
        attempts=row.attempts,
        error=row.error,
        failed_at=from_micros(row.failed_at),
        retry_at=from_micros(row.retry_at),
        defects=tuple(json.loads(row.defects)),
        quarantine=row.quarantine,
    )
