"""The tree on a local filesystem.

**Commit**: fsync each file, the manifest, each nested directory and the stage; one rename; fsync the parent and every
ancestor just created. Nothing half-made ever bears a final name. A stage that holds a manifest is whole: if its process
died before the rename, the next start finishes it.

It refuses to write outside the root, to overwrite a replica, and to touch a directory that it did not make.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import threading
from collections import deque
from collections.abc import Callable  # noqa: TC003 - the fields of Custody
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tinker_sync.destination.files import (
    FLUSH_EVERY,
    HashingWriter,
    disk_errors,
    fsync_directory,
    make_directories,
    make_directory,
    replace_file,
    write_new,
)
from tinker_sync.destination.progress import PROGRESS_FILE, Note, StagedObject, read_note
from tinker_sync.destination.readback import check_replica, read_manifest
from tinker_sync.destination.root import STATE_DIRECTORY, read_facts
from tinker_sync.errors import DiskTrouble, TransferFailed
from tinker_sync.model.documents import json_bytes
from tinker_sync.model.evidence import Defect, Kind
from tinker_sync.model.manifest import Manifest, ManifestInvalid
from tinker_sync.model.moments import FAR_FUTURE, UNKNOWN_TIME, compact, parse_time, rfc3339
from tinker_sync.model.names import decode_component, encode_component, hashed_component, is_superseded, superseded_name
from tinker_sync.model.paths import MANIFEST_NAME, PathInvalid, TinkerPath
from tinker_sync.model.work import Committed, Damage, Failure, ReadBack, Replica, Trashed, Trouble

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from concurrent.futures import Executor

    from tinker_sync.destination.files import Durable
    from tinker_sync.destination.space import Reservation, SpaceLedger
    from tinker_sync.model.checkpoint import Identity
    from tinker_sync.model.evidence import Claim
    from tinker_sync.model.paths import PayloadPath

RUN_FILE: Final = "run.json"
_PAYLOAD: Final = "payload"
_OLD: Final = "replaced"
_NOTES: Final = "defects.json"
_FLUSHES: Final = 16
"""Files that are made durable at a time, of all stages together."""
_UNSETTLED: Final = 16
"""Files of one stage that are closed and not durable yet, each with a descriptor; the next one waits for the oldest."""
_INTERRUPTED_LIVE: Final = timedelta(days=7)
_PART: Final = ".part"
"""Ends the name of a trash entry that is being deleted."""


@dataclass(frozen=True, slots=True)
class TreeOptions:
    """How this tree is written."""

    portable_names: bool = False
    folds_names: bool = False
    file_mode: int = 0o600
    dir_mode: int = 0o700
    keep_superseded: int = 3


@dataclass(frozen=True, slots=True)
class Custody:
    """What the tree asks before it lets something go by itself, and whom it tells."""

    spares: Callable[[Trashed], bool] = lambda _: False
    """Whether a superseded version must stay: pinned, stopped, or the last copy of what we deleted."""
    keeps: Callable[[Trashed], bool] = lambda _: False
    """Whether an entry must stay in the trash: pinned, or stopped."""
    told: Callable[[Trashed, str], None] = lambda _, __: None
    """Hears (entry, `keep_superseded`) of what went into the trash, and (entry, `min_free`) of what left it."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A stage that a later attempt can go on with."""

    home: Path
    noted_at: datetime
    kept: int
    """Bytes."""


