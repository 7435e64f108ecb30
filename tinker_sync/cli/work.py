"""Commands that move bytes: they take the lock, open the service, run the engine, and tell what it did."""

from __future__ import annotations

import asyncio
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from tinker_sync.activity import Reporters
from tinker_sync.cli import render
from tinker_sync.cli.handover import Relay, hand_over
from tinker_sync.errors import ServiceTrouble
from tinker_sync.model.paths import TinkerPath
from tinker_sync.passes import PassResult, failed_pass, not_repaired
from tinker_sync.scrub import choose
from tinker_sync.wiring import (
    control_of_holder,
    make_scrubber,
    open_catalog_for_reading,
    open_listeners,
    open_mirror,
    open_root,
    open_service,
    open_tree_for_reading,
    tell_alarms,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tinker_sync.catalog.store import SqlCatalog
    from tinker_sync.config import Settings
    from tinker_sync.destination.local import LocalTree
    from tinker_sync.enforcement import Enforced
    from tinker_sync.model.work import Replica
    from tinker_sync.ports import Reporter
    from tinker_sync.scrub import ScrubResult
    from tinker_sync.wiring import Service


_SHOWN = 40


async def sync(settings: Settings, reporter: Reporter, *, as_json: bool) -> int:
    """One pass."""
    async with open_service(settings) as service:
        refused = await _credential_trouble(service)
        with open_root(settings, command="sync", account=service.credentials.account) as root:
            async with open_listeners(settings, root) as listeners:
                if refused is not None:
                    root.catalog.save_pass(failed_pass(refused, root.catalog.last_pass()))
                    await tell_alarms(settings, root, listeners.telling)
                    raise refused
                async with open_mirror(settings, service, root, Reporters([reporter, listeners.hooks])) as mirror:
                    try:
                        result = await mirror.sync()
                    finally:
                        await tell_alarms(settings, root, listeners.telling)
                if result.complete:
                    listeners.messenger.alive()
    return _tell(result, as_json=as_json)


async def _credential_trouble(service: Service) -> ServiceTrouble | None:
    """Get a credential, which also tells whose it is, before the root is opened."""
    try:
        await service.credentials.headers()
    except ServiceTrouble as error:
        return error
    return None


async def fetch(settings: Settings, paths: Sequence[TinkerPath], reporter: Reporter, *, as_json: bool) -> int:
    """These, now; by the service that holds the root, where there is one."""
    control = control_of_holder(settings)
    if control is not None:
        heard = Relay(reporter, paths).hear
        return _tell(_as_result(await hand_over(control, "fetch", paths, heard)), as_json=as_json)
    async with open_service(settings) as service:
        await service.credentials.headers()
        with open_root(settings, command="fetch", account=service.credentials.account) as root:
            async with (
                open_listeners(settings, root) as listeners,
                open_mirror(settings, service, root, Reporters([reporter, listeners.hooks])) as mirror,
            ):
                result = await mirror.fetch(paths)
    return _tell(result, as_json=as_json)


def _tell(result: PassResult, *, as_json: bool) -> int:
    if as_json:
        render.print_json(result.as_json())
        return result.exit_code
    rate = f", {render.size(result.bytes / result.seconds)}/s" if result.bytes and result.seconds else ""
    render.say(
        f"{result.listed} listed, {len(result.transferred)} copied ({render.size(result.bytes)} in "
        f"{result.seconds:.1f} s{rate}), {len(result.failed)} failed, {len(result.skipped)} skipped"
    )
    reasons: dict[str, int] = {}
    for reason in result.skipped.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    for reason, number in sorted(reasons.items()):
        render.say(f"  skipped {number}: {reason}")
    for path, (error, retry_at) in sorted(result.failed.items()):
        again = f" (again at {retry_at})" if retry_at else ""
        render.say(f"  failed {path}: {error}{again}")
    for doubt in result.doubts:
        render.say(f"  the listing is unproven: {doubt}")
    tell_enforced(result.enforced, applied=False)
    if result.service_error is not None:
        render.warn(f"tinker-sync: {result.service_error}")
    return result.exit_code


def tell_enforced(done: Enforced, *, applied: bool) -> None:
    """What enforcement did; without `applied`, nothing where there was nothing to do."""
    counts = {
        "deleted upstream": len(done.deleted),
        "left to expire": len(done.expired),
        "given their former expiry back": len(done.restored),
        "given longer to live": len(done.extended),
        "moved to the trash": len(done.trashed),
        "deleted from the trash": done.emptied,
    }
    told = ", ".join(f"{number} {what}" for what, number in counts.items() if number)
    if told or (applied and done.breaker is None and done.stopped is None):
        render.say(told or "nothing to let go")
    elif done.due_remote or done.due_local:
        render.say(
            f"retention would let {done.due_remote} go upstream and {done.due_local} here: see `tinker-sync plan`; "
            "[retention] enforce is off"
        )
    for path in (*done.deleted, *done.expired, *done.restored)[:_SHOWN]:
        render.say(f"  {path}")
    for path, why in sorted(done.withheld.items())[:_SHOWN]:
        render.say(f"  kept {path}: {why}")
    for path, error in sorted(done.failed.items())[:_SHOWN]:
        render.say(f"  failed {path}: {error}")
    if done.over_bytes:
        render.say(f"[mirror] max_bytes is exceeded by {render.size(done.over_bytes)} that must stay: copying stops")
    if done.error is not None:
        render.warn(f"tinker-sync: nothing was let go: {done.error}")
    if done.breaker is not None:
        render.breaker(done.breaker, "happened")
    if done.stopped is not None:
        render.say(f"STOPPED: {done.stopped}; look into it, then `tinker-sync resume`")


async def verify(
    settings: Settings, paths: Sequence[TinkerPath], reporter: Reporter, *, repair: bool, as_json: bool
) -> int:
    """Re-read replicas; with `repair`, fetch the damaged ones again."""
    if not repair:
        tree = open_tree_for_reading(settings)
        with open_catalog_for_reading(settings) as catalog:
            result = await _scrub(tree, catalog, choose(catalog.replicas(), paths), record=False)
        return _tell_verified(result, [], {}, as_json=as_json)
    control = control_of_holder(settings)
    if control is not None:
        answer = await hand_over(control, "verify", paths, _Counting(reporter, paths).hear)
        return _tell_handed_over(answer, as_json=as_json)
    async with open_service(settings) as service:
        with open_root(settings, command="verify --repair") as root:
            replicas = choose(root.catalog.replicas(), paths)
            result = await _scrub(root.tree, root.catalog, replicas, record=True)
            current = [replica for replica, _ in result.damaged.values() if not replica.superseded]
            repaired: list[TinkerPath] = []
            failed: dict[TinkerPath, str] = {}
            if current:
                async with (
                    open_listeners(settings, root) as listeners,
                    open_mirror(settings, service, root, Reporters([reporter, listeners.hooks])) as mirror,
                ):
                    outcome = await mirror.fetch([replica.path for replica in current])
                failed = not_repaired(current, outcome, root.catalog.known())
                repaired = [replica.path for replica in current if replica.path not in failed]
    return _tell_verified(result, repaired, failed, as_json=as_json)


def _as_result(document: Mapping[str, Any]) -> PassResult:
    """What the service answered to `fetch`, as if it had been done here."""
    return PassResult(
        listed=int(document["listed"]),
        complete=True,
        transferred=[TinkerPath.parse(path) for path in document["transferred"]],
        failed={TinkerPath.parse(row["tinker_path"]): (row["error"], row["retry_at"]) for row in document["failed"]},
        skipped={TinkerPath.parse(row["tinker_path"]): row["reason"] for row in document["skipped"]},
        bytes=int(document["bytes"]),
        seconds=float(document["seconds"]),
    )


class _Counting(Relay):
    """Also says how far reading back has come, where somebody looks."""

    def hear(self, line: Mapping[str, Any]) -> None:
        """One line."""
        super().hear(line)
        if line.get("event") == "checked" and sys.stderr.isatty():
            sys.stderr.write(f"\r{line['checked']} of {line['of']} replicas read")
            if line["checked"] == line["of"]:
                sys.stderr.write("\n")
            sys.stderr.flush()


def _tell_handed_over(answer: Mapping[str, Any], *, as_json: bool) -> int:
    """What the service answered to `verify`."""
    damaged = [{key: row[key] for key in ("tinker_path", "defects")} for row in answer["damaged"]]
    repaired = set(answer["repaired"])
    left = [row for row in answer["damaged"] if row["superseded"] or row["tinker_path"] not in repaired]
    document = {
        "checked": answer["checked"],
        "ok": answer["checked"] - len(damaged),
        "damaged": damaged,
        "repaired": answer["repaired"],
    }
    if as_json:
        render.print_json(document)
    else:
        _say_verified(document, [(row["tinker_path"], answer["failed"].get(row["tinker_path"])) for row in left])
    return 1 if left else 0


async def _scrub(tree: LocalTree, catalog: SqlCatalog, replicas: Sequence[Replica], *, record: bool) -> ScrubResult:
    with ThreadPoolExecutor(os.cpu_count() or 2, thread_name_prefix="read") as readers:
        try:
            return await make_scrubber(tree, catalog, readers, record=record).scrub(replicas)
        except asyncio.CancelledError:
            readers.shutdown(wait=False, cancel_futures=True)
            raise


def _tell_verified(
    result: ScrubResult, repaired: Sequence[TinkerPath], failed: dict[TinkerPath, str], *, as_json: bool
) -> int:
    damaged = [
        {"tinker_path": str(replica.path), "defects": [str(defect) for defect in defects]}
        for replica, defects in result.damaged.values()
    ]
    left = [
        replica for replica, _ in result.damaged.values() if replica.path not in set(repaired) or replica.superseded
    ]
    document: dict[str, Any] = {
        "checked": result.checked,
        "ok": result.checked - len(damaged),
        "damaged": damaged,
        "repaired": [str(path) for path in repaired],
    }
    if as_json:
        render.print_json(document)
        return 1 if left else 0
    _say_verified(document, [(str(replica.path), failed.get(replica.path)) for replica in left])
    return 1 if left else 0


def _say_verified(document: Mapping[str, Any], left: Sequence[tuple[str, str | None]]) -> None:
    damaged = document["damaged"]
    render.say(f"{document['checked']} replicas read, {document['ok']} ok, {len(damaged)} damaged")
    for item in damaged:
        render.say(f"  damaged {item['tinker_path']}: {'; '.join(item['defects'])}")
    for path in document["repaired"]:
        render.say(f"  repaired {path}")
    for path, why in left:
        render.say(f"  still damaged {path}: {why or 'run `tinker-sync verify --repair`'}")
