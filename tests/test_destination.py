"""The tree on disk: commits that are whole and durable, and everything that a disk can do to them."""

from __future__ import annotations

import errno
import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import NOW
from tests.test_pure import checkpoint, failure_of, make_manifest, replica_of
from tinker_sync.catalog.store import CatalogMissing, CatalogUnusable, SqlCatalog
from tinker_sync.destination import files as durable
from tinker_sync.destination.local import LocalTree, TreeOptions
from tinker_sync.destination.lock import RootLock
from tinker_sync.destination.root import prepare_root, read_facts
from tinker_sync.destination.space import SpaceLedger
from tinker_sync.errors import DiskTrouble, NoSpace, RootBusy, WrongRoot
from tinker_sync.model.checkpoint import Checkpoint, Identity
from tinker_sync.model.evidence import Defect, Kind
from tinker_sync.model.manifest import FileEntry
from tinker_sync.model.paths import PayloadPath, TinkerPath
from tinker_sync.model.work import Damage, Replica, Trouble

PATH = TinkerPath("run:train:0", "weights", "000020")
OBJECT = Identity(PATH, NOW, None)


def make_tree(root: Path, *, min_free: int = 0, free: int = 10**12, **options: Any) -> LocalTree:
    """A tree in an empty directory."""
    (root / ".tinker-sync").mkdir(parents=True, exist_ok=True)
    return LocalTree(root, TreeOptions(**options), SpaceLedger(root, min_free, lambda _: free), lambda: NOW)


def put(tree: LocalTree, path: TinkerPath = PATH, content: bytes = b"weights", **fields: Any) -> Any:
    """Stage and commit one file."""
    stage = tree.open_stage(Identity(path, NOW, None), len(content))
    try:
        writer = stage.write(PayloadPath.parse("sub/adapter_model.bin"))
        writer.write(content)
        seen = writer.close()
        repairs = fields.pop("repairs", False)
        manifest = make_manifest(tinker_path=path, files=(FileEntry(seen.path, seen.size, seen.sha256),), **fields)
        return stage.commit(manifest, repairs=repairs)
    finally:
        stage.abort()


def area(tree: LocalTree, name: str) -> list[Path]:
    """What lies in staging, quarantine or trash."""
    return sorted(tree.area(name).iterdir())


def test_a_commit_is_whole_private_and_found_again(tmp_path: Path) -> None:
    """Final name, manifest, modes, link; read back without a defect."""
    tree = make_tree(tmp_path)
    replica = put(tree).replica
    final = tmp_path / "run:train:0" / "weights" / "000020"
    assert replica.directory == "run:train:0/weights/000020"
    assert (final / "sub" / "adapter_model.bin").read_bytes() == b"weights"
    assert (final / ".tinker-sync.json").stat().st_mode & 0o777 == 0o600
    assert {path.stat().st_mode & 0o777 for path in (final, final / "sub", final.parent)} == {0o700}
    assert os.readlink(tmp_path / "run:train:0" / "latest-training") == "weights/000020"
    assert tree.read(replica.directory).defects == ()
    assert list(tree.list()) == [replica]
    assert area(tree, "staging") == []


def test_modes_as_configured(tmp_path: Path) -> None:
    """A group may read the adapters when asked, whatever the umask."""
    before = os.umask(0o077)
    try:
        put(make_tree(tmp_path, file_mode=0o640, dir_mode=0o750))
    finally:
        os.umask(before)
    final = tmp_path / "run:train:0" / "weights" / "000020"
    assert final.stat().st_mode & 0o777 == 0o750
    assert (final / "sub").stat().st_mode & 0o777 == 0o750
    assert (final / "sub" / "adapter_model.bin").stat().st_mode & 0o777 == 0o640