class LocalTree:
    """A `Destination`. Thread-safe: stages are independent, the final renames take turns."""

    def __init__(
        self,
        root: Path,
        options: TreeOptions,
        space: SpaceLedger,
        now: Callable[[], datetime],
        custody: Custody | None = None,
        flusher: Executor | None = None,
    ) -> None:
        self._custody = custody or Custody()
        self.root = root
        self.flusher = flusher or ThreadPoolExecutor(_FLUSHES, thread_name_prefix="flush")
        """Where files are made durable while others are written; starts no thread before the first."""
        self._interrupted: dict[TinkerPath, _Waiting] = {}
        self._keeping = threading.Lock()
        """Held to change that."""
        self._options = options
        self._space = space
        self.now = now
        facts = read_facts(root)
        self._root_id = None if facts is None else facts.root_id
        self._anchor = None if facts is None else _place(root)
        self._emptying = threading.Lock()
        space.reclaim = self._reclaim
        self._renames = threading.Lock()
        self._durable: set[Path] = set()
        """Directories whose own names are durable already: their parents need no fsync for them again."""
        self._latest: dict[tuple[str, str], datetime] = {}
        self._new: set[tuple[str, str]] = set()
        """Runs and segments that had no directory when it was first looked for one."""

    @property
    def options(self) -> TreeOptions:
        """How this tree is written."""
        return self._options

    def area(self, name: str) -> Path:
        """`staging`, `quarantine` or `trash`, made when missing. Raises OSError."""
        path = self.root / STATE_DIRECTORY / name
        make_directories(path, mode=0o700)
        return path

    def open_stage(self, identity: Identity, expected_bytes: int | None) -> LocalStage:
        """Reserve space and make an empty stage. Raises NoSpace, DiskTrouble."""
        self.check()
        self.forget_old_stages()
        reservation = self._space.reserve(expected_bytes)
        try:
            with disk_errors("cannot make a stage in", self.root):
                home = self.area("staging") / f"{compact(self.now())}-{os.urandom(6).hex()}"
                for directory in (home, home / _PAYLOAD):
                    make_directory(directory, mode=self._options.dir_mode)
        except BaseException:
            reservation.release()
            raise
        return LocalStage(self, identity, home, reservation)

    def has_interrupted(self, path: TinkerPath) -> bool:
        """Whether an earlier attempt left something."""
        return path in self._interrupted

    def resume_stage(self, identity: Identity, source: str, expected_bytes: int | None) -> Interrupted | None:
        """What an earlier attempt at this very object left, by that source. Raises NoSpace, DiskTrouble."""
        self.check()
        with self._keeping:
            waiting = self._interrupted.pop(identity.path, None)
        if waiting is None:
            return None
        home = waiting.home
        note = read_note(home)
        if note is None or note.reason or not note.identity.matches(identity) or not note.is_of(source):
            _remove_tree(home)
            return None if note is None else Interrupted(None, note.reason or "it is another object now")
        stage = LocalStage(self, identity, home, self._space.nothing())
        try:
            stage.load(note)
        except DiskTrouble as error:
            stage.abort()
            return Interrupted(None, str(error))
        try:
            stage.reserve(self._space.reserve(max(0, max(expected_bytes or 0, note.promised) - note.kept)))
        except BaseException:
            self.keep_interrupted(home)
            raise
        return Interrupted(stage, kept=note.kept)

    def keep_interrupted(self, home: Path) -> None:
        """Remember a stage that a later attempt can go on with, or remove it. Never raises."""
        note = read_note(home)
        if note is None:
            _remove_tree(home)
            return
        if note.reason:  # the next attempt says so; the bytes are of no use
            _remove_tree(home / _PAYLOAD)
        with self._keeping:
            before = self._interrupted.get(note.identity.path)
            self._interrupted[note.identity.path] = _Waiting(home, note.noted_at, note.kept)
        if before is not None and before.home != home:
            _remove_tree(before.home)

    def forget_old_stages(self) -> None:
        """Remove what nobody came back for within a week: it is gone upstream by now."""
        for path, found in list(self._interrupted.items()):
            if self.now() - found.noted_at > _INTERRUPTED_LIVE:
                self._forget(path, found)

    def check(self) -> None:
        """Whether the root is the directory that was opened. Raises DiskTrouble: what is below it now is not the mirror."""
        if self._anchor is None:
            return
        try:
            place = _place(self.root)
        except OSError:
            return  # it cannot be told just now; a write will
        if place == self._anchor:
            return
        facts = None if place is None else read_facts(self.root)
        if facts is not None and facts.root_id == self._root_id:
            self._anchor = place  # a network filesystem that was mounted again
            return
        message = f"{self.root} is no longer the directory that was opened: it was unmounted, moved or deleted"
        raise DiskTrouble(message)

    def room_for(self, size: int) -> bool:
        """Whether that many more bytes would fit now."""
        return self._space.fits(size)

    def _reclaim(self, missing: int) -> bool:
        """Before a transfer is refused for space, the trash is emptied, oldest first; not when that cannot help.

        Then downloads that wait for their next attempt give their space to one that runs.
        """
        with self._emptying:
            there = [item for item in self.trashed() if not self._custody.keeps(item)]
            waiting = sum(found.kept for found in list(self._interrupted.values()))
            if sum(item.total_bytes for item in there) + waiting < missing:
                return False
            if not there:
                return self._reclaim_interrupted()
            try:
                self.empty(there[0].entry)
            except TransferFailed:
                return False
            self._custody.told(there[0], "min_free")
            return True

    def _reclaim_interrupted(self) -> bool:
        """Remove the one that waits longest: whether there was one."""
        oldest = min(list(self._interrupted.items()), key=lambda item: item[1].noted_at, default=None)
        return oldest is not None and self._forget(*oldest)

    def _forget(self, path: TinkerPath, found: _Waiting) -> bool:
        """Remove it, unless an attempt took it meanwhile."""
        with self._keeping:
            if self._interrupted.get(path) is not found:
                return False
            del self._interrupted[path]
        _remove_tree(found.home)
        return True

    def recover(self) -> list[Committed]:
        """Put right what a dead process left: finish whole stages, keep what can be gone on with. Needs the lock.

        Returns what was committed. Raises DiskTrouble.
        """
        committed: list[Committed] = []
        with disk_errors("cannot clean", self.root):
            for home in sorted(self.area("staging").iterdir()):
                base = _whole_stage(home)
                if base is not None:
                    manifest, digest = read_manifest(base)
                    with suppress(TransferFailed), disk_errors("cannot flush", base):
                        _fsync_directories(base)  # its process may have died before it did
                        fsync_directory(home)
                        committed.append(self.place(base, manifest, digest, home, repairs=True))
                    _remove_tree(home)
                else:
                    self.keep_interrupted(home)
            self.forget_old_stages()
            for leftover in self.area("trash").glob(f"*{_PART}"):
                _remove_tree(leftover)
        return committed

    def place(self, base: Path, manifest: Manifest, digest: str, home: Path, *, repairs: bool) -> Committed:
        """Give a whole, durable stage its final name; `digest` is of its manifest's file. Raises NoSpace, DiskTrouble."""
        self.check()
        with self._renames, disk_errors("cannot commit into", self.root):
            ancestors = [self.root]
            for component in (manifest.tinker_path.run_id, manifest.tinker_path.segment):
                ancestors.append(ancestors[-1] / self._free_name(ancestors[-1], component))
                make_directories(ancestors[-1], mode=self._options.dir_mode)
            parent = ancestors[-1]
            final = parent / self._free_name(parent, manifest.tinker_path.name)
            moved = self._make_way(final, manifest, home, repairs=repairs)
            try:
                os.rename(base, final)
            except OSError:
                if moved is not None:
                    os.rename(moved, final)
                raise
            fsync_directory(parent)
            for directory in ancestors[1:]:
                if directory not in self._durable:
                    fsync_directory(directory.parent)
                    self._durable.add(directory)
            replica = self._as_replica(final, manifest, digest, superseded=False)
            superseded = None
            if moved is not None and moved.parent == parent:
                superseded = self._limit_superseded(parent, final.name)
            self._point_latest(manifest, final)
        return Committed(replica, superseded)

    def may_have(self, path: TinkerPath) -> bool:
        """False where nothing can stand under a path's name but what this tree put there since it was opened."""
        return (path.run_id, path.segment) not in self._new

    def find(self, path: TinkerPath) -> Committed | None:
        """The replica that stands under a path's name, whatever the catalog knows. Raises DiskTrouble.

        By the first invariant it is whole: a process can have died between the rename and its note in the catalog.
        """
        with disk_errors("cannot look into", self.root):
            parent = self.root / self._free_name(self.root, path.run_id)
            parent /= self._free_name(parent, path.segment)
            if not parent.is_dir():
                self.check()
                self._new.add((path.run_id, path.segment))
                return None
            final = parent / self._free_name(parent, path.name)
            look = self._look(final) if final.is_dir() and not final.is_symlink() else None
        if not isinstance(look, Replica) or look.path != path:
            return None
        return Committed(look, self._superseded(final))

    def manifest(self, directory: str) -> Manifest:
        """A replica's manifest, unproven. Raises OSError, ManifestInvalid."""
        return read_manifest(self.root / directory)[0]

    def read(self, directory: str, advanced: Callable[[int], None] = lambda _: None) -> ReadBack:
        """Read a replica back from the disk. Raises nothing for what is on the disk: defects tell."""
        try:
            return self._read(self.root / directory, advanced)
        except OSError as error:
            return ReadBack(None, "", (Defect(Kind.CONTENT, f"cannot be read: {error.strerror}", directory),))

    def _read(self, path: Path, advanced: Callable[[int], None]) -> ReadBack:
        relative = path.relative_to(self.root)
        for part in (relative, *relative.parents[:-1]):  # the root itself may be a link
            if (self.root / part).is_symlink():
                elsewhere = Defect(
                    Kind.CONTENT, "is a symbolic link: what is not below the root is no replica", str(part)
                )
                return ReadBack(None, "", (elsewhere,))
        try:
            manifest, digest = read_manifest(path)
        except (FileNotFoundError, NotADirectoryError):
            missing = Defect(Kind.CONTENT, "the directory or its manifest is missing", MANIFEST_NAME)
            return ReadBack(None, "", (missing,))
        except (OSError, ManifestInvalid) as error:
            return ReadBack(None, "", (Defect(Kind.CONTENT, str(error), MANIFEST_NAME),))
        return ReadBack(manifest, digest, tuple(check_replica(path, manifest, advanced)))

    def retire(self, directory: str) -> str:
        """Move a replica to the trash; returns the entry's name. Raises NoSpace, DiskTrouble."""
        with self._renames, disk_errors("cannot move to the trash:", self.root / directory):
            return self._to_trash(self.root / directory)

    def trashed(self, before: datetime | None = None) -> tuple[Trashed, ...]:
        """What is in the trash, or went there before that moment; oldest first."""
        area = self.root / STATE_DIRECTORY / "trash"
        with disk_errors("cannot look into", area):
            return self._trashed_before(area, before)

    def _trashed_before(self, area: Path, before: datetime | None) -> tuple[Trashed, ...]:
        entries = ((home, _trashed_at(home.name)) for home in _subdirectories(area))
        return tuple(
            _as_trashed(home)
            for home, at in entries
            if at is not None and not home.name.endswith(_PART) and (before is None or at <= before)
        )

    def restore(self, entry: str, manifest_sha256: str | None = None) -> Committed:
        """Give a trashed replica its name back, or one beside it where another object has that name now.

        It is read first: only what is whole, and has the manifest that it went with, comes back. A damaged replica of
        the same object changes places with it. Raises NoSpace, DiskTrouble; FileNotFoundError when there is no such
        entry.
        """
        home = self.root / STATE_DIRECTORY / "trash" / entry
        if "/" in entry or _trashed_at(entry) is None or not home.is_dir():
            raise FileNotFoundError(entry)
        read = self.read(str(home.relative_to(self.root)))
        manifest, problem = read.manifest, "; ".join(str(defect) for defect in read.defects[:3])
        if manifest_sha256 is not None and read.manifest_sha256 not in ("", manifest_sha256):
            problem = "its manifest is not the one that it went with"
        if manifest is None or problem:
            message = f"{home} is not whole, and stays in the trash: {problem}"
            raise DiskTrouble(message)
        with disk_errors("cannot restore", home):
            there = self.find(manifest.tinker_path)
            if there is None:
                return self.place(home, manifest, read.manifest_sha256, home, repairs=False)
            if there.replica.identity.matches(manifest.identity):
                if not self.read(there.replica.directory).defects:
                    message = f"{manifest.tinker_path} is here already, whole: nothing was restored"
                    raise DiskTrouble(message)
                self.retire(there.replica.directory)
                return self.place(home, manifest, read.manifest_sha256, home, repairs=False)
            with self._renames:
                final = self.root / there.replica.directory
                aside = final.with_name(superseded_name(final.name, manifest.time))
                if os.path.lexists(aside):
                    aside = aside.with_name(f"{aside.name}-{os.urandom(4).hex()}")
                os.rename(home, aside)
                fsync_directory(aside.parent)
        return Committed(there.replica, self._superseded(final))

    def empty(self, entry: str) -> None:
        """Delete a trashed replica for good. Raises DiskTrouble."""
        area = self.area("trash")
        part = area / f"{entry}{_PART}"
        with disk_errors("cannot empty", area / entry):
            os.rename(area / entry, part)
        _remove_tree(part)

    def _to_trash(self, path: Path) -> str:
        entry = f"{compact(self.now())}-{os.urandom(6).hex()}"
        area = self.area("trash")
        os.rename(path, area / entry)
        fsync_directory(path.parent)
        fsync_directory(area)
        return entry

    def _superseded(self, final: Path) -> tuple[Replica, ...]:
        versions = (path for path in _subdirectories(final.parent) if path.name.startswith(f"{final.name}@"))
        return tuple(look for look in map(self._look, versions) if isinstance(look, Replica))

    def list(self) -> Iterator[Replica | Damage]:
        """Every replica in the tree, from the manifests, in the order of their names."""
        for run in _subdirectories(self.root):
            for segment in _subdirectories(run):
                for directory in _subdirectories(segment):
                    yield self._look(directory)

    def quarantined(self) -> Iterator[Failure]:
        """Everything in quarantine, from its notes."""
        area = self.root / STATE_DIRECTORY / "quarantine"
        for home in _subdirectories(area):
            with suppress(OSError, ValueError, KeyError, TypeError):
                notes = json.loads((home / _NOTES).read_bytes())
                yield _as_failure(notes, str(home.relative_to(self.root)))

    def base_models(self) -> dict[str, str]:
        """Of every run that is here, its base model, from `run.json`."""
        found: dict[str, str] = {}
        for directory in _subdirectories(self.root):
            with suppress(OSError, ValueError, KeyError, TypeError):
                facts = json.loads((directory / RUN_FILE).read_bytes())
                if isinstance(facts["base_model"], str) and facts["base_model"]:
                    found[str(facts["training_run_id"])] = facts["base_model"]
        return found

    def record_run(self, run_id: str, facts: Mapping[str, object]) -> None:
        """Write `run.json`. Raises NoSpace, DiskTrouble."""
        self.check()
        with self._renames, disk_errors("cannot write run.json below", self.root):
            directory = self.root / self._free_name(self.root, run_id)
            for parent in make_directories(directory, mode=self._options.dir_mode):
                fsync_directory(parent)
            content = json_bytes(facts)
            with suppress(FileNotFoundError):
                if (directory / RUN_FILE).read_bytes() == content:
                    return
            replace_file(directory / RUN_FILE, content, mode=self._options.file_mode)

    def repoint_latest(self) -> None:
        """Make every `latest-*` link anew, from the manifests."""
        self._latest.clear()
        newest: dict[tuple[str, str], Replica] = {}
        for found in self.list():
            if isinstance(found, Replica) and not found.superseded:
                key = (found.path.run_id, found.path.segment)
                if key not in newest or newest[key].time < found.time:
                    newest[key] = found
        for replica in newest.values():
            final = self.root / replica.directory
            manifest, _ = read_manifest(final)
            self._latest.pop((str(final.parent.parent), manifest.checkpoint_type), None)
            self._link_latest(manifest, final)

    def _look(self, directory: Path) -> Replica | Damage:
        relative = str(directory.relative_to(self.root))
        superseded = is_superseded(directory.name)
        try:
            manifest, digest = read_manifest(directory)
        except FileNotFoundError:
            problem = "has no manifest: not made by tinker-sync, or damaged"
        except (OSError, ManifestInvalid) as error:
            problem = str(error)
        else:
            if self._belongs(relative, manifest.tinker_path):
                return self._as_replica(directory, manifest, digest, superseded=superseded)
            problem = f"its manifest is of {manifest.tinker_path}: a copy, or moved here; move it out of the mirror"
        run, segment, name = (decode_component(_readable(part)) or _readable(part) for part in Path(relative).parts)
        defect = Defect(Kind.CONTENT, problem, MANIFEST_NAME)
        shown = relative.encode(errors="backslashreplace").decode()
        return Damage(TinkerPath(run, segment, name), shown, (defect,))

    def _belongs(self, relative: str, path: TinkerPath) -> bool:
        """Whether a directory is one that this path can have."""
        portable = self._options.portable_names
        for part, true in zip(Path(relative).parts, (path.run_id, path.segment, path.name), strict=True):
            plain = _readable(part)
            if plain not in (encode_component(true, portable=portable), hashed_component(true, portable=portable)):
                return False
        return True

    def _as_replica(self, directory: Path, manifest: Manifest, digest: str, *, superseded: bool) -> Replica:
        return Replica(
            path=manifest.tinker_path,
            time=manifest.time,
            size_bytes=manifest.size_bytes,
            directory=str(directory.relative_to(self.root)),
            total_bytes=manifest.total_bytes,
            files=len(manifest.files),
            fidelity=manifest.fidelity,
            source=manifest.source,
            committed_at=manifest.committed_at,
            verified_at=manifest.committed_at,
            manifest_sha256=digest,
            expires_at=manifest.expires_at,
            first_expires_at=manifest.first_expires_at,
            superseded=superseded,
            user_metadata=manifest.user_metadata,
        )

    def _free_name(self, parent: Path, component: str) -> str:
        """The directory name for a component, or its hashed form where the plain one is another name's."""
        portable = self._options.portable_names
        encoded = encode_component(component, portable=portable)
        if not self._options.folds_names or not os.path.lexists(parent / encoded):
            return encoded
        if encoded in os.listdir(parent):
            return encoded
        return hashed_component(component, portable=portable)

    def _make_way(self, final: Path, manifest: Manifest, home: Path, *, repairs: bool) -> Path | None:
        """Free the final name: a superseded version keeps its bytes, a damaged one goes with the stage.

        Returns where what stood there is now.
        """
        if not os.path.lexists(final) or (final.is_dir() and not final.is_symlink() and not any(final.iterdir())):
            return None
        try:
            old, _ = read_manifest(final)
        except (OSError, ManifestInvalid) as error:
            if repairs and stat.S_ISDIR(final.lstat().st_mode):
                return self._keep_apart(final, manifest.identity, error)
            message = f"{final} is there and is no replica ({error}); move it away, then sync again"
            raise DiskTrouble(message) from error
        if old.tinker_path != manifest.tinker_path:
            message = f"{final} holds {old.tinker_path}; run `tinker-sync reindex` and look at its report"
            raise DiskTrouble(message)
        if old.identity.matches(manifest.identity):
            if not (repairs and old.same_payload(manifest)):
                message = f"{final} holds this very checkpoint already; run `tinker-sync reindex`"
                raise DiskTrouble(message)
            os.rename(final, home / _OLD)
            return home / _OLD
        aside = final.with_name(superseded_name(final.name, old.time))
        if aside.exists():
            aside = aside.with_name(f"{aside.name}-{os.urandom(4).hex()}")
        os.rename(final, aside)
        return aside

    def _keep_apart(self, final: Path, identity: Identity, error: Exception) -> Path:
        """A replica without a readable manifest: nothing proves that its bytes are worthless. Returns where they are."""
        kept = self.area("quarantine") / f"{compact(self.now())}-{os.urandom(6).hex()}"
        kept.mkdir(mode=0o700)
        write_new(kept / _NOTES, self.notes(identity, [f"a damaged replica, replaced: {error}"]), mode=0o600)
        os.rename(final, kept / _PAYLOAD)
        return kept / _PAYLOAD

    def notes(self, identity: Identity, defects: Sequence[str]) -> bytes:
        """What stands beside quarantined bytes."""
        return json_bytes(
            {
                "tinker_path": str(identity.path),
                "time": rfc3339(identity.time),
                "size_bytes": identity.size_bytes,
                "quarantined_at": rfc3339(self.now()),
                "defects": list(defects),
            }
        )

    def _limit_superseded(self, parent: Path, name: str) -> tuple[Replica, ...]:
        """Let the oldest versions go to the trash; returns those that stay."""
        versions = sorted(path for path in _subdirectories(parent) if path.name.startswith(f"{name}@"))
        surplus = max(0, len(versions) - self._options.keep_superseded)
        for path in versions[:surplus]:
            version = _as_trashed(path)
            if not self._custody.spares(version):
                self._custody.told(replace(version, entry=self._to_trash(path)), "keep_superseded")
        return self._superseded(parent / name)

    def _point_latest(self, manifest: Manifest, final: Path) -> None:
        key = (str(final.parent.parent), manifest.checkpoint_type)
        if key not in self._latest:
            link = final.parent.parent / f"latest-{manifest.checkpoint_type}"
            with suppress(OSError, ManifestInvalid):
                self._latest[key] = read_manifest(link)[0].time
        if key not in self._latest or self._latest[key] <= manifest.time:
            self._link_latest(manifest, final)

    def _link_latest(self, manifest: Manifest, final: Path) -> None:
        run = final.parent.parent
        link = run / f"latest-{manifest.checkpoint_type}"
        temporary = run / f".latest-{os.getpid()}-{os.urandom(4).hex()}"
        with suppress(OSError):  # FAT and SMB have no symbolic links; the tree is whole without them
            os.symlink(os.path.join(final.parent.name, final.name), temporary)
            try:
                os.rename(temporary, link)
            except OSError:
                temporary.unlink()
            self._latest[(str(run), manifest.checkpoint_type)] = manifest.time


