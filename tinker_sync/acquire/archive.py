"""The archive way: sign, open, and unpack while it streams."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from tinker_sync.acquire.common import Acquired, pump
from tinker_sync.acquire.tar import Limits
from tinker_sync.acquire.unpack import Unpacker
from tinker_sync.errors import NotTransferable, StorageTrouble
from tinker_sync.integrity import read_claim

if TYPE_CHECKING:
    from tinker_sync.acquire.directory import DirectorySource
    from tinker_sync.model.work import Transfer
    from tinker_sync.ports import Body, Intake, Signer, Storage


class ArchiveSource:
    """An `Acquirer`: one archive, one connection, one pass over the bytes."""

    def __init__(
        self, signer: Signer, storage: Storage, directories: DirectorySource, limits: Limits | None = None
    ) -> None:
        self._signer = signer
        self._storage = storage
        self._directories = directories
        self._limits = limits or Limits()

    async def acquire(self, transfer: Transfer, listed_id: str, intake: Intake) -> Acquired:
        """Fetch once. Raises TransferFailed, BeingMade, NotServed, NotFound, ServiceTrouble."""
        async with self._signer.archive(transfer.path, listed_id) as signed:
            if signed.body is not None:
                return await self._unpack(signed.body, transfer, intake, by_bare_id=signed.by_bare_id)
            url, by_bare_id = signed.url, signed.by_bare_id
        if url is None:
            message = "the service gave neither a URL nor bytes"
            raise NotTransferable(message)
        if url.scheme == "file":
            return await self._directories.acquire(url, intake)
        async with self._storage.open(url) as body:
            return await self._unpack(body, transfer, intake, by_bare_id=by_bare_id)

    async def _unpack(self, body: Body, transfer: Transfer, intake: Intake, *, by_bare_id: bool) -> Acquired:
        claim, odd = read_claim(body.headers)
        expected = max(claim.length or 0, transfer.size_bytes or 0) or None
        stage = await intake.begin(expected)
        unpacker = Unpacker(claim, stage, self._limits, transfer.size_bytes)
        unprovable = claim.length is None and not claim.digests
        cut = not body.ends_itself
        try:
            await pump(body.chunks(), intake, unpacker.feed, lambda: unprovable and unpacker.hopeless)
        except StorageTrouble:
            # Without length or chunking a dropped connection can be the end: then the archive's own end decides.
            if body.ends_itself or not unpacker.complete:
                raise
        files, defects = await intake.run(
            partial(unpacker.finish, cut=cut and not unpacker.complete and not unpacker.hopeless)
        )
        return Acquired(files, [*odd, *defects], "archive", {"archive": claim}, by_bare_id)