def test_everything_is_flushed_before_the_rename_and_its_names_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files, manifest, nested directories and stage before; parent and every new ancestor after; never in between."""
    events: list[tuple[str, str]] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        real_fsync(descriptor)

    def rename(source: Any, target: Any) -> None:
        events.append(("rename", str(target)))
        real_rename(source, target)

    tree = make_tree(tmp_path)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    put(tree)
    final = str(tmp_path / "run:train:0" / "weights" / "000020")
    at = events.index(("rename", final))
    before = [path.partition("/payload")[2] for kind, path in events[:at] if kind == "fsync"]
    after = [path for kind, path in events[at:] if kind == "fsync"]
    assert before.index("/sub/adapter_model.bin") < before.index("/.tinker-sync.json") < before.index("/sub")
    assert before.index("/sub") < len(before) - 1 - before[::-1].index("")
    for path in (tmp_path, tmp_path / "run:train:0", tmp_path / "run:train:0" / "weights"):
        assert str(path) in after


def test_a_commit_never_overwrites(tmp_path: Path) -> None:
    """The same identity again is refused, the replica stays; another identity sets the old one aside."""
    tree = make_tree(tmp_path, keep_superseded=2)
    put(tree, content=b"one", time=NOW)
    with pytest.raises(DiskTrouble, match="this very checkpoint"):
        put(tree, content=b"two", time=NOW)
    final = tmp_path / "run:train:0" / "weights" / "000020"
    assert (final / "sub" / "adapter_model.bin").read_bytes() == b"one"
    for hour in (1, 2, 3):
        committed = put(tree, content=b"v%d" % hour, time=NOW + timedelta(hours=hour))
    assert (final / "sub" / "adapter_model.bin").read_bytes() == b"v3"
    kept = sorted(path.name for path in final.parent.iterdir())
    assert kept == ["000020", "000020@20260115T130000Z", "000020@20260115T140000Z"]
    assert [r.superseded for r in committed.superseded] == [True, True]
    assert len(area(tree, "trash")) == 1
    assert area(tree, "staging") == []


def test_what_is_no_replica_is_never_touched(tmp_path: Path) -> None:
    """A user's own directory, file or link in the way: words, and nothing moved."""
    final = tmp_path / "run:train:0" / "weights" / "000020"
    final.mkdir(parents=True)
    (final / "precious").write_text("mine")
    tree = make_tree(tmp_path)
    with pytest.raises(DiskTrouble, match="move it away"):
        put(tree)
    assert (final / "precious").read_text() == "mine"
    assert area(tree, "staging") == []
    assert isinstance(next(tree.list()), Damage)


def test_a_damaged_replica_gives_way_to_the_same_bytes_alone(tmp_path: Path) -> None:
    """Repair replaces; without it, or with other bytes, the name stays where it is."""
    tree = make_tree(tmp_path)
    put(tree, content=b"right")
    victim = tmp_path / "run:train:0" / "weights" / "000020" / "sub" / "adapter_model.bin"
    victim.write_bytes(b"wrong")
    assert "SHA-256" in str(tree.read("run:train:0/weights/000020").defects[0])
    with pytest.raises(DiskTrouble):
        put(tree, content=b"other", repairs=True)
    assert victim.read_bytes() == b"wrong"
    put(tree, content=b"right", repairs=True)
    assert tree.read("run:train:0/weights/000020").defects == ()
    assert area(tree, "staging") == []


def test_every_kind_of_damage_is_seen(tmp_path: Path) -> None:
    """Changed, cut, missing, surplus, a link: each named."""
    tree = make_tree(tmp_path)
    put(tree, content=b"0123456789")
    base = tmp_path / "run:train:0" / "weights" / "000020"
    victim = base / "sub" / "adapter_model.bin"

    def said() -> str:
        return "; ".join(map(str, tree.read("run:train:0/weights/000020").defects))

    (base / "surplus").write_text("x")
    assert "surplus: is not in the manifest" in said()
    (base / "surplus").unlink()
    victim.write_bytes(b"01234")
    assert "has 5 bytes" in said()
    victim.unlink()
    assert "is missing" in said()
    victim.symlink_to("/etc/passwd")
    assert "no regular file" in said()
    (base / ".tinker-sync.json").unlink()
    assert "manifest is missing" in said()