class LocalStage:
    """One checkpoint being put together in `staging/`. Its files can be written by several threads."""

    def __init__(self, tree: LocalTree, identity: Identity, home: Path, space: Reservation) -> None:
        self._tree = tree
        self._identity = identity
        self._home = home
        self._space = space
        self._writers: list[HashingWriter] = []
        self._unsettled: deque[HashingWriter] = deque()
        """The last ones of them."""
        self._objects: dict[str, StagedObject] = {}
        self._noting = threading.Lock()
        self._unnoted = 0
        self._noted = False
        """Whether there is a note."""
        self._too_many = False
        """Whether the last note said that no note can be made of so many files."""
        self._nested = False
        """Whether the payload can have directories."""

    @property
    def payload(self) -> Path:
        """Where the files are."""
        return self._home / _PAYLOAD

    def keys(self) -> set[str]:
        """Of which objects something was kept."""
        return set(self._objects)

    def staged(self, key: str) -> StagedObject | None:
        """What an earlier attempt kept of an object, where it can be gone on with."""
        found = self._objects.get(key)
        return None if found is None or found.reason else found

    def worthless(self, key: str) -> str:
        """Why what was kept of an object cannot be gone on with; empty where it can be, or nothing was kept."""
        found = self._objects.get(key)
        return "" if found is None else found.reason

    def stage_object(self, key: str, validator: str | None, claim: Claim) -> StagedObject:
        """Begin an object; what was kept under that key is dropped. Raises NoSpace, DiskTrouble."""
        before = self._objects.get(key)
        if before is not None:
            before.drop()
            with disk_errors("cannot begin anew in", self.payload):
                for path in before.files():
                    self.payload.joinpath(*path.parts).unlink(missing_ok=True)
        made = self._objects[key] = StagedObject(self, key, validator, claim)
        return made

    def write(self, path: PayloadPath, size: int | None = None, kept: Durable | None = None) -> HashingWriter:
        """Start a file, or go on with one. Raises NoSpace, DiskTrouble."""
        options = self._tree.options
        target = self.payload.joinpath(*path.parts)
        if len(path.parts) > 1:
            self._nested = True
            with disk_errors("cannot make", target.parent):
                make_directories(target.parent, mode=options.dir_mode)
        writer = HashingWriter(
            path,
            target,
            size=size,
            mode=options.file_mode,
            space=self._space,
            flusher=self._tree.flusher,
            flushed=self._note_some,
            kept=kept,
        )
        self._writers.append(writer)
        self._unsettled.append(writer)
        while len(self._unsettled) > _UNSETTLED:
            self._unsettled.popleft().settle()
        return writer

    def make_directory(self, path: PayloadPath) -> None:
        """Make an empty directory. Raises NoSpace, DiskTrouble."""
        target = self.payload.joinpath(*path.parts)
        self._nested = True
        with disk_errors("cannot make", target):
            make_directories(target, mode=self._tree.options.dir_mode)

    def commit(self, manifest: Manifest, *, strip: str | None = None, repairs: bool = False) -> Committed:
        """Make it durable, then give it its final name. Raises NoSpace, DiskTrouble; the stage is gone in any case."""
        try:
            self._settle()
            base = self.payload / strip if strip is not None else self.payload
            content = manifest.to_bytes()
            with disk_errors("cannot commit", base):
                write_new(base / MANIFEST_NAME, content, mode=self._tree.options.file_mode)
                self._fsync_directories(base)
                if self._noted:
                    (self._home / PROGRESS_FILE).unlink(missing_ok=True)
                fsync_directory(self._home)
            digest = hashlib.sha256(content).hexdigest()
            return self._tree.place(base, manifest, digest, self._home, repairs=repairs)
        finally:
            self.abort()

    def quarantine(self, identity: Identity, defects: Sequence[Defect]) -> str:
        """Keep the bytes with their defects; an older quarantine of the same object gives way.

        Returns the directory below the root. Raises NoSpace, DiskTrouble; the stage is gone in any case.
        """
        try:
            self._settle()
            with disk_errors("cannot quarantine into", self._tree.root):
                area = self._tree.area("quarantine")
                notes = self._tree.notes(identity, [str(defect) for defect in defects])
                (self._home / PROGRESS_FILE).unlink(missing_ok=True)
                write_new(self._home / _NOTES, notes, mode=0o600)
                _fsync_directories(self._home)
                earlier = [
                    failure.quarantine
                    for failure in self._tree.quarantined()
                    if failure.path == self._identity.path and failure.identity.matches(identity)
                ]
                target = area / self._home.name
                os.rename(self._home, target)
                fsync_directory(area)
                for directory in earlier:
                    _remove_tree(self._tree.root / directory)
            return str(target.relative_to(self._tree.root))
        finally:
            self.abort()

    def suspend(self) -> None:
        """Leave what is durable for a later attempt, or remove it where there is nothing to go on with. Never raises."""
        failed = any(writer.failed for writer in self._writers)  # a failed fsync is final for its stage
        self._close()
        if failed:
            _remove_tree(self._home)
        else:
            self._tree.keep_interrupted(self._home)

    def abort(self) -> None:
        """Remove it. Never raises; harmless when it is gone."""
        self._close()
        _remove_tree(self._home)

    def reserve(self, space: Reservation) -> None:
        """What is still to come has its place."""
        self._space = space

    def load(self, note: Note) -> None:
        """Take up what an earlier attempt noted; everything else is removed. Raises DiskTrouble."""
        self._nested = self._noted = True
        with disk_errors("cannot go on with", self._home):
            try:
                objects = [StagedObject.from_json(self, document) for document in note.objects]
            except (ValueError, TypeError, KeyError, AttributeError, PathInvalid) as error:
                message = f"{self._home / PROGRESS_FILE} does not parse"
                raise DiskTrouble(message) from error
            kept = {self.payload.joinpath(*path.parts) for found in objects for path in found.files()}
            for directory, below, names in os.walk(self.payload):
                os.chmod(directory, self._tree.options.dir_mode)  # as configured now
                for path in (Path(directory, name) for name in (*below, *names)):
                    if path.is_symlink() or not (path.is_dir() or path in kept):
                        path.unlink()
        self._objects = {found.key: found for found in objects}

    def _fsync_directories(self, base: Path) -> None:
        if self._nested:
            _fsync_directories(base)
        else:
            fsync_directory(base)

    def _settle(self) -> None:
        for writer in self._writers:
            writer.settle()

    def _close(self) -> None:
        for writer in self._writers:
            writer.discard()
        self._writers.clear()
        self._space.release()

    def _note_some(self, durable: int) -> None:
        """So many more bytes are on the device: after enough of them, note it. Raises NoSpace, DiskTrouble."""
        with self._noting:
            self._unnoted += durable
            objects = list(self._objects.values())  # others are begun meanwhile
            if self._unnoted < FLUSH_EVERY or self._too_many or all(found.validator is None for found in objects):
                return
            self._unnoted = 0
            content = self._note_of(objects).to_bytes()
            if content is None:
                self._too_many = True
                objects[0].cannot_resume("a checkpoint of so many files cannot be gone on with in the middle")
                content = self._note_of(objects[:1]).to_bytes() or b""
            with disk_errors("cannot note progress in", self._home):
                _fsync_directories(self._home)
                fsync_directory(self._home.parent)
                self._noted = True
                replace_file(self._home / PROGRESS_FILE, content)

    def _note_of(self, objects: Sequence[StagedObject]) -> Note:
        return Note(self._identity, self._tree.now(), tuple(found.as_json() for found in objects))


