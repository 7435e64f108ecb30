"""The journal: a chain that is only added to, and what is made of it."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import NOW
from tinker_sync.catalog.store import SqlCatalog
from tinker_sync.journal import ACTIVE, FIRST, Journal, JournalBroken, examine, read_events
from tinker_sync.model.checkpoint import Checkpoint
from tinker_sync.model.deeds import Deed, fold
from tinker_sync.model.moments import rfc3339
from tinker_sync.model.paths import TinkerPath

if TYPE_CHECKING:
    from pathlib import Path

PATH = TinkerPath("run", "weights", "000020")


def event(name: str, **facts: Any) -> dict[str, Any]:
    """About one checkpoint."""
    return {
        "time": rfc3339(NOW), "event": name, "tinker_path": str(PATH), "checkpoint_time": rfc3339(NOW), **facts,
    }  # fmt: skip


def write(state: Path, count: int, **options: Any) -> None:
    """So many events."""
    with Journal(state, **options) as journal:
        for n in range(count):
            journal.append(event("delete.intent", n=n))


def test_each_line_follows_the_one_before(tmp_path: Path) -> None:
    """Also over restarts; the first follows nothing; the last hash is told."""
    write(tmp_path, 3)
    write(tmp_path, 2)
    found = examine(tmp_path)
    assert (found.lines, found.files, found.problems) == (5, 1, [])
    lines = (tmp_path / ACTIVE).read_bytes().splitlines()
    assert json.loads(lines[0])["prev"] == FIRST
    assert found.last != json.loads(lines[-1])["prev"]
    assert (tmp_path / ACTIVE).stat().st_mode & 0o777 == 0o600
    assert [item["n"] for _, item in read_events(tmp_path)] == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("how", ["edit", "remove", "swap", "insert", "garbage"])
def test_every_edit_in_the_middle_is_found(tmp_path: Path, how: str) -> None:
    """And named by its line; a cut tail is not, which is why the last hash is shown."""
    write(tmp_path, 6)
    path = tmp_path / ACTIVE
    lines = path.read_bytes().splitlines(keepends=True)
    if how == "edit":
        lines[2] = lines[2].replace(b'"n":2', b'"n":9')
    elif how == "remove":
        del lines[2]
    elif how == "swap":
        lines[2], lines[3] = lines[3], lines[2]
    elif how == "insert":
        lines.insert(3, lines[3])
    else:
        lines[3] = b"\x00\xff not json\n"
    path.write_bytes(b"".join(lines))
    found = examine(tmp_path)
    assert found.problems
    assert "line" in found.problems[0]
    write(tmp_path, 1)
    assert len(examine(tmp_path).problems) >= len(found.problems), "writing on hides nothing"


def test_a_torn_last_line_is_repaired_at_start(tmp_path: Path) -> None:
    """Readers pass over it meanwhile; the chain goes on from the last whole line."""
    write(tmp_path, 3)
    path = tmp_path / ACTIVE
    whole = path.read_bytes()
    for torn in (b"{", b'{"time":"2026', b"\x00" * 5000):
        path.write_bytes(whole + torn)
        assert len(list(read_events(tmp_path))) == 3
        assert examine(tmp_path).problems == []
        with Journal(tmp_path) as journal:
            assert journal.dropped == len(torn)
        assert path.read_bytes() == whole
    path.write_bytes(b"{torn")
    write(tmp_path, 1)
    assert examine(tmp_path).problems == []


def test_it_rotates_without_losing_the_chain(tmp_path: Path) -> None:
    """The first line of the next file follows the last of the one before; a file that is taken away is missed."""
    write(tmp_path, 20, rotate_at=1000)
    write(tmp_path, 20, rotate_at=1000)
    found = examine(tmp_path)
    assert found.files > 5
    assert (found.lines, found.problems) == (40, [])
    assert [item["n"] for _, item in read_events(tmp_path)] == [*range(20), *range(20)]
    middle = sorted(tmp_path.glob("journal-*.jsonl"))[3]
    kept = middle.read_bytes()
    middle.unlink()
    assert "missing" in examine(tmp_path).problems[0]
    middle.write_bytes(kept)
    min(tmp_path.glob("journal-*.jsonl")).unlink()
    assert examine(tmp_path).problems == ["journal-000002.jsonl is the oldest file here: 1 before it are missing"]


def test_positions_lead_on_over_rotation(tmp_path: Path) -> None:
    """What was taken up is not taken up again, and nothing is passed over."""
    with Journal(tmp_path, rotate_at=600) as journal:
        positions = [journal.append(event("delete.intent", n=n)) for n in range(12)]
    for done, position in enumerate(positions):
        assert [item["n"] for _, item in read_events(tmp_path, position)] == list(range(done + 1, 12))


def test_a_line_that_cannot_be_written_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk in the middle of a line leaves the chain whole; a failed fsync is final."""
    with Journal(tmp_path) as journal:
        journal.append(event("delete.intent"))
        real = os.write

        def full(descriptor: int, data: Any) -> int:
            if len(data) <= 10:
                raise OSError(28, "No space left on device")
            return real(descriptor, bytes(data)[:-10])

        with monkeypatch.context() as patched:
            patched.setattr(os, "write", full)
            with pytest.raises(JournalBroken, match="No space left"):
                journal.append(event("delete.intent"))
        journal.append(event("delete.outcome", outcome="deleted"))
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(5, "Input/output error")))
            with pytest.raises(JournalBroken):
                journal.append(event("delete.intent"))
        with pytest.raises(JournalBroken, match="could not be flushed"):
            journal.append(event("delete.intent"))
    assert examine(tmp_path).problems == []


