"""`tinker-sync doctor`: tries what a mirror needs, and says what to do about what is missing."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass, field
from email.utils import mktime_tz, parsedate_tz
from typing import TYPE_CHECKING, Final

from tinker_sync.api.account import TinkerSigner
from tinker_sync.cli import render
from tinker_sync.config import find_config
from tinker_sync.destination.lock import holder_of
from tinker_sync.destination.mounts import filesystem_type, is_mount_point, is_network
from tinker_sync.destination.root import read_facts
from tinker_sync.destination.space import free_bytes
from tinker_sync.errors import BeingMade, FixFirst, NotFound, NotServed, TinkerSyncError
from tinker_sync.model.checkpoint import Listing
from tinker_sync.model.paths import CHECKPOINT_TYPES
from tinker_sync.wiring import LOCK_FILE, SystemClock, make_account, open_service, types_known_apart

if TYPE_CHECKING:
    from pathlib import Path

    from tinker_sync.config import Settings
    from tinker_sync.model.checkpoint import Checkpoint
    from tinker_sync.wiring import Service

_CLOCK_LIMIT: Final = 60.0
"""Seconds; signed URLs and TTLs are read by this host's clock."""
_MARKS: Final = {"ok": "ok  ", "warning": "warn", "failure": "FAIL"}


@dataclass(slots=True)
class _Report:
    checks: list[dict[str, str]] = field(default_factory=list)
    exit_code: int = 0

    def add(self, check: str, result: str, detail: str, *, exit_code: int = 1) -> None:
        """One line; a failure raises the exit code."""
        self.checks.append({"check": check, "result": result, "detail": detail})
        if result == "failure":
            self.exit_code = max(self.exit_code, exit_code)


async def examine(settings: Settings, explicit: Path | None, *, as_json: bool) -> int:
    """Run every check; 0 when a mirror would work."""
    report = _Report()
    path = await asyncio.to_thread(find_config, explicit)
    report.add("configuration", "ok", str(path or "defaults and environment"))
    await asyncio.to_thread(_check_root, settings, report)
    try:
        async with open_service(settings) as service:
            if await _check_credential(settings, service, report):
                await _check_account(settings, service, report)
    except FixFirst as error:
        report.add("service", "failure", str(error), exit_code=2)
    if as_json:
        render.print_json({"checks": report.checks, "exit_code": report.exit_code})
    else:
        for check in report.checks:
            render.say(f"{_MARKS[check['result']]}  {check['check']:<14} {check['detail']}")
    return report.exit_code


def _check_root(settings: Settings, report: _Report) -> None:
    root = settings.root
    if not root.exists():
        report.add("root", "ok", f"{root} will be made (on {filesystem_type(_existing(root))})")
    elif root.stat().st_uid != os.geteuid():
        detail = f"{root} belongs to user {root.stat().st_uid}, this is user {os.geteuid()}: run as its owner"
        report.add("root", "failure", detail, exit_code=2)
    elif not os.access(root, os.W_OK | os.X_OK):
        report.add("root", "failure", f"{root} cannot be written: chmod u+rwx it", exit_code=2)
    else:
        report.add("root", "ok", f"{root} (on {filesystem_type(root)})")
    if settings.mirror.must_be_mount and not is_mount_point(root):
        report.add("mount", "failure", f"{root} is not a mount point, and must_be_mount is true", exit_code=2)
    _check_space(settings, report)
    try:
        facts = read_facts(root)
        if facts is not None and facts.server != settings.base_url:
            detail = f"{root} mirrors {facts.server}, base_url is {settings.base_url}: use another root"
            report.add("root.json", "failure", detail, exit_code=2)
    except FixFirst as error:
        report.add("root.json", "failure", str(error), exit_code=2)
    if is_network(_existing(settings.state)):
        detail = f"{settings.state} is on a network filesystem, where locks prove little: set [mirror] state"
        report.add("lock", "warning", detail)
    if (settings.state / LOCK_FILE).exists():
        try:
            holder = holder_of(settings.state / LOCK_FILE)
            report.add("lock", "ok", "free" if holder is None else f"held by a running tinker-sync{holder}")
        except OSError as error:
            report.add("lock", "failure", f"{settings.state / LOCK_FILE}: {error.strerror}", exit_code=2)


def _check_space(settings: Settings, report: _Report) -> None:
    free, wanted = free_bytes(_existing(settings.root)), int(settings.mirror.min_free)
    detail = f"{render.size(free)} free, [mirror] min_free is {render.size(wanted)}"
    report.add("disk", "ok" if free > wanted else "failure", detail)


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


