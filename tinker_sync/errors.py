"""Everything that can go wrong, sorted by what the caller does about it.

TinkerSyncError
├── FixFirst                    a person must change something; exit 2
│   ├── ConfigInvalid           the configuration file, the environment or an option
│   └── WrongRoot               this root belongs to another account, user or mount
├── RootBusy                    another process holds the root; exit 4
├── RootLost                    what was opened is no longer there: unmounted, moved, deleted; end, and open anew
├── ServiceTrouble              the whole service: wait, then ask again; exit 3
│   ├── Unreachable             no answer: DNS, connect, TLS, timeout, a cut answer
│   ├── Overloaded              429 and 5xx after all retries
│   ├── CredentialMissing       no source gave a credential
│   ├── CredentialRefused       401
│   └── ProtocolBroken          an answer that is not the API's
├── RequestRefused              this one request: the service will not do it
│   ├── BadIdentifier           400, 422
│   ├── BillingBlocked          402
│   ├── NotAllowed              403
│   ├── NotFound                404
│   ├── NotServed               405, 410, 501: this server does not have the call
│   ├── AlreadySo               409 where the wanted state is already there
│   └── BeingMade               503, 425, 409 of an archive: ask again later
└── TransferFailed              this checkpoint, this attempt: the others go on
    ├── StorageTrouble          the storage host: cut, stalled, 5xx, an expired URL; worth another attempt
    ├── Defective               the bytes are not what was promised; carries every defect
    ├── NotTransferable         this server hands it out in no way that we may use
    ├── NoSpace                 the disk is full, or would be; stops downloads, not the program
    └── DiskTrouble             EIO, a failed fsync, a read-only filesystem

Messages say what is wrong, where, and what to do. They never hold a credential or a signed URL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tinker_sync.model.evidence import Defect


class TinkerSyncError(Exception):
    """The root of the tree; `exit_code` is what a command that ends with it returns."""

    exit_code = 1


class FixFirst(TinkerSyncError):
    """A person must change something before this can work."""

    exit_code = 2


class ConfigInvalid(FixFirst):
    """The configuration is wrong; the message names file, key and the nearest valid one."""


class WrongRoot(FixFirst):
    """The root exists but is not ours to use: another account, another user, a missing mount."""


class RootBusy(TinkerSyncError):
    """Another process holds the lock of this root."""

    exit_code = 4


class RootLost(TinkerSyncError):
    """Root, lock or catalog are no longer what was opened: nothing more may be written there."""


class ServiceTrouble(TinkerSyncError):
    """Trouble of the whole service: it backs off the server, not a checkpoint.

    `retry_after` is in seconds, where the service said so.
    """

    exit_code = 3

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Unreachable(ServiceTrouble):
    """No whole answer: name resolution, connect, TLS, timeout, a cut answer."""


class Overloaded(ServiceTrouble):
    """429 or 5xx after all retries."""

    def __init__(self, message: str, *, status: int, retry_after: float | None = None) -> None:
        super().__init__(message, retry_after=retry_after)
        self.status = status


class CredentialMissing(ServiceTrouble):
    """No source of a credential gave one."""


class CredentialRefused(ServiceTrouble):
    """401: the service does not accept the credential."""


class ProtocolBroken(ServiceTrouble):
    """An answer that is not the API's: no JSON, or JSON of another shape."""


class RequestRefused(TinkerSyncError):
    """The service will not do this one request. `status` is the HTTP status, `retry_after` seconds, where said."""

    def __init__(self, message: str, *, status: int, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class BadIdentifier(RequestRefused):
    """400 or 422: the request as such is wrong."""


class BillingBlocked(RequestRefused):
    """402: the account's billing stands in the way."""

    exit_code = 3


class NotAllowed(RequestRefused):
    """403: the credential is good, this is not allowed with it."""


class NotFound(RequestRefused):
    """404: not there, or not yours."""


class NotServed(RequestRefused):
    """405, 410 or 501: this server does not have the call."""


class AlreadySo(RequestRefused):
    """409 of publish and unpublish: the wanted state is already there."""


class BeingMade(RequestRefused):
    """503, 425 or 409 of an archive: it is being built; ask again after `retry_after` seconds, if said."""


class TransferFailed(TinkerSyncError):
    """This attempt at this checkpoint failed; the others go on.

    `again_now` says whether another attempt within the same pass is worth it.
    """

    again_now = False


class StorageTrouble(TransferFailed):
    """The storage host: cut, stalled, 5xx, or an expired URL.

    `status` is the HTTP status where there was one, else 0; `stalled` says that nothing came for too long.
    """

    again_now = True

    def __init__(self, message: str, *, status: int = 0, stalled: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.stalled = stalled


class ObjectChanged(StorageTrouble):
    """The storage has another object under that URL than it had at the beginning: what came is of no use."""


class Defective(TransferFailed):
    """The bytes are not what was promised. `defects` has all that was found, never just the first.

    `quarantine` is the directory below the root that keeps the bytes, where they arrived whole.
    """

    def __init__(self, defects: Sequence[Defect], *, quarantine: str = "") -> None:
        super().__init__("; ".join(str(defect) for defect in defects))
        self.defects = tuple(defects)
        self.quarantine = quarantine

    @property
    def again_now(self) -> bool:  # type: ignore[override]
        """A cut or a wrong digest is worth another attempt; a wrong structure comes again."""
        return any(defect.again_now for defect in self.defects)


class NotTransferable(TransferFailed):
    """This server hands the checkpoint out in no way that we may use."""


class NoSpace(TransferFailed):
    """The disk is full, or would be below `min_free`."""


class DiskTrouble(TransferFailed):
    """EIO, a failed fsync, a read-only filesystem."""


def place_of(error: BaseException) -> str:
    """`file.py:12`, where an error that nobody foresaw was raised: its text and its variables could hold a secret."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}" if trace is not None else "?"
