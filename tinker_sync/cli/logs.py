"""Logging: structlog to stderr, colours on a terminal, JSON or journald priorities elsewhere.

A dotted event and keys; nothing that went through `SignedUrl` or `SecretStr` can show its secret, and no exception
text holds one.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Any

import structlog

if TYPE_CHECKING:
    from collections.abc import MutableMapping

_PRIORITY = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}


def set_up_logging(level: str, style: str) -> None:
    """`style` is `auto`, `console` or `json`.

    `sys.stderr` is looked up for each line: while bars are drawn it is a proxy that puts lines above them.
    """
    chosen = style if style != "auto" else "console" if sys.stderr.isatty() else "plain"
    processors: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        _printable_values,
    ]
    if chosen == "json":
        processors += [structlog.processors.TimeStamper(fmt="iso", utc=True), structlog.processors.JSONRenderer()]
    elif chosen == "console":
        processors += [
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            structlog.dev.ConsoleRenderer(pad_event_to=24),
        ]
    elif "JOURNAL_STREAM" in os.environ:
        processors += [_journald]
    else:
        processors += [
            structlog.processors.TimeStamper(fmt="%Y-%m-%dT%H:%M:%SZ", utc=True),
            structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"]),
        ]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
        cache_logger_on_first_use=False,
    )


def _printable_values(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A checkpoint's name is user input: no control characters reach a terminal or a line-based log."""
    for key, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            event[key] = "".join(character if character.isprintable() else "\ufffd" for character in value)
    return event


def _journald(_: Any, __: str, event: MutableMapping[str, Any]) -> str:
    level = event.pop("level", "info")
    text = structlog.processors.LogfmtRenderer(key_order=["event"])(None, "", event)
    return f"<{_PRIORITY.get(level, 6)}>{text}"
