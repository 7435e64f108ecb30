"""The documents say what is so."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import typer.main

from tests.conftest import command
from tinker_sync.cli import remote
from tinker_sync.cli.app import app

TOP = Path(__file__).parents[1]
README = (TOP / "README.md").read_text()


def commands() -> list[str]:
    """The README's code blocks of shell."""
    return [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


def test_ci_runs_the_readmes_test_command() -> None:
    """To the letter."""
    (test_command,) = [line for line in commands() if "pytest" in line]
    assert test_command in (TOP / ".ci" / "run").read_text().splitlines()


def test_every_command_is_in_the_readme() -> None:
    """And every command in its table exists."""
    known = set(typer.main.get_command(app).commands) | {"remote"}  # type: ignore[attr-defined]
    table = README.split("| command | does |")[1].split("\n\n")[0]
    named = set(re.findall(r"`([a-z-]+)[^`]*`", "\n".join(row.split("|")[1] for row in table.splitlines()[2:])))
    assert named == known


def test_every_documented_call_has_a_remote_command() -> None:
    """Reading, publishing, deleting, TTLs."""
    have = set(typer.main.get_command(remote.app).commands)  # type: ignore[attr-defined]
    assert have >= {
        "runs", "run", "checkpoints", "weights-info", "archive-url", "external-urls", "sessions", "session", "sampler",
        "capabilities", "usage", "publish", "unpublish", "delete", "set-ttl",
    }  # fmt: skip


def test_every_module_says_its_job() -> None:
    """The first docstring line of each module."""
    for path in (TOP / "tinker_sync").rglob("*.py"):
        assert path.read_text().startswith('"""'), path


def test_the_architecture_names_every_module() -> None:
    """The layers' table is complete."""
    text = (TOP / "docs" / "ARCHITECTURE.md").read_text()
    for path in (TOP / "tinker_sync").iterdir():
        if path.name.startswith("_") or path.suffix not in ("", ".py"):
            continue
        assert f"`{path.stem}" in text, path.name


def test_nothing_of_a_machine_is_in_the_tree() -> None:
    """No absolute path of a workplace in any file."""
    listed = subprocess.run(["git", "ls-files"], cwd=TOP, capture_output=True, text=True, check=False)
    names = listed.stdout.split() if listed.returncode == 0 else [str(p.relative_to(TOP)) for p in TOP.rglob("*.py")]
    for name in names:
        text = (TOP / name).read_text(errors="replace")
        assert not re.search(r"/(root|home/[a-z]+|work)/(?!\.local)", text), name


def test_the_command_is_installed() -> None:
    """Also as a module."""
    installed = subprocess.run(command("--version"), capture_output=True, text=True, check=True).stdout
    module = subprocess.run(
        [command()[0].replace("tinker-sync", "python"), "-m", "tinker_sync", "--version"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert installed == module == "tinker-sync 0.1.0\n"