async def _check_credential(settings: Settings, service: Service, report: _Report) -> bool:
    try:
        await service.credentials.headers()
        begun = time.monotonic()
        await service.client.list_user_checkpoints(limit=1)
    except (NotFound, NotServed):
        pass  # the listing says more about that
    except TinkerSyncError as error:
        report.add("credential", "failure", str(error), exit_code=3)
        return False
    took = time.monotonic() - begun
    report.add("credential", "ok", f"{service.credentials.sources.describe()} is accepted by {settings.base_url}")
    report.add("service", "ok", f"answers in {took * 1000:.0f} ms")
    date = parsedate_tz(service.transport.last_date)
    if date is not None:
        skew = time.time() - mktime_tz(date)
        good = abs(skew) <= _CLOCK_LIMIT
        detail = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the service"
        report.add("clock", "ok" if good else "failure", detail + ("" if good else ": set it (NTP)"))
    return True


async def _check_account(settings: Settings, service: Service, report: _Report) -> None:
    account = make_account(settings, service, SystemClock())
    try:
        found = await account.list()
    except TinkerSyncError as error:
        report.add("listing", "failure", str(error), exit_code=3)
        return
    if isinstance(found, Listing):
        report.add("listing", "ok", f"{len(found.checkpoints)} checkpoints, proven complete")
    else:
        doubts = "; ".join(found.doubts)
        report.add("listing", "failure", f"{len(found.checkpoints)} checkpoints, not proven: {doubts}", exit_code=3)
    await _compare_views(service, found.checkpoints, report)
    newest: dict[str, Checkpoint] = {}
    for row in sorted(found.checkpoints, key=lambda row: row.time):
        newest[row.checkpoint_type] = row
    for kind in CHECKPOINT_TYPES:
        await _check_type(settings, service, kind, newest.get(kind), report)
    _check_twins(settings, found.checkpoints, report)


async def _compare_views(service: Service, rows: tuple[Checkpoint, ...], report: _Report) -> None:
    """The listing against one run's own list: a server may leave a type out of one of them."""
    if not rows:
        return
    run = max(rows, key=lambda row: row.time).path.run_id
    try:
        answer = await service.client.list_checkpoints(run)
    except TinkerSyncError as error:
        report.add("views", "warning", f"the list of run {run} cannot be had: {error}")
        return
    mine = {str(row.path) for row in rows if row.path.run_id == run}
    theirs = {row.tinker_path for row in answer.checkpoints}
    if theirs - mine:
        detail = f'run {run} itself lists {len(theirs - mine)} more checkpoints: set [tinker] listing = "both"'
        report.add("views", "failure", detail)
    else:
        report.add("views", "ok", "the account's list and the newest run's agree")


async def _check_type(settings: Settings, service: Service, kind: str, row: Checkpoint | None, report: _Report) -> None:
    if row is None:
        report.add(kind, "ok", "none in the account, so nothing is known")
        return
    path = str(row.path)
    try:
        if kind == "external":
            await service.client.get_external_weights_urls(path)
            report.add(kind, "ok", "handed out file by file")
        else:
            async with TinkerSigner(service.client).archive(row.path, row.listed_id) as answer:
                url = answer.url
            if url is not None and url.scheme == "file" and not settings.tinker.file_urls_below:
                detail = "handed out as directories of the server's own host: set [tinker] file_urls_below"
                report.add(kind, "failure", detail)
                return
            way = "sent at once" if url is None else "directories" if url.scheme == "file" else f"URLs at {url.host}"
            report.add(kind, "ok", f"archives are handed out ({way})")
    except BeingMade:
        report.add(kind, "ok", "archives are made on demand; this one is being made")
    except (NotServed, NotFound) as error:
        detail = f"this server hands out none ({error.status}): {kind} checkpoints cannot be mirrored from it"
        report.add(kind, "warning", detail)
    except TinkerSyncError as error:
        report.add(kind, "failure", str(error))


def _check_twins(settings: Settings, rows: tuple[Checkpoint, ...], report: _Report) -> None:
    """On servers that keep both types of a name in one place, deleting one deletes both."""
    if types_known_apart(settings):
        return
    types: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        types.setdefault((row.path.run_id, row.path.name), set()).add(row.checkpoint_type)
    twins = [name for name, found in types.items() if len(found) > 1]
    if twins:
        run, name = twins[0]
        detail = (
            f"{len(twins)} names exist in two types ({run}/{name}); some servers keep both in one place, "
            "so that deleting one deletes both. Until it is known, they go together or not at all; "
            "[tinker] types_apart = true says that you know"
        )
        report.add("names", "warning", detail)
