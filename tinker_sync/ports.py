"""Every seam between what is decided and what is done, on one page.

Flow (`passes`, `transfer`, `scrub`) is written against these; adapters implement them; `wiring` connects the two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager
    from datetime import datetime

    from tinker_sync.model.checkpoint import Checkpoint, Identity, Listing, RunFacts, Sighting
    from tinker_sync.model.deeds import Deed, DeedKey
    from tinker_sync.model.events import Event
    from tinker_sync.model.evidence import Claim, Defect, SeenFile, Span
    from tinker_sync.model.manifest import Manifest
    from tinker_sync.model.paths import PayloadPath, SignedUrl, TinkerPath
    from tinker_sync.model.work import Committed, Damage, Failure, ReadBack, Replica, Transfer, Trashed
    from tinker_sync.planning import Known, ServedRecord
    from tinker_sync.retention import Verdict

T = TypeVar("T")


class Clock(Protocol):
    """Now, and waiting. Tests bring their own."""

    def now(self) -> datetime:
        """Aware UTC."""
        ...

    def monotonic(self) -> float:
        """Seconds that never go back."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait; cancellation passes."""
        ...


# The service


class Account(Protocol):
    """The service as the mirror sees it."""

    async def list(self) -> Listing | Sighting:
        """Everything that the account shows. Raises ServiceTrouble when not even one page could be read."""
        ...

    async def peek(self) -> Sighting:
        """The first page, newest first: what is new since the last listing. Raises ServiceTrouble."""
        ...

    async def look(self, run_id: str) -> tuple[Checkpoint, ...]:
        """What one run shows now. Raises ServiceTrouble, RequestRefused."""
        ...

    async def answers(self) -> bool:
        """Whether the service as a whole does what it should: one small question, answered."""
        ...

    async def serves(self, checkpoint: Checkpoint) -> bool | None:
        """Whether its bytes can be had right now; None when the answer says nothing about that."""
        ...

    async def facts(self, path: TinkerPath) -> RunFacts:
        """What a restore needs and upstream forgets. What cannot be had is None, never an error."""
        ...


class Remover(Protocol):
    """The capability to change what is upstream. `enforcement` alone holds it."""

    async def delete(self, path: TinkerPath) -> None:
        """Delete for good. Raises NotFound when it is gone already, RequestRefused, ServiceTrouble."""
        ...

    async def set_ttl(self, path: TinkerPath, seconds: int | None) -> None:
        """Let it expire that many seconds from now, or never. Raises RequestRefused, ServiceTrouble."""
        ...


class Signed(Protocol):
    """An archive that can be fetched: a URL, or a body that came at once."""

    @property
    def url(self) -> SignedUrl | None:
        """None when the body came at once."""
        ...

    @property
    def body(self) -> Body | None:
        """The bytes, where the server sends them without a URL."""
        ...

    @property
    def by_bare_id(self) -> bool:
        """Whether it was served only under the bare id, which can bring the other type."""
        ...


class FileUrls(Protocol):
    """The signed URLs of an external checkpoint."""

    @property
    def urls(self) -> Mapping[str, SignedUrl]:
        """Path below the checkpoint's root, untrusted, to URL."""
        ...

    @property
    def expires(self) -> datetime | None:
        """When they end, where the server says so."""
        ...


class Signer(Protocol):
    """Turns a checkpoint's path into something that can be fetched; all that `acquire` knows of the API."""

    def archive(self, path: TinkerPath, listed_id: str) -> AbstractAsyncContextManager[Signed]:
        """Sign the archive. Raises BeingMade, NotServed, NotFound, ServiceTrouble."""
        ...

    async def files(self, path: TinkerPath) -> FileUrls:
        """Sign every file of an external checkpoint. Raises the same."""
        ...


# Bytes on their way