def test_a_dead_process_is_cleaned_up_after(tmp_path: Path) -> None:
    """Half a stage is removed; a whole one, dead just before its rename, is committed."""
    tree = make_tree(tmp_path)
    half = tree.open_stage(OBJECT, None)
    writer = half.write(PayloadPath.parse("a"))
    writer.write(b"half")
    writer.discard()
    whole = tree.open_stage(OBJECT, None)
    writer = whole.write(PayloadPath.parse("a.bin"))
    writer.write(b"whole")
    seen = writer.close()
    manifest = make_manifest(tinker_path=PATH, files=(FileEntry(seen.path, seen.size, seen.sha256),))
    (whole.payload / ".tinker-sync.json").write_bytes(manifest.to_bytes())
    assert len(area(tree, "staging")) == 2
    recovered = make_tree(tmp_path).recover()
    assert [committed.replica.path for committed in recovered] == [PATH]
    assert tree.read("run:train:0/weights/000020").defects == ()
    assert area(tree, "staging") == []


def test_a_crash_between_the_two_renames_of_a_new_version_loses_nothing(tmp_path: Path) -> None:
    """The old version stands aside, the new one is whole in its stage: the next start gives it the name."""
    tree = make_tree(tmp_path)
    put(tree, content=b"old", time=NOW)
    stage = tree.open_stage(OBJECT, None)
    writer = stage.write(PayloadPath.parse("a.bin"))
    writer.write(b"new")
    seen = writer.close()
    newer = make_manifest(
        tinker_path=PATH, time=NOW + timedelta(hours=1), files=(FileEntry(seen.path, seen.size, seen.sha256),)
    )
    (stage.payload / ".tinker-sync.json").write_bytes(newer.to_bytes())
    final = tmp_path / "run:train:0" / "weights" / "000020"
    final.rename(final.with_name("000020@20260115T120000Z"))
    make_tree(tmp_path).recover()
    assert (final / "a.bin").read_bytes() == b"new"
    assert (final.with_name("000020@20260115T120000Z") / "sub" / "adapter_model.bin").read_bytes() == b"old"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_a_disk_error_ends_that_stage_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    """ENOSPC, EIO and the like at any step: the right error in words, no final name, no leftovers, tried once."""
    tree = make_tree(tmp_path)
    calls = []

    def fail(*_: object) -> None:
        calls.append(1)
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        with pytest.raises(NoSpace if code in (errno.ENOSPC, errno.EDQUOT) else DiskTrouble, match=os.strerror(code)):
            put(tree)
    assert len(calls) == 1
    assert not (tmp_path / "run:train:0" / "weights" / "000020").exists()
    assert area(tree, "staging") == []


def test_a_failed_rename_puts_the_old_version_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new one could not take the name: the old one has it again."""
    tree = make_tree(tmp_path)
    put(tree, content=b"old", time=NOW)
    real = os.rename

    def rename(source: Any, target: Any) -> None:
        if "staging" in str(source):
            raise OSError(errno.EIO, "I/O error")
        real(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", rename)
        with pytest.raises(DiskTrouble):
            put(tree, content=b"new", time=NOW + timedelta(hours=1))
    assert tree.read("run:train:0/weights/000020").defects == ()
    assert [p.name for p in (tmp_path / "run:train:0" / "weights").iterdir()] == ["000020"]


def test_large_files_are_flushed_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 64 MiB, so that the last fsync stays short."""
    monkeypatch.setattr(durable, "FLUSH_EVERY", 1000)
    flushed: list[int] = []
    monkeypatch.setattr(os, "fdatasync", flushed.append)
    put(make_tree(tmp_path), content=b"x" * 999)
    assert not flushed
    stage = make_tree(tmp_path).open_stage(OBJECT, None)
    writer = stage.write(PayloadPath.parse("a"))
    for _ in range(10):
        writer.write(b"x" * 600)
    writer.settle()
    assert len(flushed) == 5
    stage.abort()


def test_space_is_reserved_and_kept_free(tmp_path: Path) -> None:
    """Running transfers count; what would go below min_free is refused with the numbers; given back afterwards."""
    tree = make_tree(tmp_path, min_free=1000, free=3000)
    first = tree.open_stage(OBJECT, 1500)
    with pytest.raises(NoSpace, match="1,500 reserved"):
        tree.open_stage(OBJECT, 600)
    assert tree.room_for(500)
    first.abort()
    first.abort()
    assert tree.room_for(2000)
    assert not tree.room_for(2001)
    tight = make_tree(tmp_path, min_free=5000, free=3000)
    with pytest.raises(NoSpace, match="min_free"):
        put(tight, content=b"")


