"""What must hold before a root is used: owner, mount, account, encoding; recorded in `root.json`."""

from __future__ import annotations

import json
import os
import unicodedata
import uuid
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from tinker_sync.destination.files import fsync_directory, make_directories, replace_file
from tinker_sync.destination.mounts import is_mount_point
from tinker_sync.errors import WrongRoot
from tinker_sync.model.moments import rfc3339

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

STATE_DIRECTORY: Final = ".tinker-sync"
ROOT_FILE: Final = "root.json"
FORMAT: Final = 1


@dataclass(frozen=True, slots=True)
class RootFacts:
    """What `root.json` records."""

    portable_names: bool
    """Whether names are encoded for Windows and SMB too."""
    folds_names: bool
    """Whether the filesystem takes names that differ by case or Unicode form for one another."""
    server: str
    account: str | None
    created_at: str
    root_id: str
    """Ties a state directory that stands elsewhere to this root."""
    state: str | None
    """Where catalog and lock are, when that is not below the root: two of them would be two writers."""


def read_facts(root: Path) -> RootFacts | None:
    """Read `root.json`, without any lock; None for a directory that is no root yet.

    Raises WrongRoot for a format of another version or a file that cannot be read.
    """
    path = root / STATE_DIRECTORY / ROOT_FILE
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except PermissionError as error:
        message = f"{path}: {error.strerror}; run as the user that owns {root}"
        raise WrongRoot(message) from error
    except (OSError, ValueError) as error:
        message = f"{path} cannot be read ({error}); restore it, or move it away to have it made anew"
        raise WrongRoot(message) from error
    return _parse(document, path)


def _parse(document: Any, path: Path) -> RootFacts:
    try:
        if document["format"] != FORMAT:
            message = f"{path} has format {document['format']!r}, this version reads {FORMAT}: use a newer tinker-sync"
            raise WrongRoot(message)
        return RootFacts(
            portable_names=bool(document["encoding"]["portable_names"]),
            folds_names=bool(document["encoding"]["folds_names"]),
            server=str(document["server"]),
            account=document.get("account"),
            created_at=str(document["created_at"]),
            root_id=str(document["root_id"]),
            state=document.get("state"),
        )
    except (KeyError, TypeError) as error:
        message = f"{path} lacks {error}; restore it, or move it away to have it made anew"
        raise WrongRoot(message) from error


def prepare_root(
    root: Path,
    *,
    server: str,
    account: str | None,
    state: Path | None = None,
    portable_names: bool | None = None,
    must_be_mount: bool = False,
    dir_mode: int = 0o700,
) -> RootFacts:
    """Make or check a root before the first write.

    `state` is None when it is below the root; `portable_names` is None for `auto` (probe the filesystem). Raises WrongRoot when the root is another account's,
    another user's, or not the mount that was promised.
    """
    if must_be_mount and not (root.is_dir() and is_mount_point(root)):
        message = (
            f"{root} is not a mount point, and [mirror] must_be_mount is true: mount it first. "
            "(Without this check the mirror would fill the disk below it.)"
        )
        raise WrongRoot(message)
    try:
        for directory in make_directories(root, mode=dir_mode) + make_directories(root / STATE_DIRECTORY, mode=0o700):
            fsync_directory(directory)
        owner = root.stat().st_uid
    except OSError as error:
        message = f"cannot make {root / STATE_DIRECTORY}: {error.strerror}; choose another [mirror] root or its owner"
        raise WrongRoot(message) from error
    if owner != os.geteuid():
        message = f"{root} belongs to user {owner}, this is user {os.geteuid()}: run as its owner (sudo -u …)"
        raise WrongRoot(message)
    facts = read_facts(root)
    if facts is not None:
        return _agree(root, facts, server=server, account=account, state=state)
    probed = _probe(root / STATE_DIRECTORY)
    facts = RootFacts(
        portable_names=probed[0] if portable_names is None else portable_names,
        folds_names=probed[1],
        server=server,
        account=account,
        created_at=rfc3339(datetime.now(UTC).replace(microsecond=0)),
        root_id=uuid.uuid4().hex,
        state=None if state is None else str(state),
    )
    _write(root, facts)
    return facts


def _agree(root: Path, facts: RootFacts, *, server: str, account: str | None, state: Path | None) -> RootFacts:
    if facts.state != (None if state is None else str(state)):
        message = (
            f"the catalog and the lock of {root} are in {facts.state or root / STATE_DIRECTORY}: set [mirror] state "
            f'to that, or, if it moved, change "state" in {root / STATE_DIRECTORY / ROOT_FILE}'
        )
        raise WrongRoot(message)
    if facts.account is not None and account is not None and facts.account != account:
        message = (
            f"{root} mirrors account {facts.account}, the credential is of account {account}: "
            "use that account's credential, or another [mirror] root"
        )
        raise WrongRoot(message)
    if facts.server != server:
        message = (
            f"{root} mirrors {facts.server}, [tinker] base_url is {server}: use another [mirror] root, "
            f'or, if the server only moved, change "server" in {root / STATE_DIRECTORY / ROOT_FILE}'
        )
        raise WrongRoot(message)
    if facts.account is None and account is not None:
        facts = replace(facts, account=account)
        _write(root, facts)
    return facts


def _write(root: Path, facts: RootFacts) -> None:
    document: Mapping[str, object] = {
        "format": FORMAT,
        "encoding": {"portable_names": facts.portable_names, "folds_names": facts.folds_names},
        "server": facts.server,
        "account": facts.account,
        "created_at": facts.created_at,
        "root_id": facts.root_id,
        "state": facts.state,
    }
    try:
        replace_file(root / STATE_DIRECTORY / ROOT_FILE, (json.dumps(document, indent=1) + "\n").encode())
    except OSError as error:
        message = f"cannot write {root / STATE_DIRECTORY / ROOT_FILE}: {error.strerror}"
        raise WrongRoot(message) from error


def _probe(directory: Path) -> tuple[bool, bool]:
    """(refuses what Windows refuses, takes similar names for the same), tried out in `directory`."""
    token = f"probe-{os.getpid()}-{os.urandom(4).hex()}-"
    made: list[Path] = []

    def can_hold(name: str) -> bool:
        path = directory / (token + name)
        try:
            path.touch(mode=0o600, exist_ok=False)
        except OSError:
            return False
        made.append(path)
        return (token + name) in os.listdir(directory)

    try:
        portable = not all(can_hold(name) for name in ("a:b", 'a"b', "a?", "dot."))
        lower, composed = can_hold("caf\u00e9"), "caf\u00e9"
        folds = lower and any(
            (directory / (token + other)).exists()
            for other in (composed.upper(), unicodedata.normalize("NFD", composed))
        )
        return portable, folds
    finally:
        for path in made:
            with suppress(OSError):
                path.unlink()