class Body(Protocol):
    """One response body, raw."""

    @property
    def status(self) -> int:
        """200, or 206 where a span came."""
        ...

    @property
    def headers(self) -> Mapping[str, str]:
        """Names in lower case."""
        ...

    @property
    def ends_itself(self) -> bool:
        """Whether its end is proven by a length or by chunking."""
        ...

    @property
    def validator(self) -> str | None:
        """The strong ETag of an object of which any part can be asked for again."""
        ...

    def chunks(self) -> AsyncIterator[bytes]:
        """The bytes. Raises StorageTrouble when they stop early or stall."""
        ...


class Storage(Protocol):
    """Where signed URLs lead; never sees the credential."""

    def open(
        self, url: SignedUrl, span: Span | None = None, validator: str | None = None
    ) -> AbstractAsyncContextManager[Body]:
        """Start one GET, of a span of the object that has this strong ETag. Raises StorageTrouble, NotTransferable."""
        ...


class Intake(Protocol):
    """Where an acquirer puts files: a stage, and the thread that writes to it."""

    @property
    def urgency(self) -> int:
        """The transfer's priority: lower first."""
        ...

    async def resume(self, source: str, expected_bytes: int | None) -> Stage | None:
        """The stage that an earlier attempt at this very object left, where one by that source can be gone on with.

        Raises NoSpace, DiskTrouble.
        """
        ...

    def starts_over(self, reason: str) -> None:
        """What an earlier attempt left is of no use; `begin` follows."""
        ...

    async def begin(self, expected_bytes: int | None) -> Stage:
        """Open an empty stage once the size is known. Raises NoSpace, DiskTrouble."""
        ...

    async def run(self, work: Callable[[], T]) -> T:
        """Run blocking work in the writing thread; when cancelled, the work is awaited before cancellation passes."""
        ...

    def advanced(self, received: int) -> None:
        """So many more bytes came."""
        ...


class Acquired(Protocol):
    """What came into the stage, and every defect that was seen on the way."""

    @property
    def files(self) -> Sequence[SeenFile]:
        """The payload."""
        ...

    @property
    def defects(self) -> Sequence[Defect]:
        """Of transport and structure."""
        ...

    @property
    def claims(self) -> Mapping[str, Claim]:
        """What the storage promised, by body (`archive`, or the payload path)."""
        ...

    @property
    def source(self) -> str:
        """`archive`, `files` or `directory`."""
        ...

    @property
    def by_bare_id(self) -> bool:
        """Whether it can be the other type's."""
        ...


class Acquirer(Protocol):
    """One way to bring a checkpoint's bytes into a stage."""

    async def acquire(self, transfer: Transfer, listed_id: str, intake: Intake) -> Acquired:
        """Fetch once. Raises TransferFailed, BeingMade, NotServed, NotFound, ServiceTrouble."""
        ...


# The local side; blocking, used from worker threads


class FileWriter(Protocol):
    """One payload file being written."""

    def write(self, data: bytes | memoryview) -> None:
        """Append. Raises NoSpace, DiskTrouble."""
        ...

    def close(self) -> SeenFile:
        """Say what went by; what is not on the device yet is on its way there. Raises NoSpace, DiskTrouble."""
        ...


class StagedObject(Protocol):
    """One object of the storage on its way into a stage, noted so that a later attempt can go on with it.

    Every byte that came of the object, in order, is in one of its files or was given to `framing`, up to the end of what
    is gone on with: padding behind an archive's end need not be.
    """

    @property
    def validator(self) -> str | None:
        """The strong ETag; without one nothing is noted."""
        ...

    @property
    def claim(self) -> Claim:
        """What the storage promised about it."""
        ...

    @property
    def kept(self) -> int:
        """How many of its first bytes an earlier attempt made durable."""
        ...

    def write(self, path: PayloadPath, size: int | None = None) -> FileWriter:
        """Start a file. What is kept of it is not written again, only hashed. Raises NoSpace, DiskTrouble."""
        ...

    def make_directory(self, path: PayloadPath) -> None:
        """Make an empty directory. Raises NoSpace, DiskTrouble."""
        ...

    def framing(self, data: bytes | memoryview) -> None:
        """Bytes of the object that are in no file: headers, padding."""
        ...

    def cannot_resume(self, reason: str) -> None:
        """A later attempt must start over, and say so."""
        ...

    def replay(self) -> Iterator[bytes]:
        """What is kept, from its first byte. Blocking. Raises DiskTrouble."""
        ...