@dataclass(frozen=True, slots=True)
class Interrupted:
    """A `ports.Interrupted`."""

    stage: LocalStage | None
    reason: str = ""
    kept: int = 0


def _trashed_at(entry: str) -> datetime | None:
    """When an entry went into the trash; None for a name that is no entry's."""
    try:
        at = datetime.strptime(entry[:16], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    except ValueError:
        return None
    return at if at.year < FAR_FUTURE.year else None


def _as_trashed(home: Path) -> Trashed:
    at = _trashed_at(home.name) or UNKNOWN_TIME
    try:
        manifest, _ = read_manifest(home)
    except (OSError, ManifestInvalid):
        return Trashed(home.name, None, None, at, 0)
    return Trashed(home.name, manifest.tinker_path, manifest.time, at, manifest.total_bytes)


def _fsync_directories(base: Path) -> None:
    for directory, _, _ in os.walk(base, topdown=False):
        fsync_directory(Path(directory))


def _whole_stage(home: Path) -> Path | None:
    """The directory in a dead process's stage that holds a manifest and matches it, or None."""
    candidates = [home / _PAYLOAD, *_subdirectories(home / _PAYLOAD)]
    for base in candidates:
        with suppress(OSError, ManifestInvalid):
            manifest, _ = read_manifest(base)
            return base if not check_replica(base, manifest, lambda _: None) else None
    return None


def _place(path: Path) -> tuple[int, int] | None:
    """Which directory it is; None where there is none. Raises OSError where that cannot be told."""
    try:
        found = os.stat(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
            return None
        raise
    return found.st_dev, found.st_ino


def _subdirectories(path: Path) -> list[Path]:
    try:
        with os.scandir(path) as entries:
            names = [
                entry.name
                for entry in entries
                if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
            ]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [path / name for name in sorted(names)]


def _remove_tree(path: Path) -> None:
    def make_writable(_: Callable[..., Any], name: str, __: object) -> None:
        with suppress(OSError):
            os.chmod(os.path.dirname(name), 0o700)
            os.chmod(name, 0o700)

    with suppress(OSError):
        os.rmdir(path)  # what was committed leaves an empty one
        return
    for _ in range(2):  # once more, with what stood in the way made writable
        with suppress(OSError, RecursionError):
            shutil.rmtree(path, ignore_errors=False, onerror=make_writable)
        if not os.path.lexists(path):
            return


def _readable(component: str) -> str:
    """A directory's name without the time of a superseded version, and printable whatever bytes it has."""
    return component.partition("@")[0].encode(errors="backslashreplace").decode()


def _as_failure(notes: dict[str, Any], directory: str) -> Failure:
    at = parse_time(notes["quarantined_at"])
    return Failure(
        path=TinkerPath.parse(notes["tinker_path"]),
        time=parse_time(notes["time"]),
        size_bytes=notes["size_bytes"],
        trouble=Trouble.QUARANTINED,
        attempts=1,
        error="; ".join(notes["defects"]),
        failed_at=at,
        retry_at=at,
        defects=tuple(notes["defects"]),
        quarantine=directory,
    )
