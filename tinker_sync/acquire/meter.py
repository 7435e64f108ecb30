"""Computes, as bytes go by, exactly those digests that the storage promised."""

from __future__ import annotations

import hashlib
import zlib
from typing import TYPE_CHECKING, Protocol

import google_crc32c

from tinker_sync.model.evidence import SeenBody

if TYPE_CHECKING:
    from tinker_sync.model.evidence import Claim


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...
    def digest(self) -> bytes: ...


class _Crc32:
    def __init__(self) -> None:
        self._value = 0

    def update(self, data: bytes, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(4, "big")


def _make(algorithm: str) -> _Hash | None:
    if algorithm == "crc32":
        return _Crc32()
    if algorithm == "crc32c":
        return google_crc32c.Checksum()  # type: ignore[no-untyped-call]
    if algorithm in ("md5", "sha1", "sha256"):
        return hashlib.new(algorithm, usedforsecurity=False)
    return None


class BodyMeter:
    """Length and digests of one body."""

    def __init__(self, claim: Claim) -> None:
        self._hashes = {name: made for name in claim.digests if (made := _make(name)) is not None}
        self._length = 0

    def update(self, data: bytes) -> None:
        """Take the next bytes; blocking."""
        self._length += len(data)
        for made in self._hashes.values():
            made.update(data)

    @property
    def length(self) -> int:
        """Bytes so far."""
        return self._length

    def seen(self) -> SeenBody:
        """What went by."""
        return SeenBody(self._length, {name: made.digest() for name, made in self._hashes.items()})