class Stage(Protocol):
    """The private place where a replica is put together."""

    def keys(self) -> set[str]:
        """Of which objects an earlier attempt kept something."""
        ...

    def staged(self, key: str) -> StagedObject | None:
        """What an earlier attempt kept of an object."""
        ...

    def worthless(self, key: str) -> str:
        """Why what was kept of an object cannot be gone on with; empty where it can be, or nothing was kept."""
        ...

    def stage_object(self, key: str, validator: str | None, claim: Claim) -> StagedObject:
        """Begin an object; what was kept under that key is dropped. Raises NoSpace, DiskTrouble."""
        ...

    def write(self, path: PayloadPath, size: int | None = None) -> FileWriter:
        """Start a file. Raises NoSpace, DiskTrouble."""
        ...

    def make_directory(self, path: PayloadPath) -> None:
        """Make an empty directory, for archives that have one. Raises NoSpace, DiskTrouble."""
        ...

    def commit(self, manifest: Manifest, *, strip: str | None = None, repairs: bool = False) -> Committed:
        """Make it durable under its final name, manifest last, create-only.

        `strip` names a top-level directory to drop. `repairs` lets it take the name of a damaged replica with the
        same manifest. Raises NoSpace, DiskTrouble.
        """
        ...

    def quarantine(self, identity: Identity, defects: Sequence[Defect]) -> str:
        """Keep the bytes with their defects, apart. Returns the directory below the root."""
        ...

    def suspend(self) -> None:
        """Leave what is durable for a later attempt, or remove it where there is nothing to go on with. Never raises."""
        ...

    def abort(self) -> None:
        """Remove it. Never raises."""
        ...


class Interrupted(Protocol):
    """What an earlier attempt left: a stage, or the reason why there is none to go on with."""

    @property
    def stage(self) -> Stage | None:
        """The stage."""
        ...

    @property
    def reason(self) -> str:
        """Why it starts over; empty with a stage."""
        ...

    @property
    def kept(self) -> int:
        """Bytes that are here already."""
        ...


class Destination(Protocol):
    """The local tree."""

    def open_stage(self, identity: Identity, expected_bytes: int | None) -> Stage:
        """Reserve space and make an empty stage. Raises NoSpace, DiskTrouble."""
        ...

    def has_interrupted(self, path: TinkerPath) -> bool:
        """Whether an earlier attempt left something. Never blocks."""
        ...

    def resume_stage(self, identity: Identity, source: str, expected_bytes: int | None) -> Interrupted | None:
        """What an earlier attempt at this very object left. Raises NoSpace, DiskTrouble."""
        ...

    def forget_old_stages(self) -> None:
        """Remove what earlier attempts left and nobody came back for. Never raises."""
        ...

    def room_for(self, size: int) -> bool:
        """Whether that many more bytes would fit now."""
        ...

    def may_have(self, path: TinkerPath) -> bool:
        """False where nothing can stand under a path's name but what this process put there. Never blocks."""
        ...

    def find(self, path: TinkerPath) -> Committed | None:
        """The replica that stands under a path's name, whatever the catalog knows. Raises DiskTrouble."""
        ...

    def manifest(self, directory: str) -> Manifest:
        """A replica's manifest, unproven. Raises OSError, ManifestInvalid."""
        ...

    def read(self, directory: str, advanced: Callable[[int], None] = ...) -> ReadBack:
        """Read a replica back: its manifest, and every defect."""
        ...

    def retire(self, directory: str) -> str:
        """Move a replica to the trash; returns the entry's name. Raises NoSpace, DiskTrouble."""
        ...

    def trashed(self, before: datetime | None = None) -> Sequence[Trashed]:
        """What is in the trash, or went there before that moment; oldest first."""
        ...

    def empty(self, entry: str) -> None:
        """Delete a trashed replica for good. Raises DiskTrouble."""
        ...

    def base_models(self) -> Mapping[str, str]:
        """Of every run that is here, its base model."""
        ...

    def list(self) -> Iterator[Replica | Damage]:
        """Every replica in the tree, from the manifests."""
        ...

    def record_run(self, run_id: str, facts: Mapping[str, object]) -> None:
        """Write `run.json`. Raises NoSpace, DiskTrouble."""
        ...


