"""When the next poll is due: the interval, and longer ones while the service is in trouble. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tinker_sync.errors import CredentialMissing, CredentialRefused, ServiceTrouble, TinkerSyncError

_SHORT_INTERVAL: Final = 30.0
_LONGEST: Final = 900.0
_CREDENTIAL_FIRST: Final = 60.0


@dataclass(slots=True)
class Backoff:
    """Seconds until the next poll. `interval` is what the configuration says."""

    interval: float
    failures: int = 0

    def after_success(self) -> float:
        """All is well again."""
        self.failures = 0
        return self.interval

    def after(self, error: TinkerSyncError, jitter: float) -> float:
        """Doubling from the interval, at most 15 minutes; a refused credential from one minute on.

        At poll intervals under 30 s nothing exceeds 30 s. `jitter` in [0, 1) takes up to a fifth off. What the service
        itself asks for is obeyed.
        """
        self.failures += 1
        credential = isinstance(error, CredentialMissing | CredentialRefused)
        first = max(self.interval, _CREDENTIAL_FIRST) if credential else self.interval
        longest = _SHORT_INTERVAL if self.interval < _SHORT_INTERVAL else _LONGEST
        doubled: float = first * (1 << min(self.failures - 1, 20))
        delay = min(doubled, longest) * (1 - jitter / 5)
        asked = error.retry_after if isinstance(error, ServiceTrouble) else None
        return max(delay, min(asked or 0.0, longest))