steps = st.lists(
    st.sampled_from(
        [
            event("delete.intent"),
            event("delete.outcome", outcome="deleted"),
            event("delete.outcome", outcome="refused", retry_at=rfc3339(NOW + timedelta(days=1)), answer="403"),
            event("delete.outcome", outcome="not-done"),
            event("delete.confirmed"),
            event("ttl.intent", action="expire", ends_at=rfc3339(NOW + timedelta(days=7))),
            event("ttl.intent", action="restore", former_expires_at=None, ends_at=rfc3339(NOW + timedelta(days=7))),
            event("ttl.outcome", outcome="set"),
            event("ttl.outcome", outcome="failed"),
            event("ttl.confirmed", ends_at=rfc3339(NOW + timedelta(days=6))),
            event("ttl.over"),
            event("local.trashed"),
            event("an.event.of.tomorrow"),
            {"event": "delete.intent", "tinker_path": str(PATH), "time": "broken"},
        ]
    ),
    max_size=12,
)


@given(steps)
@settings(max_examples=60, deadline=None)
def test_the_catalog_comes_to_what_folding_comes_to(told: list[dict[str, Any]]) -> None:
    """One by one, all at once, or with broken events between."""
    expected: Deed | None = None
    for item in told:
        try:
            expected = fold(expected, item)
        except (KeyError, ValueError):
            continue
    from sqlalchemy import create_engine
    from sqlalchemy.pool import StaticPool

    def catalog() -> SqlCatalog:
        made = SqlCatalog(create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False}))
        made._check(read_only=False)
        return made

    with catalog() as one, catalog() as two:
        for n, item in enumerate(told):
            one.apply([((1, n), item)])
        two.apply([((1, n), item) for n, item in enumerate(told)])
        assert one.deeds() == two.deeds() == ({} if expected is None else {expected.key: expected})
        assert one.journal_position() == two.journal_position()


def test_a_restore_that_failed_is_still_to_be_done() -> None:
    """The TTL runs on, and the way back stays known."""
    deed = None
    former = rfc3339(NOW + timedelta(days=30))
    for item in (
        event("ttl.intent", action="expire", former_expires_at=former, ends_at=rfc3339(NOW + timedelta(days=7))),
        event("ttl.outcome", outcome="set"),
        event("ttl.intent", action="restore", former_expires_at=former, ends_at=rfc3339(NOW + timedelta(days=7))),
        event("ttl.outcome", outcome="failed"),
    ):
        deed = fold(deed, item)
    assert deed is not None
    assert deed.is_ours_to_undo
    assert deed.former_expires_at == NOW + timedelta(days=30)
    assert deed.concerns(Checkpoint(PATH, NOW))
    assert not deed.concerns(Checkpoint(PATH, NOW + timedelta(seconds=1)))
