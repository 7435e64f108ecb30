"""What commands print: plain text for people, one JSON document for programs. No imports that cost."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime

    from tinker_sync.retention import Breaker


def print_json(document: object) -> None:
    """One document on stdout."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(document, indent=2)
    _write(text)


def size(number: float) -> str:
    """`1.4 GB`, decimal as storage is billed."""
    from humanize import naturalsize  # noqa: PLC0415

    return naturalsize(number, format="%.1f")


def ago(moment: datetime, now: datetime) -> str:
    """`3 minutes ago`."""
    from humanize import naturaltime  # noqa: PLC0415

    try:
        return naturaltime(now - moment)
    except OverflowError:
        return moment.date().isoformat()


def ahead(moment: datetime, now: datetime) -> str:
    """`in 3 hours`, or `3 hours ago`."""
    from humanize import naturaldelta  # noqa: PLC0415

    try:
        return f"in {naturaldelta(moment - now)}" if moment > now else f"{naturaldelta(now - moment)} ago"
    except OverflowError:
        return moment.date().isoformat()


def breaker(tripped: Breaker, what: str) -> None:
    """The stop on mass deletion, with its numbers and the way out."""
    say(
        f"BREAKER: {tripped.deletes} deletes of {tripped.listed} listed are over max_deletes = {tripped.max_deletes} "
        f"or max_delete_fraction = {tripped.max_delete_fraction}: none {what}. Look at `tinker-sync plan`; if they are "
        f"meant: `tinker-sync prune --apply --allow {tripped.deletes}`"
    )


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Columns with a header; numbers are given as text already."""
    from rich.box import SIMPLE_HEAD  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    grid = Table(*headers, box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in grid.columns:
        column.overflow = "fold"
    for row in rows:
        grid.add_row(*(Text(printable(str(cell))) for cell in row))
    on_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if on_terminal else 240
    text = io.StringIO()
    Console(width=width, highlight=False, file=text, force_terminal=on_terminal).print(grid)
    _write("\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines()))


def printable(text: str) -> str:
    """Without control characters: a checkpoint's name must not be able to drive a terminal."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def say(text: str) -> None:
    """A line for people on stdout."""
    _write(printable(text))


def _write(text: str) -> None:
    """A reader that has gone (`| head`) ends no work: the rest is for nobody."""
    try:
        typer.echo(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def warn(text: str) -> None:
    """A line for people on stderr."""
    typer.echo(printable(text), err=True)
