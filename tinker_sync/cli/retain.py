"""Commands that let go, and those that tell of it and take it back: `prune`, `trash`, `resume`, `history`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from tinker_sync.cli import plan as planning
from tinker_sync.cli import render, work
from tinker_sync.destination.safeguards import lift_stop, read_stop
from tinker_sync.errors import FixFirst, TinkerSyncError
from tinker_sync.journal import end_of, examine, read_events
from tinker_sync.model.checkpoint import Listing
from tinker_sync.model.moments import parse_time, rfc3339
from tinker_sync.passes import PassResult
from tinker_sync.wiring import (
    CATALOG_FILE,
    check_owner,
    open_catalog_for_reading,
    open_enforcer,
    open_listeners,
    open_mirror,
    open_root,
    open_service,
    open_tree_for_reading,
)

if TYPE_CHECKING:
    from tinker_sync.config import Settings
    from tinker_sync.enforcement import Enforced
    from tinker_sync.model.paths import TinkerPath
    from tinker_sync.wiring import OpenRoot


async def prune(settings: Settings, *, apply: bool, allow: int | None, as_json: bool) -> int:
    """Enforce retention now, or show what that would do."""
    if not apply:
        nothing = PassResult().as_json()
        more = {key: value for key, value in nothing.items() if key not in ("complete", "breaker", "service_error")}
        return await planning.show(settings, allow=allow, as_json=as_json, more=more)
    async with open_service(settings) as service:
        await service.credentials.headers()
        with open_root(settings, command="prune", account=service.credentials.account) as root:
            async with (
                open_listeners(settings, root) as listeners,
                open_mirror(settings, service, root, listeners.hooks, command="prune") as mirror,
            ):
                result = await mirror.prune(allow=allow)
    if as_json:
        render.print_json(result.as_json())
        return result.exit_code
    for doubt in result.doubts:
        render.say(f"nothing went: the listing is unproven ({doubt})")
    work.tell_enforced(result.enforced, applied=True)
    if result.service_error is not None:
        render.warn(f"tinker-sync: {result.service_error}")
    return result.exit_code


async def remove(
    settings: Settings, path: TinkerPath, *, seconds: int | None, unproven: bool, action: str, as_json: bool
) -> int:
    """`remote delete` and `remote set-ttl`: one checkpoint, by a person's word, through enforcement.

    `seconds` is None to delete, or, for `set-ttl`, to let it live for ever.
    """
    command = f"remote {action}"
    async with open_service(settings) as service:
        await service.credentials.headers()
        with open_root(settings, command=command, account=service.credentials.account) as root:
            async with (
                open_listeners(settings, root) as listeners,
                open_enforcer(settings, service, root, listeners.hooks, command=command) as enforcer,
            ):
                found = await enforcer.survey()
                row = next((row for row in found.checkpoints if row.path == path), None)
                longer = row is not None and action == "set-ttl" and _is_longer(row.expires_at, seconds)
                if row is not None and longer:
                    await enforcer.lengthen(row, seconds)
                    enforcer.result.extended.append(path)
                else:
                    ttl = timedelta(seconds=seconds) if seconds is not None else None
                    await enforcer.remove_one(found, path, unproven=unproven, ttl=ttl)
                proven = isinstance(found, Listing)
    return _tell_one(enforcer.result, path, proven=proven, unproven=unproven, as_json=as_json)


def _is_longer(expires_at: datetime | None, seconds: int | None) -> bool:
    """Whether a TTL lets a checkpoint live at least as long as it would without."""
    if seconds is None:
        return True
    return expires_at is not None and datetime.now(UTC) + timedelta(seconds=seconds) >= expires_at


def _tell_one(result: Enforced, path: TinkerPath, *, proven: bool, unproven: bool, as_json: bool) -> int:
    done = path in (*result.deleted, *result.expired, *result.extended)
    code = 5 if result.stopped is not None else 0 if done else 1
    if not done and not proven and not unproven:
        code = max(code, 3)
    why = result.stopped or result.failed.get(path) or result.withheld.get(path)
    if as_json:
        render.print_json(
            {
                "tinker_path": str(path),
                "done": done,
                "reason": None if done else why,
                "deleted": [str(item) for item in result.deleted],
                "stopped": result.stopped,
            }
        )
        return code
    if path in result.deleted:
        render.say(f"{path} is deleted")
    elif done:
        render.say(f"{path} has its new expiry")
    else:
        render.say(f"{path} was left as it is: {why}")
        if path in result.withheld and not unproven:
            render.say("  to do it all the same, without proof: --unproven, and type the path again")
    if result.stopped is not None:
        render.say(f"STOPPED: {result.stopped}; look into it, then `tinker-sync resume`")
    return code


def _note(root: OpenRoot, event: str, **facts: object) -> None:
    """One line in the journal, and what follows from it in the catalog."""
    line = {"time": rfc3339(datetime.now(UTC)), "event": event, **facts}
    root.catalog.apply([(root.journal.append(line), line)])


def trash_list(settings: Settings, *, as_json: bool) -> int:
    """What local retention let go, and when it is deleted."""
    keep: timedelta = settings.retention.trash
    items = open_tree_for_reading(settings).trashed()
    if as_json:
        render.print_json(
            {
                "trash": [
                    {
                        "entry": item.entry,
                        "tinker_path": None if item.path is None else str(item.path),
                        "time": None if item.time is None else rfc3339(item.time),
                        "trashed_at": rfc3339(item.trashed_at),
                        "deleted_after": rfc3339(item.trashed_at + keep),
                        "total_bytes": item.total_bytes,
                    }
                    for item in items
                ]
            }
        )
        return 0
    now = datetime.now(UTC)
    rows = [
        (
            item.entry,
            str(item.path or "(its manifest cannot be read)"),
            render.size(item.total_bytes),
            render.ago(item.trashed_at, now),
            render.ahead(item.trashed_at + keep, now),
        )
        for item in items
    ]
    render.table(("entry", "checkpoint", "size", "trashed", "deleted"), rows)
    render.say(f"{len(items)} in the trash, {render.size(sum(item.total_bytes for item in items))}")
    return 0


def trash_restore(settings: Settings, wanted: list[str], *, as_json: bool) -> int:
    """Give trashed replicas their places back; named by entry or by tinker path (then the one trashed last)."""
    restored: list[dict[str, str]] = []
    failed: list[dict[str, str]] = []
    with open_root(settings, command="trash restore") as root:
        for name in wanted:
            items = [item for item in root.tree.trashed() if name in (item.entry, str(item.path))]
            if not items:
                failed.append({"name": name, "error": "is not in the trash: see `tinker-sync trash ls`"})
                continue
            item = items[-1]
            facts = {"tinker_path": str(item.path), "entry": item.entry}
            digest = next(
                (
                    event.get("manifest_sha256")
                    for _, event in read_events(settings.state)
                    if event["event"] == "local.trashed" and event.get("entry") == item.entry
                ),
                None,
            )
            _note(root, "local.intent", **facts, action="restore", directory="")
            try:
                committed = root.tree.restore(item.entry, digest)
            except (TinkerSyncError, FileNotFoundError) as error:
                _note(root, "local.failed", **facts, answer=str(error))
                failed.append({"name": name, "error": str(error)})
                continue
            root.catalog.add_replica(committed.replica)
            if committed.superseded is not None:
                root.catalog.replace_superseded(committed.replica.path, committed.superseded)
            _note(root, "local.restored", **facts)
            restored.append({"entry": item.entry, "tinker_path": str(item.path)})
    if as_json:
        render.print_json({"restored": restored, "failed": failed})
    else:
        for done in restored:
            render.say(f"{done['tinker_path']} is back; `tinker-sync pin` it, or local retention takes it again")
        for problem in failed:
            render.say(f"{problem['name']}: {problem['error']}")
    return 1 if failed else 0


def trash_empty(settings: Settings, *, as_json: bool) -> int:
    """Delete everything that is in the trash, now."""
    emptied: list[str] = []
    size = 0
    with open_root(settings, command="trash empty") as root:
        for item in root.tree.trashed():
            root.tree.empty(item.entry)
            facts = {} if item.path is None else {"tinker_path": str(item.path)}
            _note(root, "local.emptied", **facts, entry=item.entry, why="`trash empty`")
            emptied.append(item.entry)
            size += item.total_bytes
    if as_json:
        render.print_json({"emptied": emptied, "bytes": size})
    else:
        render.say(f"{len(emptied)} deleted for good, {render.size(size)} freed")
    return 0


def resume(settings: Settings) -> int:
    """Lift the stop flag."""
    reason = read_stop(settings.state)
    if reason is None:
        render.say("enforcement is not stopped")
        return 0
    check_owner(settings)
    lift_stop(settings.state)
    render.say(f"lifted; it was stopped because: {reason}")
    return 0


def history(
    settings: Settings,
    *,
    paths: list[str],
    events: list[str],
    since: str | None,
    limit: int,
    check: bool,
    as_json: bool,
) -> int:
    """The journal: shown, filtered, or checked."""
    if check:
        return _check(settings, as_json=as_json)
    try:
        earliest = None if since is None else parse_time(since)
    except ValueError as error:
        message = f"--since {since!r} is no time: write it like 2026-12-24T18:00:00Z, or 2026-12-24"
        raise FixFirst(message) from error
    found: list[dict[str, Any]] = []
    for _, event in read_events(settings.state):
        told = str(event.get("tinker_path", ""))
        if paths and not any(told == path or told.startswith(f"tinker://{path.rstrip('/')}/") for path in paths):
            continue
        if events and not any(event["event"] == name or event["event"].startswith(f"{name}.") for name in events):
            continue
        if earliest is not None and not _is_since(event, earliest):
            continue
        found.append(event)
        if limit and len(found) > 2 * limit:
            del found[:-limit]
    shown = found[-limit:] if limit else found
    if as_json:
        render.print_json({"events": shown})
        return 0
    render.table(
        ("time", "event", "checkpoint", "what"),
        [
            (str(event.get("time", ""))[:19], event["event"], event.get("tinker_path", ""), _what(event))
            for event in shown
        ],
    )
    render.say(f"{len(shown)} events" + (", the newest; --limit 0 shows all" if limit and len(found) > limit else ""))
    return 0


def _is_since(event: dict[str, Any], earliest: datetime) -> bool:
    try:
        return parse_time(str(event.get("time"))) >= earliest
    except ValueError:
        return True


def _what(event: dict[str, Any]) -> str:
    """The rest of an event, in a few words."""
    parts = [str(event[key]) for key in ("outcome", "action", "answer", "why", "reason") if event.get(key)]
    if event.get("policy"):
        parts.append(f"policy {event['policy']}")
    if isinstance(event.get("reasons"), list):
        parts.append(", ".join(map(str, event["reasons"])))
    if isinstance(event.get("read_back"), dict):
        parts.append(f"read back {event['read_back'].get('files')} files, {event['read_back'].get('bytes')} bytes")
    if event.get("unproven"):
        parts.append("unproven")
    return "; ".join(parts)


def _check(settings: Settings, *, as_json: bool) -> int:
    found = examine(settings.state)
    if (settings.state / CATALOG_FILE).exists():
        with open_catalog_for_reading(settings) as catalog:
            known, end = catalog.journal_position(), end_of(settings.state)
        if known > end:
            found.problems.append(
                f"it ends at {end}, and the catalog took up events as far as {known}: lines are missing"
            )
    if as_json:
        render.print_json(
            {
                "lines": found.lines,
                "files": found.files,
                "last_hash": found.last if found.lines else None,
                "problems": found.problems,
            }
        )
    else:
        for problem in found.problems:
            render.say(problem)
        render.say(
            f"{found.lines} lines in {found.files} files: {'DAMAGED' if found.problems else 'the chain is whole'}"
        )
        if found.lines:
            render.say(f"  last hash {found.last}: note it elsewhere if a cut tail must show")
    return 1 if found.problems else 0
