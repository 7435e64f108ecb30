"""The files way, for external checkpoints: one signed URL per file, several at a time, signed again when they end.

What an earlier attempt kept is gone on with, file by file.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Final

from tinker_sync.acquire.common import Acquired, pump, replay
from tinker_sync.acquire.download import Start
from tinker_sync.acquire.meter import BodyMeter
from tinker_sync.acquire.names import NameRegister
from tinker_sync.acquire.unpack import Gunzip
from tinker_sync.errors import DiskTrouble, NotTransferable, ObjectChanged, StorageTrouble
from tinker_sync.integrity import judge_body, read_claim
from tinker_sync.model.evidence import Claim, Defect, Kind, SeenFile
from tinker_sync.model.moments import FAR_FUTURE, rfc3339
from tinker_sync.model.paths import PathInvalid, PayloadPath
from tinker_sync.stopping import outlast

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence
    from datetime import datetime

    from tinker_sync.acquire.download import Downloader, Sign
    from tinker_sync.model.paths import SignedUrl, TinkerPath
    from tinker_sync.model.work import Transfer
    from tinker_sync.ports import Body, Clock, FileUrls, FileWriter, Intake, Signer, Stage, StagedObject

_SOURCE: Final = "files"
_AT_A_TIME: Final = 8
_RENEW_BEFORE: Final = timedelta(seconds=60)
_MOST_FILES: Final = 100_000


class FilesSource:
    """An `Acquirer` over `external_weights_urls`."""

    def __init__(self, signer: Signer, downloader: Downloader, clock: Clock) -> None:
        self._signer = signer
        self._downloader = downloader
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
        stage = await intake.resume(_SOURCE, transfer.size_bytes)
        if stage is not None and not stage.keys() <= {f"{_SOURCE}:{path}" for path in paths.values()}:
            intake.starts_over("the service lists other files now")
            stage = None
        stage = stage or await intake.begin(transfer.size_bytes)
        turn = asyncio.Semaphore(_AT_A_TIME)
        claims: dict[str, Claim] = {}

        async def one(key: str, path: PayloadPath) -> SeenFile:
            async with turn:
                seen, claim, faults = await self._fetch(partial(signing.url, key), transfer, path, stage, intake)
            claims[str(path)] = claim
            defects.extend(faults)
            return seen

        seen = await _together([one(key, path) for key, path in paths.items()])
        return Acquired(seen, defects, "files", claims)

    async def _fetch(
        self, sign: Sign, transfer: Transfer, path: PayloadPath, stage: Stage, intake: Intake
    ) -> tuple[SeenFile, Claim, list[Defect]]:
        name = f"{transfer.path} {rfc3339(transfer.time)}"  # of all its files: they change together
        begun = await self._go_on(path, name, sign, stage, intake)
        start = None if begun is None else Start.of(begun[0])
        async with self._downloader.open(sign, name=name, urgency=intake.urgency, start=start) as download:
            odd: list[Defect] = []
            if begun is None or download.begins == 0:
                sink, odd = await self._begin(download, path, stage, intake)
            else:
                sink = begun[1]
            seen, faults = await pump(download.chunks(), intake, sink.feed, partial(sink.finish, str(path)))
            if not download.ends_itself:
                faults.append(Defect(Kind.TRANSPORT, "nothing proves where it ends: no length, no chunking", str(path)))
        return seen, sink.claim, [*odd, *faults]

    async def _go_on(
        self, path: PayloadPath, name: str, sign: Sign, stage: Stage, intake: Intake
    ) -> tuple[StagedObject, _FileSink] | None:
        """What an earlier attempt kept of this file, read and hashed again; None where there is nothing of use.

        First it is asked whether the storage still has the rest.
        """
        key = f"{_SOURCE}:{path}"
        staged = stage.staged(key)
        start = None if staged is None else Start.of(staged)
        if staged is None or start is None:
            if reason := stage.worthless(key):
                intake.starts_over(f"{path}: {reason}")
            return None
        if not await self._downloader.still_has(sign, start, name=name, urgency=intake.urgency):
            intake.starts_over(f"{path}: the storage serves no ranges of it any more")
            return None
        try:
            sink = _FileSink(staged.claim, await intake.run(partial(staged.write, path, staged.claim.length)))
            await replay(staged, intake, sink.feed)
        except DiskTrouble as error:
            intake.starts_over(f"{path}: {error}")
            return None
        return staged, sink

    async def _begin(
        self, body: Body, path: PayloadPath, stage: Stage, intake: Intake
    ) -> tuple[_FileSink, list[Defect]]:
        claim, odd = read_claim(body.headers)
        encoding = body.headers.get("content-encoding", "identity").lower()
        if encoding not in ("identity", "gzip", ""):
            message = f"{path}: the storage encodes it as {encoding!r} although identity was asked for"
            raise StorageTrouble(message)
        zipped = encoding == "gzip"
        staged = await intake.run(partial(stage.stage_object, f"{_SOURCE}:{path}", body.validator, claim))
        if odd:
            staged.cannot_resume("the storage's digests contradict each other")
        if zipped:
            staged.cannot_resume(f"{path} comes as gzip, which cannot be gone on with in the middle")
        writer = await intake.run(partial(staged.write, path, None if zipped else claim.length))
        return _FileSink(claim, writer, gzip=zipped), odd


class _FileSink:
    """One body into one file; blocking."""

    def __init__(self, claim: Claim, writer: FileWriter, *, gzip: bool = False) -> None:
        self.claim = claim
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

    def finish(self, where: str, trouble: StorageTrouble | None) -> tuple[SeenFile, list[Defect]]:
        if trouble is not None:
            raise trouble
        seen = self._writer.close()
        defects = judge_body(self.claim, self._meter.seen(), where)
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
        self._renewed_at = FAR_FUTURE
        """When they are signed again before a storage refuses them."""
        self._turn = asyncio.Lock()

    async def keys(self) -> list[str]:
        async with self._turn:
            return list((await self._fresh()).urls)

    async def url(self, key: str, refused: SignedUrl | None = None) -> SignedUrl:
        async with self._turn:
            current = await self._fresh()
            if refused is not None and current.urls.get(key) == refused:
                self._current = None
                current = await self._fresh()
        found = current.urls.get(key)
        if found is None:
            message = f"the service no longer lists the file {key[:80]!a}"
            raise StorageTrouble(message)
        return found

    async def _fresh(self) -> FileUrls:
        current = self._current
        if current is None or self._clock.now() >= self._renewed_at:
            current = await self._signer.files(self._path)
            self._current = current
            self._renewed_at = self._renewal(current)
        return current

    def _renewal(self, current: FileUrls) -> datetime:
        """A minute before the end, or a tenth of a short life; never by a clock by which they have ended already."""
        now = self._clock.now()
        if current.expires is None or current.expires <= now:
            return FAR_FUTURE
        return current.expires - min(_RENEW_BEFORE, (current.expires - now) / 10)


async def _together(works: Sequence[Coroutine[None, None, SeenFile]]) -> list[SeenFile]:
    """Side by side; one that fails ends the others. Raises what is most serious, or the cancellation.

    asyncio.TaskGroup of Python 3.11 does not let one tell a failure from a cancellation that meets it.
    """
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        await outlast(asyncio.gather(*tasks, return_exceptions=True))
    errors = [error for task in tasks if not task.cancelled() and (error := task.exception()) is not None]
    if errors:
        raise min(errors, key=_seriousness)
    return [task.result() for task in tasks]


def _seriousness(error: BaseException) -> int:
    """What tells most about the checkpoint comes first, what another attempt mends last."""
    if isinstance(error, ObjectChanged):
        return 0
    return 2 if isinstance(error, StorageTrouble) else 1


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
