"""Which payload names were seen, and which of them some filesystem would take for one another."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinker_sync.model.paths import PayloadPath


class NameRegister:
    """The names of one payload. Thread-safe enough for one writer at a time."""

    def __init__(self) -> None:
        self._files: dict[tuple[str, ...], PayloadPath] = {}
        self._directories: dict[tuple[str, ...], tuple[str, ...]] = {}

    def add(self, path: PayloadPath, *, is_directory: bool = False) -> str | None:
        """Take one more name; returns what is wrong with it, or None."""
        folded = path.folded
        for depth in range(1, len(path.parts) + (1 if is_directory else 0)):
            above, true = folded[:depth], path.parts[:depth]
            if above in self._files:
                return f"is below {'/'.join(true)!r}, which is a file"
            known = self._directories.setdefault(above, true)
            if known != true:
                return f"differs from {'/'.join(known)!r} only by case or Unicode form"
        if is_directory:
            return None
        if folded in self._directories:
            return "is a file and a directory at once"
        other = self._files.setdefault(folded, path)
        if other is path:
            return None
        if other == path:
            return "stands there twice"
        return f"differs from {str(other)!r} only by case or Unicode form"
