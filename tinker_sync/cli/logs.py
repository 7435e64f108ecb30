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

from tinker_sync.errors import place_of
from tinker_sync.model.news import News

if TYPE_CHECKING:
    from collections.abc import MutableMapping

_PRIORITY = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}


def set_up_logging(level: str, style: str) -> None:
    """`style` is `auto`, `console` or `json`.

    `sys.stderr` is looked up for each line: while bars are drawn it is a proxy that puts lines above them.
    """
    _take_in_libraries()
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


class _OneLine(logging.Handler):
    """What libraries log, as a line of ours: without traceback, whose variables and texts could hold a secret."""

    def __init__(self) -> None:
        super().__init__()
        self._news = News()

    def emit(self, record: logging.LogRecord) -> None:
        """One record."""
        error = record.exc_info[1] if record.exc_info else None
        more = {} if error is None else {"error": type(error).__name__, "at": place_of(error)}
        words = record.getMessage().splitlines()[0] if record.name == "asyncio" else "a request could not be answered"
        if self._news.is_new(record.name, f"{words} {more}"):  # some repeat themselves a thousand times a second
            structlog.get_logger().warning("library.trouble", library=record.name, said=words[:200], **more)


def _take_in_libraries() -> None:
    for name, level in (("asyncio", logging.ERROR), ("aiohttp.server", logging.CRITICAL)):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.propagate = False
        if not any(isinstance(handler, _OneLine) for handler in logger.handlers):
            logger.addHandler(_OneLine())


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