def test_quarantine_keeps_bytes_and_defects_once(tmp_path: Path) -> None:
    """Kept, found again, replaced by a later quarantine of the same path; no replica."""
    tree = make_tree(tmp_path)
    for content in (b"a", b"b"):
        stage = tree.open_stage(OBJECT, None)
        writer = stage.write(PayloadPath.parse("x.bin"))
        writer.write(content)
        writer.close()
        kept = stage.quarantine(make_manifest(tinker_path=PATH).identity, [Defect(Kind.CONTENT, "odd")])
    (found,) = list(tree.quarantined())
    assert (found.path, found.trouble, found.error, found.quarantine) == (PATH, Trouble.QUARANTINED, "odd", kept)
    assert (tmp_path / kept / "payload" / "x.bin").read_bytes() == b"b"
    assert list(tree.list()) == []


@pytest.mark.parametrize(
    "name", ["x#y", "x?y", "%41", ".hidden", "..", "n" * 300, "caf\u00e9", "cafe\u0301", "a@b", "new\nline"]
)
def test_odd_names_are_found_again(tmp_path: Path, name: str) -> None:
    """The directory can be anything that the rules make; the manifest holds the true name."""
    tree = make_tree(tmp_path)
    path = TinkerPath("run", "weights", name)
    put(tree, path)
    (found,) = list(tree.list())
    assert isinstance(found, Replica)
    assert found.path == path
    assert not found.superseded


