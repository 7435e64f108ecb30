"""The files way, for external checkpoints: one signed URL per file, several at a time, signed again before they end."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Final

from tinker_sync.acquire.common import Acquired, pump
from tinker_sync.acquire.meter import BodyMeter
from tinker_sync.acquire.names import NameRegister
from tinker_sync.acquire.unpack import Gunzip
from tinker_sync.errors import NotTransferable, StorageTrouble
from tinker_sync.integrity import judge_body, read_claim
from tinker_sync.model.evidence import Claim, Defect, Kind, SeenFile
from tinker_sync.model.paths import PathInvalid, PayloadPath

if TYPE_CHECKING:
    from tinker_sync.model.paths import SignedUrl, TinkerPath
    from tinker_sync.model.work import Transfer
    from tinker_sync.ports import Body, Clock, FileUrls, FileWriter, Intake, Signer, Stage, Storage

_AT_A_TIME: Final = 8
_RENEW_BEFORE: Final = timedelta(seconds=60)
_MOST_FILES: Final = 100_000


class FilesSource:
    """An `Acquirer` over `external_weights_urls`."""

    def __init__(self, signer: Signer, storage: Storage, clock: Clock) -> None:
        self._signer = signer
        self._storage = storage
        self._clock = clock

    async def acquire(self, transfer: Transfer, listed_id: str, intake: Intake) -> Acquired:
        """Fetch once. Raises TransferFailed, BeingMade, NotServed, NotFound, ServiceTrouble."""
        del listed_id  # this call exists under the full id only
        signing = _Signing(self._signer, self._clock, transfer.path)
        keys = await signing.keys()
        paths, defects = _parse_names(keys)
        if not paths and not defects:
            message = "the service lists no file for it"
            raise NotTransferable(message)
        if defects:
            return Acquired((), defects, "files")
        stage = await intake.begin(transfer.size_bytes)
        turn = asyncio.Semaphore(_AT_A_TIME)
        claims: dict[str, Claim] = {}

        async def one(key: str, path: PayloadPath) -> SeenFile:
            async with turn:
                seen, claim, faults = await self._fetch(signing, key, path, stage, intake)
            claims[str(path)] = claim
            defects.extend(faults)
            return seen

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(key, path)) for key, path in paths.items()]
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from None
        return Acquired([task.result() for task in tasks], defects, "files", claims)

    async def _fetch(
        self, signing: _Signing, key: str, path: PayloadPath, stage: Stage, intake: Intake
    ) -> tuple[SeenFile, Claim, list[Defect]]:
        used = await signing.url(key)
        try:
            opened = self._storage.open(used)
            body = await opened.__aenter__()
        except StorageTrouble:
            # It may have ended between signing and use, or been refused: once more with a fresh one.
            opened = self._storage.open(await signing.url(key, not_this=used))
            body = await opened.__aenter__()
        try:
            return await self._write(body, path, stage, intake)
        finally:
            await opened.__aexit__(None, None, None)

    async def _write(
        self, body: Body, path: PayloadPath, stage: Stage, intake: Intake
    ) -> tuple[SeenFile, Claim, list[Defect]]:
        claim, defects = read_claim(body.headers)
        encoding = body.headers.get("content-encoding", "identity").lower()
        if encoding not in ("identity", "gzip", ""):
            message = f"{path}: the storage encodes it as {encoding!r} although identity was asked for"
            raise StorageTrouble(message)
        size = claim.length if encoding != "gzip" else None
        sink = _FileSink(claim, await intake.run(partial(stage.write, path, size)), gzip=encoding == "gzip")
        await pump(body.chunks(), intake, sink.feed)
        seen, faults = await intake.run(partial(sink.finish, str(path)))
        if not body.ends_itself:
            faults.append(Defect(Kind.TRANSPORT, "nothing proves where it ends: no length, no chunking", str(path)))
        return seen, claim, [*defects, *faults]


class _FileSink:
    """One body into one file; blocking."""

    def __init__(self, claim: Claim, writer: FileWriter, *, gzip: bool) -> None:
        self._claim = claim
        self._meter = BodyMeter(claim)
        self._writer = writer
        self._gunzip = Gunzip() if gzip else None

    def feed(self, data: bytes) -> None:
        self._meter.update(data)
        if self._gunzip is None:
            self._writer.write(data)
            return
        for piece in self._gunzip.feed(data):
            self._writer.write(piece)

    def finish(self, where: str) -> tuple[SeenFile, list[Defect]]:
        seen = self._writer.close()
        defects = judge_body(self._claim, self._meter.seen(), where)
        if self._gunzip is not None and (fault := self._gunzip.finish()) is not None:
            defects.append(Defect(Kind.TRANSPORT, fault, where))
        return seen, defects


class _Signing:
    """The current signed URLs of one checkpoint; signs again, once for all who need it."""

    def __init__(self, signer: Signer, clock: Clock, path: TinkerPath) -> None:
        self._signer = signer
        self._clock = clock
        self._path = path
        self._current: FileUrls | None = None
        self._turn = asyncio.Lock()

    async def keys(self) -> list[str]:
        async with self._turn:
            return list((await self._fresh()).urls)

    async def url(self, key: str, not_this: SignedUrl | None = None) -> SignedUrl:
        async with self._turn:
            current = await self._fresh()
            if not_this is not None and current.urls.get(key) == not_this:
                self._current = None
                current = await self._fresh()
        found = current.urls.get(key)
        if found is None:
            message = f"the service no longer lists the file {key[:80]!a}"
            raise StorageTrouble(message)
        return found

    async def _fresh(self) -> FileUrls:
        current = self._current
        if current is None or (
            current.expires is not None and current.expires - self._clock.now() < self._margin(current)
        ):
            current = await self._signer.files(self._path)
            self._current = current
            self._signed_at = self._clock.now()
        return current

    def _margin(self, current: FileUrls) -> timedelta:
        """A minute before the end, or a tenth of a short life."""
        life = (current.expires or self._signed_at) - self._signed_at
        return min(_RENEW_BEFORE, life / 10)


def _parse_names(keys: list[str]) -> tuple[dict[str, PayloadPath], list[Defect]]:
    paths: dict[str, PayloadPath] = {}
    defects: list[Defect] = []
    names = NameRegister()
    if len(keys) > _MOST_FILES:
        return {}, [Defect(Kind.STRUCTURE, f"{len(keys):,} files; {_MOST_FILES:,} is the most")]
    for key in keys:
        try:
            path = PayloadPath.parse(key)
        except PathInvalid as error:
            defects.append(Defect(Kind.STRUCTURE, str(error)))
            continue
        clash = names.add(path)
        if clash is not None:
            defects.append(Defect(Kind.STRUCTURE, clash, str(path)))
        paths[key] = path
    return paths, defects
