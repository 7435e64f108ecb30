"""The archive way: sign, open, and unpack while it streams; what an earlier attempt kept is gone on with."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from tinker_sync.acquire.common import Acquired, pump, replay
from tinker_sync.acquire.download import Start
from tinker_sync.acquire.tar import Limits
from tinker_sync.acquire.unpack import Unpacker
from tinker_sync.errors import DiskTrouble, NotTransferable, StorageTrouble
from tinker_sync.integrity import read_claim
from tinker_sync.model.moments import rfc3339

if TYPE_CHECKING:
    from tinker_sync.acquire.directory import DirectorySource
    from tinker_sync.acquire.download import Downloader, Sign
    from tinker_sync.model.evidence import Defect, SeenFile
    from tinker_sync.model.paths import SignedUrl
    from tinker_sync.model.work import Transfer
    from tinker_sync.ports import Body, Intake, Signer, StagedObject

_OBJECT: Final = "archive"
_NO_RANGES: Final = "the storage serves no ranges of it any more"


class ArchiveSource:
    """An `Acquirer`: one archive, one pass over the bytes."""

    def __init__(
        self, signer: Signer, downloader: Downloader, directories: DirectorySource, limits: Limits | None = None
    ) -> None:
        self._signer = signer
        self._downloader = downloader
        self._directories = directories
        self._limits = limits or Limits()

    async def acquire(self, transfer: Transfer, listed_id: str, intake: Intake) -> Acquired:
        """Fetch once. Raises TransferFailed, BeingMade, NotServed, NotFound, ServiceTrouble."""
        async with self._signer.archive(transfer.path, listed_id) as signed:
            if signed.body is not None:
                return await self._take_direct(signed.body, transfer, intake, by_bare_id=signed.by_bare_id)
            url, by_bare_id = signed.url, signed.by_bare_id
        if url is None:
            message = "the service gave neither a URL nor bytes"
            raise NotTransferable(message)
        if url.scheme == "file":
            return await self._directories.acquire(url, intake)
        signing = _Signing(self._signer, transfer, listed_id, url, by_bare_id=by_bare_id)
        begun = await self._go_on(transfer, signing.url, intake)
        start = None if begun is None else Start.of(begun[0])
        opening = self._downloader.open(signing.url, name=_name(transfer), urgency=intake.urgency, start=start)
        async with opening as download:
            if begun is not None and download.begins == 0:
                intake.starts_over(_NO_RANGES)
                begun = None
            unpacker = await self._begin(download, transfer, intake) if begun is None else begun[1]
            return await self._unpack(download, unpacker, intake, by_bare_id=by_bare_id)

    async def _go_on(self, transfer: Transfer, sign: Sign, intake: Intake) -> tuple[StagedObject, Unpacker] | None:
        """What an earlier attempt kept, read and hashed again; None where there is nothing to go on with.

        It can be much: first it is asked whether the storage still has the rest.
        """
        stage = await intake.resume(_OBJECT, transfer.size_bytes)
        staged = None if stage is None else stage.staged(_OBJECT)
        start = None if staged is None else Start.of(staged)
        if staged is None or start is None:
            return None
        if not await self._downloader.still_has(sign, start, name=_name(transfer), urgency=intake.urgency):
            intake.starts_over(_NO_RANGES)
            return None
        unpacker = Unpacker(staged, self._limits, transfer.size_bytes)
        try:
            await replay(staged, intake, unpacker.feed)
        except DiskTrouble as error:
            intake.starts_over(str(error))
            return None
        if unpacker.hopeless or unpacker.received != staged.kept:
            intake.starts_over("what was kept is not the beginning of an archive")
            return None
        return staged, unpacker

    async def _take_direct(self, body: Body, transfer: Transfer, intake: Intake, *, by_bare_id: bool) -> Acquired:
        """A server that sends the archive at once: one connection, and no way to go on."""
        unpacker = await self._begin(body, transfer, intake)
        return await self._unpack(body, unpacker, intake, by_bare_id=by_bare_id)

    async def _begin(self, body: Body, transfer: Transfer, intake: Intake) -> Unpacker:
        claim, odd = read_claim(body.headers)
        expected = max(claim.length or 0, transfer.size_bytes or 0) or None
        stage = await intake.begin(expected)
        staged = stage.stage_object(_OBJECT, body.validator, claim)  # of an empty stage: nothing blocks
        if odd:
            staged.cannot_resume("the storage's digests contradict each other")
        return Unpacker(staged, self._limits, transfer.size_bytes, odd)

    async def _unpack(self, body: Body, unpacker: Unpacker, intake: Intake, *, by_bare_id: bool) -> Acquired:
        claim = unpacker.claim
        unprovable = claim.length is None and not claim.digests
        ends_itself = body.ends_itself

        def finish(trouble: StorageTrouble | None) -> tuple[list[SeenFile], list[Defect]]:
            # Without length or chunking a dropped connection can be the end: then the archive's own end decides.
            if trouble is not None and (ends_itself or not unpacker.complete):
                raise trouble
            return unpacker.finish(cut=not ends_itself and not unpacker.complete and not unpacker.hopeless)

        files, defects = await pump(
            body.chunks(), intake, unpacker.feed, finish, lambda: unprovable and unpacker.hopeless
        )
        return Acquired(files, defects, "archive", {"archive": claim}, by_bare_id)


def _name(transfer: Transfer) -> str:
    """Of one object, and not of what takes its place."""
    return f"{transfer.path} {rfc3339(transfer.time)}"


class _Signing:
    """The archive's current URL, signed again once for all spans that need it."""

    def __init__(self, signer: Signer, transfer: Transfer, listed_id: str, url: SignedUrl, *, by_bare_id: bool) -> None:
        self._signer = signer
        self._transfer = transfer
        self._listed_id = listed_id
        self._current = url
        self._by_bare_id = by_bare_id
        self._turn = asyncio.Lock()

    async def url(self, refused: SignedUrl | None) -> SignedUrl:
        """The current one; another one than `refused`. Raises BeingMade, NotServed, NotFound, ServiceTrouble."""
        async with self._turn:
            if self._current == refused:
                async with self._signer.archive(self._transfer.path, self._listed_id) as signed:
                    another_way = signed.by_bare_id != self._by_bare_id  # which can be the other type's
                    if signed.url is None or signed.url.scheme == "file" or another_way:
                        message = "the service hands the archive out in another way than before"
                        raise StorageTrouble(message)
                    self._current = signed.url
            return self._current
