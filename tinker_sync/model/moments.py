"""Points in time: always aware, always UTC, microseconds as integers where a number is needed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

UNKNOWN_TIME = datetime(1970, 1, 1, tzinfo=UTC)
"""Stands where the service gave no usable time. It sorts as the oldest and matches itself."""

FAR_FUTURE = datetime(9999, 1, 1, tzinfo=UTC)
"""Stands for an expiry that is there and cannot be read: some day, which is not never."""

_EPOCH = UNKNOWN_TIME
_MICROSECOND = timedelta(microseconds=1)


def parse_time(text: str) -> datetime:
    """Read RFC 3339 or ISO 8601; a naive time is UTC (some servers send those).

    Raises ValueError.
    """
    moment = datetime.fromisoformat(text.strip())
    if moment.tzinfo is UTC:
        return moment
    if moment.tzinfo is None:
        return moment.replace(tzinfo=UTC)
    try:
        return moment.astimezone(UTC)
    except OverflowError as error:
        message = f"{text!r} is outside the years that can be represented"
        raise ValueError(message) from error


def rfc3339(moment: datetime) -> str:
    """`2026-01-01T00:00:00Z`, with a fraction only where there is one."""
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


def compact(moment: datetime) -> str:
    """`20260101T000000Z`, as it stands in the name of a superseded replica."""
    return moment.astimezone(UTC).strftime("%Y%m%dT%H%M%SZ")


def to_micros(moment: datetime) -> int:
    """Microseconds since 1970, exactly (no float on the way)."""
    return (moment - _EPOCH) // _MICROSECOND


def from_micros(micros: int) -> datetime:
    """The inverse of `to_micros`."""
    return _EPOCH + timedelta(0, 0, micros)  # by place: half the time
