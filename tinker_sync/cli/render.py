"""What commands print: plain text for people, one JSON document for programs. No imports that cost."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime


def print_json(document: object) -> None:
    """One document on stdout."""
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False))


def size(number: float) -> str:
    """`1.4 GB`, decimal as storage is billed."""
    from humanize import naturalsize  # noqa: PLC0415

    return naturalsize(number, format="%.1f")


def ago(moment: datetime, now: datetime) -> str:
    """`3 minutes ago`."""
    from humanize import naturaltime  # noqa: PLC0415

    return naturaltime(now - moment)


def ahead(moment: datetime, now: datetime) -> str:
    """`in 3 hours`, or `3 hours ago`."""
    from humanize import naturaldelta  # noqa: PLC0415

    return f"in {naturaldelta(moment - now)}" if moment > now else f"{naturaldelta(now - moment)} ago"


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
    width = None if sys.stdout.isatty() else 240
    Console(width=width, highlight=False, soft_wrap=False).print(grid)


def printable(text: str) -> str:
    """Without control characters: a checkpoint's name must not be able to drive a terminal."""
    return "".join(character if character.isprintable() or character == "\n" else "\ufffd" for character in text)


def say(text: str) -> None:
    """A line for people on stdout."""
    typer.echo(printable(text))


def warn(text: str) -> None:
    """A line for people on stderr."""
    typer.echo(printable(text), err=True)
