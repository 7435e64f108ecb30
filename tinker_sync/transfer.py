"""One checkpoint's way in, one attempt: acquire into a stage, judge, commit or quarantine, record.

It does not decide about another attempt (`passes` does), and it never touches what is already there.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

import structlog

from tinker_sync.errors import (
    Defective,
    NotFound,
    NotServed,
    ObjectChanged,
    RequestRefused,
    ServiceTrouble,
    StorageTrouble,
    TinkerSyncError,
)
from tinker_sync.integrity import judge_content
from tinker_sync.model.evidence import Defect, Kind
from tinker_sync.model.manifest import FileEntry, Manifest, ManifestInvalid
from tinker_sync.stopping import outlast

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from concurrent.futures import Executor

    from tinker_sync.model.checkpoint import Checkpoint, RunFacts
    from tinker_sync.model.evidence import SeenFile
    from tinker_sync.model.paths import TinkerPath
    from tinker_sync.model.work import Committed, Replica, Transfer
    from tinker_sync.ports import Account, Acquired, Acquirer, Catalog, Clock, Destination, Interrupted, Reporter, Stage

T = TypeVar("T")
_INTERRUPTIONS: Final = (StorageTrouble, ServiceTrouble, RequestRefused)
"""After these the next attempt goes on with what is durable,"""
_ENDS: Final = (ObjectChanged, NotFound, NotServed)
"""but not after these: what came is of no use."""
_MOST_RECORDED: Final = 100
_MOST_COMMITTED: Final = 10_000
log = structlog.get_logger()


class Transferrer:
    """Copies single checkpoints."""

    def __init__(
        self,
        *,
        account: Account,
        archive: Acquirer,
        files: Acquirer,
        destination: Destination,
        catalog: Catalog,
        clock: Clock,
        reporter: Reporter,
        writers: Executor,
        indexer: Executor,
        marker_required: bool,
        tool_version: str,
    ) -> None:
        self._account = account
        self._archive = archive
        self._files = files
        self._destination = destination
        self._catalog = catalog
        self._clock = clock
        self._reporter = reporter
        self._writers = writers
        self._indexer = indexer
        self._marker_required = marker_required
        self._tool_version = tool_version
        self._committed: dict[TinkerPath, None] = {}
        """What was committed here, or nearly, the last of it: a plan that was begun before can ask for it again."""
        self._recorded: dict[str, Mapping[str, object]] = {}
        """By run what was written of it last."""

    async def transfer(
        self, transfer: Transfer, checkpoint: Checkpoint, *, repairs: Replica | None = None
    ) -> Committed:
        """Make one attempt.

        `repairs` is the damaged replica that has the name. Of the same object, only bytes equal to its manifest take
        its place; another object upstream is a new replica, and the damaged one is kept aside. Raises TransferFailed, RequestRefused, ServiceTrouble; what is left
        behind then is what the next attempt goes on with.
        """
        intake = _Intake(self._destination, transfer, self._reporter, self._writers)
        keep = False
        facts = asyncio.create_task(self._account.facts(transfer.path))
        try:
            acquired = await self._acquire(transfer, checkpoint.listed_id, intake)
            _check(acquired)
            committed = await self._finish(transfer, checkpoint, acquired, intake, await facts, repairs)
            committed = replace(committed, received=intake.received)
        except TinkerSyncError as error:
            keep = isinstance(error, _INTERRUPTIONS) and not isinstance(error, _ENDS)
            if isinstance(error, ObjectChanged):
                intake.starts_over(str(error))
            self._reporter.ended(transfer, str(error))
            raise
        except BaseException as error:
            keep = isinstance(error, asyncio.CancelledError)
            self._reporter.ended(transfer, "stopped")
            raise
        else:
            self._reporter.ended(transfer, None)
            return committed
        finally:
            facts.cancel()
            try:
                await outlast(facts)
            finally:
                await intake.clean(keep=keep)

    async def adopt(self, transfer: Transfer) -> bool:
        """Whether the very object is in the tree already, unknown to the catalog; then the catalog learns of it.

        A process that died between its rename and its note leaves this. Raises DiskTrouble.
        """
        if transfer.path not in self._committed and not self._destination.may_have(transfer.path):
            return False
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._writers, self._destination.find, transfer.path)
        if found is None or not found.replica.identity.matches(transfer.identity):
            return False
        await self._note(found)
        return True

    async def _acquire(self, transfer: Transfer, listed_id: str, intake: _Intake) -> Acquired:
        """External checkpoints come file by file where the server can, everything else as an archive."""
        if transfer.path.checkpoint_type == "external":
            with suppress(NotServed, NotFound):
                return await self._files.acquire(transfer, listed_id, intake)
        return await self._archive.acquire(transfer, listed_id, intake)

    async def _finish(
        self,
        transfer: Transfer,
        checkpoint: Checkpoint,
        acquired: Acquired,
        intake: _Intake,
        facts: RunFacts,
        repairs: Replica | None,
    ) -> Committed:
        files, strip = _without_top_directory(acquired.files, checkpoint.path.name)
        defects = judge_content(
            files,
            marker_required=self._marker_required and acquired.source == "archive",
            weights_expected=acquired.source != "directory",
            optimizer_expected=acquired.by_bare_id and checkpoint.checkpoint_type == "training",
        )
        stage = intake.stage
        if any(defect.kind is not Kind.CONTENT for defect in defects) or stage is None:
            raise Defective(defects)
        manifest = self._manifest(transfer, checkpoint, acquired, files, facts)
        expected = None
        if repairs is not None and repairs.identity.matches(checkpoint.identity):
            expected = await intake.run(partial(self._manifest_of, repairs))
        if expected is not None:
            if not expected.same_payload(manifest):
                what = "what upstream serves now is not what the manifest says: it does not repair this replica"
                raise Defective([Defect(Kind.STRUCTURE, what)])
            manifest = expected
        elif defects:
            kept = await intake.run(partial(stage.quarantine, checkpoint.identity, defects))
            raise Defective(defects, quarantine=kept)
        if acquired.source == "files" and len(files) > 1:
            await self._look_again(checkpoint)
        self._committed[transfer.path] = None
        if len(self._committed) > _MOST_COMMITTED:
            del self._committed[next(iter(self._committed))]
        committed = await intake.commit(partial(stage.commit, manifest, strip=strip, repairs=repairs is not None))
        await self._record(committed, facts, intake)
        return committed

    async def _look_again(self, checkpoint: Checkpoint) -> None:
        """Files that came one after the other can be of two objects. Raises ObjectChanged, where that can be told."""
        rows: Sequence[Checkpoint] = ()
        with suppress(TinkerSyncError):
            rows = await self._account.look(checkpoint.path.run_id)
        row = next((row for row in rows if row.path == checkpoint.path), None)
        if row is not None and not row.identity.matches(checkpoint.identity):
            message = "it was overwritten while it was copied"
            raise ObjectChanged(message)

    def _manifest_of(self, damaged: Replica) -> Manifest | None:
        """A damaged replica's own manifest, where it can still be read."""
        try:
            return self._destination.manifest(damaged.directory)
        except (OSError, ManifestInvalid):
            return None

    async def _record(self, committed: Committed, facts: RunFacts, intake: _Intake) -> None:
        """The catalog is an index: the replica is there whatever becomes of this."""
        await self._note(committed)
        run_id, run = committed.replica.path.run_id, facts.training_run
        if run is not None and self._recorded.get(run_id) is not run:
            await intake.run(partial(self._destination.record_run, run_id, run))
            self._recorded = {run_id: run} if len(self._recorded) >= _MOST_RECORDED else self._recorded | {run_id: run}

    async def _note(self, committed: Committed) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._indexer, self._catalog.add_replica, committed.replica)
        if committed.superseded is not None:
            path = committed.replica.path
            await loop.run_in_executor(self._indexer, self._catalog.replace_superseded, path, committed.superseded)

    def _manifest(
        self,
        transfer: Transfer,
        checkpoint: Checkpoint,
        acquired: Acquired,
        files: Sequence[SeenFile],
        facts: RunFacts,
    ) -> Manifest:
        return Manifest(
            tinker_path=checkpoint.path,
            checkpoint_type=checkpoint.checkpoint_type,
            time=checkpoint.time,
            files=tuple(FileEntry(seen.path, seen.size, seen.sha256) for seen in files),
            source=acquired.source,
            fidelity="exact",
            committed_at=self._clock.now(),
            tool_version=self._tool_version,
            size_bytes=checkpoint.size_bytes,
            expires_at=checkpoint.expires_at,
            first_expires_at=transfer.first_expires_at,
            public=checkpoint.public,
            user_metadata=checkpoint.user_metadata,
            training_run=facts.training_run,
            weights_info=facts.weights_info,
            claims={body: claim.as_json() for body, claim in acquired.claims.items() if claim.as_json()},
        )


