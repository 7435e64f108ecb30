"""How a tinker path becomes a directory below the root, and back.

In a component `%`, `@`, `/`, NUL and control characters, a leading `.`, and the names `.` and `..` are
percent-encoded. `portable` also encodes what Windows and SMB refuse. A component that is then over 200 bytes, or that
the filesystem already holds for another name, becomes its first 150 bytes, `%~` and 16 hex digits of the SHA-256 of
the true name; that form cannot be decoded, the manifest holds the true name.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote_to_bytes

from tinker_sync.model.moments import compact

if TYPE_CHECKING:
    from datetime import datetime


_LONGEST_BYTES: Final = 200
_KEPT_BYTES: Final = 150
_ALWAYS: Final = re.compile(r"[%@/\x00-\x1f\x7f-\x9f]")
_PORTABLE: Final = re.compile(r"[%@/\x00-\x1f\x7f-\x9f<>:\"\\|?*]|[. ]$")
_WINDOWS_DEVICES: Final = re.compile(r"(?i)(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")
_HASHED: Final = re.compile(r"%~[0-9a-f]{16}$")


def encode_component(name: str, *, portable: bool = False) -> str:
    """The directory name of one component of a tinker path."""
    if name in (".", ".."):
        return "%2E" * len(name)
    encoded = (_PORTABLE if portable else _ALWAYS).sub(_percent, name)
    if encoded.startswith("."):
        encoded = "%2E" + encoded[1:]
    if portable and _WINDOWS_DEVICES.fullmatch(name):
        encoded = _percent_text(name[0]) + encoded[1:]
    if len(encoded.encode()) > _LONGEST_BYTES:
        return hashed_component(name, portable=portable)
    return encoded


def hashed_component(name: str, *, portable: bool = False) -> str:
    """The form for names that are too long or whose plain form is taken by another name."""
    encoded = (_PORTABLE if portable else _ALWAYS).sub(_percent, name)
    if encoded.startswith("."):
        encoded = "%2E" + encoded[1:]
    kept = encoded.encode()[:_KEPT_BYTES].decode(errors="ignore")
    return f"{kept}%~{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def decode_component(component: str) -> str | None:
    """The true name, or None for a hashed form, whose name only the manifest knows."""
    if _HASHED.search(component):
        return None
    return unquote_to_bytes(component).decode(errors="replace")


def superseded_name(component: str, time: datetime) -> str:
    """`<name>@20260101T000000Z`; no encoded name holds an `@` of its own."""
    return f"{component}@{compact(time)}"


def is_superseded(component: str) -> bool:
    """Whether a directory name is that of a superseded version."""
    return "@" in component


def _percent(match: re.Match[str]) -> str:
    return _percent_text(match.group())


def _percent_text(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode())
