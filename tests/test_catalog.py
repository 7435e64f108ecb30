"""What the catalog keeps in memory is what its tables hold, whatever was written in between."""

from __future__ import annotations

import random
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from tests.conftest import NOW
from tinker_sync.catalog.store import SqlCatalog
from tinker_sync.model.checkpoint import Checkpoint
from tinker_sync.model.paths import TinkerPath
from tinker_sync.model.work import Failure, Replica, Trouble
from tinker_sync.planning import Selection, plan_transfers

if TYPE_CHECKING:
    from pathlib import Path

PATHS = [TinkerPath.parse(f"tinker://r:train:{run}/weights/{name}") for run in range(3) for name in range(4)]


def a_replica(path: TinkerPath, version: int, directory: str = "", *, superseded: bool = False) -> Replica:
    """A replica that nobody has."""
    return Replica(
        path=path,
        time=NOW + timedelta(hours=version),
        size_bytes=10,
        directory=directory or f"{path.run_id}/{path.name}",
        total_bytes=10,
        files=1,
        fidelity="exact",
        source="archive",
        committed_at=NOW,
        verified_at=NOW,
        manifest_sha256="0" * 64,
        superseded=superseded,
    )


def a_failure(path: TinkerPath, trouble: Trouble) -> Failure:
    """A failure of that path."""
    return Failure(path, NOW, 10, trouble, 1, "cut", NOW, NOW)


@pytest.mark.parametrize("seed", range(8))
def test_memory_is_what_the_tables_hold(tmp_path: Path, seed: int) -> None:
    """A random history, looked at after each step by a reader of its own."""
    chance = random.Random(seed)
    file = tmp_path / "catalog.db"
    with SqlCatalog.open(file) as catalog:
        catalog.known()
        for step in range(150):
            path = chance.choice(PATHS)
            directory = f"{path.run_id}/{path.name}"
            what = chance.randrange(7)
            if what == 0:
                catalog.add_replica(a_replica(path, chance.randrange(3), directory))
            elif what == 1:
                old = f"{path.run_id}/{path.name}@{step}"
                catalog.replace_superseded(path, [a_replica(path, step, old, superseded=True)])
            elif what == 2:
                catalog.remove_replica(directory)
            elif what == 3:
                catalog.mark_verified(directory, NOW + timedelta(days=step), chance.choice([[], ["sha256 differs"]]))
            elif what == 4:
                catalog.add_failure(a_failure(path, chance.choice(list(Trouble))))
            else:
                rows = [
                    Checkpoint(one, NOW + timedelta(hours=chance.randrange(2)), 10, expires_at=NOW + timedelta(days=1))
                    for one in chance.sample(PATHS, 5)
                ]
                catalog.observe(rows, NOW, complete=what == 5)
            shown = chance.sample(PATHS, chance.randrange(len(PATHS)))
            with SqlCatalog.open(file, read_only=True) as reader:
                listed, of_missing = reader.listed(), reader.known_of_missing()
                lacks = reader.lacks(shown, 0.5)
                assert catalog.known() == reader.known()
            plans = [
                plan_transfers(listed, known, Selection(), now=NOW)
                for known in (of_missing, catalog.known_of_missing())
            ]
            assert plans[0] == plans[1], "what is left unread of the mirrored changes no plan"
            assert (
                lacks is catalog.lacks(shown, 0.5) is (sum(row.path not in shown for row in listed) > len(listed) / 2)
            )


def test_a_plan_in_the_making_is_not_disturbed(tmp_path: Path) -> None:
    """What was handed out stays as it was; the same object comes again while nothing changes."""
    with SqlCatalog.open(tmp_path / "catalog.db") as catalog:
        first = catalog.known()
        assert catalog.known() is first
        catalog.add_replica(a_replica(PATHS[0], 1))
        assert first.replicas == {}
        assert set(catalog.known().replicas) == {PATHS[0]}