def _check(acquired: Acquired) -> None:
    if acquired.defects:
        raise Defective(acquired.defects)


class _Intake:
    """A `ports.Intake`: the stage of one attempt, and work in the writing threads that is never left running."""

    def __init__(self, destination: Destination, transfer: Transfer, reporter: Reporter, writers: Executor) -> None:
        self._destination = destination
        self._transfer = transfer
        self._reporter = reporter
        self._writers = writers
        self.urgency = transfer.priority
        self.received = 0
        self.stage: Stage | None = None

    async def resume(self, source: str, expected_bytes: int | None) -> Stage | None:
        await self.clean()
        if not self._destination.has_interrupted(self._transfer.path):
            return None
        opening = partial(self._destination.resume_stage, self._transfer.identity, source, expected_bytes)
        found = await self.run(opening, undo=_suspend)
        if found is None:
            return None
        self.stage = found.stage
        if found.stage is None:
            self.starts_over(found.reason)
            return None
        log.info("transfer.resumed", checkpoint=str(self._transfer.path), bytes=found.kept)
        self._reporter.started(self._transfer, None if expected_bytes is None else expected_bytes - found.kept)
        return found.stage

    def starts_over(self, reason: str) -> None:
        log.info("transfer.starts_over", checkpoint=str(self._transfer.path), reason=reason)

    async def begin(self, expected_bytes: int | None) -> Stage:
        await self.clean()  # another way of acquiring had begun before
        opening = partial(self._destination.open_stage, self._transfer.identity, expected_bytes)
        self.stage = await self.run(opening, undo=_abort)
        self._reporter.started(self._transfer, expected_bytes)
        return self.stage

    async def run(self, work: Callable[[], T], undo: Callable[[T], None] | None = None) -> T:
        """`undo` is for what the work made when nobody takes it any more."""
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._writers, work)
        try:
            await outlast(future)
        except asyncio.CancelledError:
            if undo is not None and not future.cancelled() and future.exception() is None:
                await outlast(loop.run_in_executor(self._writers, undo, future.result()))
            raise
        return future.result()

    async def commit(self, work: Callable[[], Committed]) -> Committed:
        """Run what ends the stage, whatever comes of it."""
        self.stage = None
        return await self.run(work)

    def advanced(self, received: int) -> None:
        self.received += received
        self._reporter.advanced(self._transfer, received)

    async def clean(self, *, keep: bool = False) -> None:
        """Remove what was not committed, or keep it for the next attempt; harmless after a commit."""
        stage, self.stage = self.stage, None
        if stage is not None:
            await self.run(stage.suspend if keep else stage.abort)


def _abort(stage: Stage) -> None:
    stage.abort()


def _suspend(found: Interrupted | None) -> None:
    if found is not None and found.stage is not None:
        found.stage.suspend()


def _without_top_directory(files: Sequence[SeenFile], name: str) -> tuple[list[SeenFile], str | None]:
    """Drop a single top-level directory that is named exactly like the checkpoint.

    (A top-level `./` is gone already: payload paths have no `.`.)
    """
    if not files or not all(len(seen.path.parts) > 1 and seen.path.parts[0] == name for seen in files):
        return list(files), None
    stripped = [replace(seen, path=seen.path.below(name)) for seen in files]
    return stripped, name
