"""The account as flow sees it: `ports.Account` and `ports.Signer` over one `RestClient`."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tinker_sync.api.listing import from_wire
from tinker_sync.errors import (
    BeingMade,
    NotFound,
    NotServed,
    Overloaded,
    ProtocolBroken,
    RequestRefused,
    ServiceTrouble,
)
from tinker_sync.model.checkpoint import RunFacts
from tinker_sync.model.paths import PathInvalid, SignedUrl

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from datetime import datetime

    from tinker_sync.api import wire
    from tinker_sync.api.client import RestClient
    from tinker_sync.api.listing import AccountLister
    from tinker_sync.model.checkpoint import Checkpoint, Listing, Sighting
    from tinker_sync.model.paths import TinkerPath
    from tinker_sync.transport import StreamedBody

_FACTS_LIVE: Final = 300.0
_MOST_RUNS_REMEMBERED: Final = 1000
_LOOK_PAGE: Final = 1000


@dataclass(frozen=True, slots=True)
class SignedArchive:
    """A `ports.Signed`."""

    url: SignedUrl | None
    body: StreamedBody | None
    by_bare_id: bool


@dataclass(frozen=True, slots=True)
class SignedFiles:
    """A `ports.FileUrls`."""

    urls: Mapping[str, SignedUrl]
    expires: datetime | None


class TinkerAccount:
    """`ports.Account`: listing, looks at single runs, and the facts that a restore needs."""

    def __init__(self, client: RestClient, lister: AccountLister, monotonic: Callable[[], float]) -> None:
        self._client = client
        self._lister = lister
        self._monotonic = monotonic
        self._runs: dict[str, tuple[float, Mapping[str, object] | None]] = {}

    async def list(self) -> Listing | Sighting:
        """Everything that the account shows. Raises ServiceTrouble when not even the first page came."""
        return await self._lister.list()

    async def peek(self) -> Sighting:
        """The first page, newest first. Raises ServiceTrouble."""
        return await self._lister.peek()

    async def look(self, run_id: str) -> tuple[Checkpoint, ...]:
        """What one run shows now. Raises ServiceTrouble, RequestRefused; ProtocolBroken when it may lack something."""
        answer = await self._client.list_checkpoints(run_id)
        rows, seen = _rows(answer), len(answer.checkpoints)
        total = 0 if answer.cursor is None else answer.cursor.total_count
        while answer.checkpoints and seen < total:
            answer = await self._client.list_checkpoints(run_id, _LOOK_PAGE, seen)
            rows += _rows(answer)
            seen += len(answer.checkpoints)
        if len({row.path for row in rows}) < total:
            message = f"the list of run {run_id} changed while it was read, or lacks rows: nothing is concluded from it"
            raise ProtocolBroken(message)
        return tuple(rows)

    async def answers(self) -> bool:
        """Whether the service as a whole does what it should: one small question, answered."""
        try:
            await self._client.list_user_checkpoints(limit=1)
        except RequestRefused:
            return True
        except ServiceTrouble:
            return False
        return True

    async def serves(self, checkpoint: Checkpoint) -> bool | None:
        """Whether its bytes can be had right now; None when the answer says nothing about that."""
        signer = TinkerSigner(self._client)
        try:
            if checkpoint.checkpoint_type == "external":
                await signer.files(checkpoint.path)
            else:
                async with signer.archive(checkpoint.path, checkpoint.listed_id):
                    pass
        except (BeingMade, NotServed):
            return None
        except (RequestRefused, Overloaded):
            return False
        except ServiceTrouble:
            return None
        return True

    async def facts(self, path: TinkerPath) -> RunFacts:
        """The TrainingRun and the weights' facts; None for what this server does not tell."""
        return RunFacts(await self._run_facts(path.run_id), await self._weights_facts(path))

    async def _run_facts(self, run_id: str) -> Mapping[str, object] | None:
        remembered = self._runs.get(run_id)
        if remembered is not None and self._monotonic() - remembered[0] < _FACTS_LIVE:
            return remembered[1]
        try:
            run = (await self._client.get_training_run(run_id)).model_dump(mode="json")
        except (RequestRefused, ServiceTrouble):
            run = None
        if len(self._runs) >= _MOST_RUNS_REMEMBERED:
            self._runs.clear()
        self._runs[run_id] = (self._monotonic(), run)
        return run

    async def _weights_facts(self, path: TinkerPath) -> Mapping[str, object] | None:
        try:
            return (await self._client.get_weights_info_by_tinker_path(str(path))).model_dump(mode="json")
        except (RequestRefused, ServiceTrouble):
            return None


def _rows(answer: wire.CheckpointsListResponse) -> list[Checkpoint]:
    """A row that cannot be read could be the one that is looked for: then the look says nothing."""
    try:
        if not answer.unreadable:
            return [from_wire(row) for row in answer.checkpoints]
    except PathInvalid:
        pass
    message = "a run's list has rows that cannot be read: nothing is concluded from it"
    raise ProtocolBroken(message)


class TinkerRemover:
    """`ports.Remover`. Whoever holds one can delete: that is `enforcement`. Nothing is sent twice by itself."""

    def __init__(self, client: RestClient) -> None:
        self._client = client

    async def delete(self, path: TinkerPath) -> None:
        """Delete for good."""
        await self._client.delete_checkpoint_from_tinker_path(str(path), once=True)

    async def set_ttl(self, path: TinkerPath, seconds: int | None) -> None:
        """Let it expire, or never."""
        await self._client.set_checkpoint_ttl_from_tinker_path(str(path), seconds, once=True)


class TinkerSigner:
    """`ports.Signer`."""

    def __init__(self, client: RestClient) -> None:
        self._client = client

    @asynccontextmanager
    async def archive(self, path: TinkerPath, listed_id: str) -> AsyncIterator[SignedArchive]:
        """Sign the archive; where only the bare id is served, by that."""
        bare = listed_id if listed_id and "/" not in listed_id else None
        by_bare_id = False
        opened = self._client.open_archive(path.run_id, path.checkpoint_id)
        try:
            answer = await opened.__aenter__()
        except (NotFound, NotServed):
            if bare is None:
                raise
            opened, by_bare_id = self._client.open_archive(path.run_id, bare), True
            answer = await opened.__aenter__()
        try:
            yield SignedArchive(answer.url, answer.body, by_bare_id)
        finally:
            await opened.__aexit__(None, None, None)

    async def files(self, path: TinkerPath) -> SignedFiles:
        """Sign every file of an external checkpoint."""
        answer = await self._client.get_external_weights_urls(str(path))
        return SignedFiles({name: SignedUrl(url) for name, url in answer.urls.items()}, answer.expires)
