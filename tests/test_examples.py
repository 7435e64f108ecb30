"""The three configurations of docs/RETENTION.md, as they stand there, do what the page says."""

from __future__ import annotations

import re
import tomllib
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import NOW
from tests.test_pure import replica_of
from tinker_sync.config import Settings
from tinker_sync.inventory import Holdings, decide
from tinker_sync.model.checkpoint import Checkpoint
from tinker_sync.model.paths import TinkerPath
from tinker_sync.planning import Known
from tinker_sync.wiring import retention_rules

PAGE = (Path(__file__).parents[1] / "docs" / "RETENTION.md").read_text()
CHAPTERS = PAGE.split("## Three configurations")[1].split("## Watching it")[0].split("\n### ")[1:]


def chapter(number: int) -> tuple[Settings, str]:
    """The configuration of one, and what is said of it."""
    found = re.search(r"```toml\n(.*?)```\n(.*)", CHAPTERS[number], re.DOTALL)
    assert found is not None
    text = found.group(1).replace("[mirror]", '[tinker]\nbase_url = "https://tinker.thinkingmachines.dev"\n[mirror]')
    document: dict[str, Any] = tomllib.loads(text)
    document.setdefault("tinker", {"base_url": "https://tinker.thinkingmachines.dev"})
    return Settings.model_validate(document), found.group(2)


def cookbook_run() -> list[Checkpoint]:
    """`000020` to `002000` in both types, every half hour, with a loss that is least at 001000 and 001020; `final`."""
    begin = NOW - timedelta(days=9)
    rows = []
    for kind in ("weights", "sampler_weights"):
        for n in range(1, 101):
            loss = {"eval_loss": str(abs(n * 20 - 1010) / 1000)}
            at = begin + n * timedelta(minutes=30)
            rows.append(Checkpoint(TinkerPath("run", kind, f"{n * 20:06}"), at, 10**9, user_metadata=loss))
        at = begin + 101 * timedelta(minutes=30)
        rows.append(Checkpoint(TinkerPath("run", kind, "final"), at, 10**9, user_metadata={"eval_loss": "0.9"}))
    return rows


def staying(settings: Settings) -> dict[tuple[str, str], set[str]]:
    """By side and segment, the names that stay."""
    rows = cookbook_run()
    holdings = Holdings(known=Known({row.path: replica_of(row) for row in rows}))
    decision = decide(
        rows, holdings, retention_rules(settings), now=NOW, complete=True, short_ttl=settings.mirror.short_ttl
    )
    found: dict[tuple[str, str], set[str]] = {}
    for verdict in decision.plan.verdicts:
        if verdict.action == "keep":
            found.setdefault((verdict.side, verdict.path.segment), set()).add(verdict.path.name)
    return found


def named(said: str) -> set[str]:
    """The checkpoints that the page names first."""
    found = re.search(r"`(\d{6}(?: \d{6})*(?: final)?)`", said)
    assert found is not None
    return set(found.group(1).split())


EVERYTHING = {row.path.name for row in cookbook_run()}


def test_samplers_thin_out() -> None:
    """States are never touched, and everything stays here."""
    settings, said = chapter(0)
    left = staying(settings)
    assert left["remote", "sampler_weights"] == named(said)
    assert left["remote", "weights"] == left["local", "weights"] == left["local", "sampler_weights"] == EVERYTHING


def test_states_expire() -> None:
    """The last two hours stay, `final` too; a week to think it over."""
    settings, said = chapter(1)
    left = staying(settings)
    assert left["remote", "weights"] == named(said) | {"final"}
    assert left["remote", "sampler_weights"] == EVERYTHING
    assert (settings.retention.action, settings.grace) == ("expire", timedelta(days=7))


def test_a_small_disk() -> None:
    """Here the best and the last, upstream everything."""
    settings, said = chapter(2)
    left = staying(settings)
    assert left["local", "sampler_weights"] == {"final", "002000", "001000", "001020"}
    assert left["remote", "sampler_weights"] == left["remote", "weights"] == left["local", "weights"] == EVERYTHING
    assert "`002000`" in said


def test_the_page_says_in_bold_what_cannot_be_undone() -> None:
    """Both here and in the README."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    for text in (PAGE, readme):
        assert re.search(r"\*\*Deleting a `training` checkpoint ends resuming from it on Tinker", text)
    assert "### The day it is gone" in readme


def test_there_are_three() -> None:
    """No more, no less."""
    assert len(CHAPTERS) == 3
    with pytest.raises(IndexError):
        chapter(3)
