"""What the server can be told to do wrong, and the habits of other servers that it can take on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Where = Literal["list", "run", "archive", "storage", "urls", "delete", "deleted", "ttl", "any"]
Kind = Literal[
    "status",
    "cut",
    "stall",
    "body",
    "close",
    "close-cut",
    "wrong-digest",
    "corrupt",
    "drop",
    "html",
    "slow",
    "bad-chunk",
    "whole",
    "wrong-range",
]


@dataclass(slots=True)
class Fault:
    """One way to misbehave, for a number of requests."""

    where: Where
    kind: Kind
    times: int = 1_000_000
    """How many requests it spoils; then it is over."""
    match: str = ""
    """Only requests whose checkpoint (`run/segment/name`) or offset contains this."""
    status: int = 500
    at: int = 0
    """Bytes of an answer that come before a cut or a stall; the byte of the object that is flipped."""
    seconds: float = 30.0
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    def applies(self, where: Where, subject: str) -> bool:
        """Whether it spoils this request; counts down when it does."""
        if self.times <= 0 or self.where not in (where, "any") or self.match not in subject:
            return False
        self.times -= 1
        return True


@dataclass(slots=True)
class Quirks:
    """Habits of other servers that speak the API."""

    page_cap: int = 1_000_000
    """The most rows of a page, whatever was asked for."""
    no_cursor: bool = False
    no_user_listing: bool = False
    """`/checkpoints` is 404, as in SkyRL."""
    training_only_listing: bool = False
    """`/checkpoints` leaves samplers out, as in TuFT."""
    bare_ids: bool = False
    """`checkpoint_id` without its segment; archives only under the bare id."""
    naive_times: bool = False
    no_sizes: bool = False
    archive_json: bool = False
    """The coming contract: 200 with JSON instead of 302."""
    archive_direct: bool = False
    """Bytes at once, without a length, as in MinT."""
    relative_location: bool = False
    no_archives: int = 0
    """Answer every archive with this status, as servers that dropped the call."""
    building_seconds: float = 0.0
    """How long an archive is being made when it is first asked for."""
    jwt: bool = False
    url_life: float = 900.0
    ranges: bool = True
    """`Range` is honoured, and guarded by `If-Range`."""
    etags: bool = True
    """Every object has a strong one, also where it is no digest."""
    digests: bool = True
    no_config_route: bool = False
    delete_takes_twin: bool = False
    """Both types of a name share a directory, as in TuFT: deleting one destroys both."""
    twin_stays_listed: bool = False
    """With `delete_takes_twin`: the destroyed twin is still listed, its archive is 500."""
    delete_forgets: bool = False
    """A delete answers 204 and does nothing."""
    no_ttl: bool = False
    """TTLs are 405."""