def test_case_twins_on_a_folding_filesystem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the filesystem takes two names for one, the second gets the hashed form, and both are kept."""
    tree = make_tree(tmp_path, folds_names=True)
    put(tree, TinkerPath("run", "weights", "Best"), b"upper")
    real = os.path.lexists

    def folding(path: Any) -> bool:
        parent = Path(path).parent
        names = [entry.name.casefold() for entry in parent.iterdir()] if parent.is_dir() else []
        return Path(path).name.casefold() in names or real(path)

    monkeypatch.setattr(os.path, "lexists", folding)
    put(tree, TinkerPath("run", "weights", "best"), b"lower")
    names = sorted(path.name for path in (tmp_path / "run" / "weights").iterdir())
    assert names[0] == "Best"
    assert names[1].startswith("best%~")
    assert {item.path.name for item in tree.list() if isinstance(item, Replica)} == {"Best", "best"}


def test_latest_points_to_the_newest(tmp_path: Path) -> None:
    """By time, whatever the order of arrival, also after the catalog and its memory are gone."""
    newer, older = TinkerPath("run", "weights", "b"), TinkerPath("run", "weights", "a")
    put(make_tree(tmp_path), newer, time=NOW)
    put(make_tree(tmp_path), older, time=NOW - timedelta(hours=1))
    link = tmp_path / "run" / "latest-training"
    assert os.readlink(link) == "weights/b"
    link.unlink()
    make_tree(tmp_path).repoint_latest()
    assert os.readlink(link) == "weights/b"


# Root and lock


def prepared(root: Path, **changes: Any) -> Any:
    """A root as wiring prepares it."""
    fields: dict[str, Any] = {"server": "https://s", "account": None}
    return prepare_root(root, **(fields | changes))


def test_a_root_remembers_whose_it_is(tmp_path: Path) -> None:
    """Server and account are recorded; another one is refused with what to do."""
    prepared(tmp_path / "r")
    prepared(tmp_path / "r", account="alice")
    assert read_facts(tmp_path / "r").account == "alice"  # type: ignore[union-attr]
    prepared(tmp_path / "r", account=None)
    with pytest.raises(WrongRoot, match="account alice"):
        prepared(tmp_path / "r", account="bob")
    with pytest.raises(WrongRoot, match="mirrors https://s"):
        prepared(tmp_path / "r", server="https://other")
    with pytest.raises(WrongRoot, match="state"):
        prepared(tmp_path / "r", state=tmp_path / "elsewhere")
    (tmp_path / "r" / ".tinker-sync" / "root.json").write_text("{")
    with pytest.raises(WrongRoot, match="cannot be read"):
        prepared(tmp_path / "r")


def test_a_root_that_should_be_a_mount_and_is_not(tmp_path: Path) -> None:
    """Refused before anything is written to the disk below."""
    with pytest.raises(WrongRoot, match="must_be_mount"):
        prepared(tmp_path / "r", must_be_mount=True)
    assert not (tmp_path / "r").exists()


def test_the_probe_of_this_filesystem(tmp_path: Path) -> None:
    """A Linux filesystem takes every name and folds none; nothing of the probe stays."""
    facts = prepared(tmp_path / "r")
    assert (facts.portable_names, facts.folds_names) == (False, False)
    assert [path.name for path in (tmp_path / "r" / ".tinker-sync").iterdir()] == ["root.json"]
    assert json.loads((tmp_path / "r" / ".tinker-sync" / "root.json").read_text())["format"] == 1


def test_one_writer_per_root(tmp_path: Path) -> None:
    """The second is told who holds it; a dead holder holds nothing; the file stays."""
    with RootLock(tmp_path / "lock", command="sync"), pytest.raises(RootBusy, match=f"sync, process {os.getpid()}"):
        RootLock(tmp_path / "lock", command="other").__enter__()
    assert (tmp_path / "lock").exists()
    with RootLock(tmp_path / "lock", command="again"):
        pass


# Catalog


def test_the_catalog_knows_what_it_was_told(tmp_path: Path) -> None:
    """Replicas, failures, listings: read back equal; gone is gone only when the listing is complete."""
    row, other = checkpoint("a", timedelta(hours=1), timedelta(hours=2)), checkpoint("b", timedelta(hours=2))
    with SqlCatalog.open(tmp_path / "c.db") as catalog:
        catalog.observe([row, other], NOW, complete=True)
        catalog.add_failure(failure_of(other))
        catalog.add_replica(replica_of(row))
        known = catalog.known()
        assert known.replicas == {row.path: replica_of(row)}
        assert known.failures == {other.path: failure_of(other)}
        assert known.first_expiry[row.path] == (row.time, row.expires_at)
        assert [row for row, _, _ in catalog.unmirrored()] == [other]
        later = Checkpoint(row.path, row.time, row.size_bytes, expires_at=NOW + timedelta(days=9))
        catalog.observe([later], NOW, complete=False)
        assert catalog.known().first_expiry[row.path] == (row.time, row.expires_at), "the first expiry counts"
        assert {c.path for c in catalog.listed()} == {row.path, other.path}, "absence from a sighting proves nothing"
        catalog.observe([later], NOW, complete=True)
        assert {c.path for c in catalog.listed()} == {row.path}
        assert catalog.known().failures == {}
        catalog.mark_verified(replica_of(row).directory, NOW, ["x: bad"])
        assert catalog.known().replicas[row.path].damaged == ("x: bad",)
        assert catalog.counts()["damaged"] == 1
    assert (tmp_path / "c.db").stat().st_mode & 0o777 == 0o600


def test_a_catalog_that_is_none_is_said_to_be(tmp_path: Path) -> None:
    """Missing, garbage, another version: each with the way out."""
    with pytest.raises(CatalogMissing, match="reindex"):
        SqlCatalog.open(tmp_path / "none.db", read_only=True)
    (tmp_path / "bad.db").write_bytes(b"this is no database, " * 100)
    with pytest.raises(CatalogUnusable, match="reindex"):
        SqlCatalog.open(tmp_path / "bad.db")
    with SqlCatalog.open(tmp_path / "old.db") as catalog, catalog._engine.begin() as connection:
        connection.exec_driver_sql("UPDATE facts SET value = '0' WHERE name = 'schema_version'")
    with pytest.raises(CatalogUnusable, match="schema version 0"):
        SqlCatalog.open(tmp_path / "old.db")


def test_manifests_of_replicas_survive_unknown_formats(tmp_path: Path) -> None:
    """A manifest of a later format is damage in words, not a crash."""
    tree = make_tree(tmp_path)
    put(tree)
    path = tmp_path / "run:train:0" / "weights" / "000020" / ".tinker-sync.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 9'))
    (found,) = list(tree.list())
    assert isinstance(found, Damage)
    assert "format 9" in str(found.defects[0])