class Catalog(Protocol):
    """The index."""

    def known(self) -> Known:
        """All that planning needs, read once."""
        ...

    def known_of_missing(self) -> Known:
        """What planning needs to know of a listing that was just observed: at least of what is not mirrored."""
        ...

    def lacks(self, shown: Collection[TinkerPath], fraction: float) -> bool:
        """Whether more than this fraction of what the service showed last is not among these."""
        ...

    def observe(
        self, checkpoints: Sequence[Checkpoint], seen_at: datetime, *, complete: bool
    ) -> tuple[Checkpoint, ...]:
        """Record what was shown; with `complete`, also what is gone, which it returns. Writes only differences."""
        ...

    def listed(self) -> Sequence[Checkpoint]:
        """What the service showed last."""
        ...

    def deeds(self) -> Mapping[DeedKey, Deed]:
        """What was last done to each object upstream."""
        ...

    def unsettled_deeds(self) -> Sequence[Deed]:
        """Those of which a listing can still tell something new."""
        ...

    def suspects(self) -> tuple[Checkpoint, ...]:
        """What went from runs that we deleted in, and was not judged yet."""
        ...

    def apply(self, events: Iterable[tuple[tuple[int, int], Mapping[str, Any]]]) -> None:
        """Take up events that the journal holds, each with the position behind it."""
        ...

    def types_apart(self) -> bool | None:
        """Whether the server was found to keep types apart; None when nobody knows."""
        ...

    def standing(self) -> Mapping[TinkerPath, tuple[datetime, datetime]]:
        """Of everything that may go upstream: the object's time, and since when it may."""
        ...

    def stand(self, going: Mapping[TinkerPath, datetime], now: datetime) -> Mapping[TinkerPath, datetime]:
        """These may go upstream (path and the object's time), and nothing else; returns since when each may."""
        ...

    def counts(self) -> Mapping[str, int]:
        """`replicas`, `bytes`, `damaged`, `upstream`, `upstream_bytes`: small numbers, without reading rows."""
        ...

    def unmirrored(self) -> Sequence[tuple[Checkpoint, datetime | None, datetime]]:
        """What the service showed last and no replica is a copy of: the first expiry and the first sight of each."""
        ...

    def failures(self) -> Sequence[Failure]:
        """Everything that failed and was not cured."""
        ...

    def generation(self) -> int:
        """Another number after every change of replicas, failures, deeds or what is listed."""
        ...

    def add_lost(self, lost: Sequence[tuple[TinkerPath, datetime]]) -> None:
        """These ended upstream, then, before they were copied."""
        ...

    def lost(self) -> Sequence[tuple[TinkerPath, datetime]]:
        """What ended so, the last of it."""
        ...

    def told(self) -> Mapping[str, Any]:
        """What people were told of, as JSON."""
        ...

    def save_told(self, told: Mapping[str, Any]) -> None:
        """Keep it."""
        ...

    def other_bytes(self) -> int:
        """What superseded versions weigh."""
        ...

    def remove_replica(self, directory: str) -> None:
        """A replica is no longer there."""
        ...

    def add_replica(self, replica: Replica) -> None:
        """A replica is there; forgets its failures."""
        ...

    def replace_superseded(self, path: TinkerPath, replicas: Sequence[Replica]) -> None:
        """The superseded versions of a path are exactly these."""
        ...

    def mark_verified(self, directory: str, verified_at: datetime, damaged: Sequence[str]) -> None:
        """The outcome of a look at the bytes."""
        ...

    def add_failure(self, failure: Failure) -> None:
        """A transfer failed."""
        ...

    def served(self) -> ServedRecord:
        """What was learnt about whether this server hands out archives."""
        ...

    def save_served(self, record: ServedRecord) -> None:
        """Keep it."""
        ...

    def last_pass(self) -> Mapping[str, Any] | None:
        """The summary of the last pass."""
        ...

    def save_pass(self, summary: Mapping[str, object]) -> None:
        """Keep the summary of the last pass, for `status`."""
        ...


class Journal(Protocol):
    """What was meant and what became of it. Only the coordinator writes it."""

    def append(self, event: Mapping[str, Any]) -> tuple[int, int]:
        """Add one event, durably; returns the position behind it. Raises DiskTrouble."""
        ...


class Safeguards(Protocol):
    """Pins and the stop flag, read again before every delete."""

    def pins(self) -> tuple[str, ...]:
        """What is never let go. Raises FixFirst when that cannot be told."""
        ...

    def stopped(self) -> str | None:
        """Why enforcement is stopped, or None."""
        ...

    def stop(self, reason: str, now: datetime) -> None:
        """Stop enforcement until a person lifts that. Raises OSError."""
        ...


# Between planning and doing


class Queue(Protocol):
    """Work to do, most urgent first. In memory today; a transfer is plain data, so that it can be a table."""

    def offer(self, transfers: Sequence[Transfer]) -> None:
        """What is to be done now; replaces what waited, leaves what was claimed or deferred.

        Another object under a path that was deferred takes its place; under one that was claimed, it comes next.
        """
        ...

    def claim(self, accept: Callable[[Transfer], bool]) -> Transfer | None:
        """The most urgent one that is ready and accepted."""
        ...

    def defer(self, transfer: Transfer, seconds: float) -> None:
        """A claimed one goes back, ready after so many seconds."""
        ...

    def done(self, transfer: Transfer) -> None:
        """A claimed one is over, whatever became of it."""
        ...

    def clear(self) -> None:
        """Forget everything that waits."""
        ...

    def pending(self) -> tuple[Transfer, ...]:
        """Everything that waits, deferred ones too."""
        ...

    def next_ready_in(self) -> float | None:
        """Seconds until the next deferred one is ready; None when there is none."""
        ...


class Engine(Protocol):
    """What the page asks of the engine. It starts nothing."""

    @property
    def rows(self) -> Mapping[TinkerPath, Checkpoint]:
        """What the account showed last; another object after every change."""
        ...

    @property
    def waiting(self) -> int:
        """How many transfers wait or run."""
        ...

    @property
    def skipped(self) -> Mapping[TinkerPath, str]:
        """What is not copied, for a stated reason that is no failure."""
        ...

    def explain(
        self, rows: Mapping[TinkerPath, Checkpoint], replicas: Mapping[TinkerPath, Replica], now: datetime
    ) -> Mapping[TinkerPath, Sequence[Verdict]]:
        """What retention would decide about these runs, of each side. Blocking. Raises FixFirst, CatalogUnusable."""
        ...


class Reporter(Protocol):
    """Hears what goes on, for progress bars and metrics. Must not fail and must not wait."""

    def planned(self, transfers: int, total_bytes: int) -> None:
        """A plan was made: what is still to come."""
        ...

    def started(self, transfer: Transfer, expected_bytes: int | None) -> None:
        """A stage was opened."""
        ...

    def advanced(self, transfer: Transfer, received: int) -> None:
        """So many more bytes came."""
        ...

    def ended(self, transfer: Transfer, error: str | None) -> None:
        """It is done, or this attempt failed."""
        ...

    def happened(self, event: Event) -> None:
        """Something came of it: committed, deleted, failed for this pass."""
        ...
