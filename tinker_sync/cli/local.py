"""Commands that ask nobody: they read the catalog and the tree, without a lock."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import typer

from tinker_sync.cli import render
from tinker_sync.errors import ConfigInvalid, FixFirst, TinkerSyncError
from tinker_sync.model.moments import parse_time, rfc3339
from tinker_sync.model.work import Trouble

if TYPE_CHECKING:
    from pathlib import Path

    from tinker_sync.config import Settings
    from tinker_sync.model.paths import TinkerPath
    from tinker_sync.model.work import Replica

_HEADLINES = {"well": "all is well", "working": "working", "bad": "NOT WELL"}


def status(settings: Settings, *, as_json: bool) -> int:
    """State, from the catalog."""
    from tinker_sync.catalog.store import CatalogMissing, SqlCatalog  # noqa: PLC0415
    from tinker_sync.overview import NOTHING, overview, take_stock  # noqa: PLC0415

    try:
        with SqlCatalog.open(settings.state / "catalog.db", read_only=True) as catalog:
            stock = take_stock(catalog, _selection(settings))
    except CatalogMissing:
        stock = NOTHING
    document = overview(stock, _surroundings(settings), now=datetime.now(UTC))
    if as_json:
        render.print_json(document)
    else:
        _tell_status(document)
    return 0


def _surroundings(settings: Settings) -> Any:
    from tinker_sync.destination.surroundings import look_around  # noqa: PLC0415
    from tinker_sync.overview import Surroundings  # noqa: PLC0415

    return Surroundings(
        root=str(settings.root),
        enforce=settings.retention.enforce,
        min_free=int(settings.mirror.min_free),
        **look_around(settings.root, settings.state),
    )


def _selection(settings: Settings) -> Any:
    from tinker_sync.planning import Selection  # noqa: PLC0415

    mirror = settings.mirror
    return Selection(mirror.types, mirror.include, mirror.exclude, mirror.short_ttl, mirror.short_ttl_settle)


def _tell_status(document: dict[str, Any]) -> None:
    from tinker_sync.overview import judge  # noqa: PLC0415

    now = datetime.now(UTC)
    last = document["last_pass"]
    level, sentence = judge(document, now=now)
    if last is None and not document["replicas"]:
        render.say(f"{sentence}: run `tinker-sync sync`")
    else:
        render.say(f"{_HEADLINES[level]}: {sentence}")
    render.say(f"  {document['replicas']} replicas, {render.size(document['bytes'])} below {document['root']}")
    if last is not None:
        proven = "complete" if last["complete"] else "unproven"
        render.say(
            f"  last pass {render.ago(parse_time(last['at']), now)}: {last['listed']} listed ({proven}), "
            f"{last['transferred']} copied, {last['failed']} failed"
        )
    if last is not None and (last.get("due") or last.get("deleted")):
        going = "" if document["enforce"] else ", [retention] enforce is off"
        render.say(f"  retention: {last.get('deleted', 0)} deleted, {last.get('due', 0)} to go{going}")
    for line in (last or {}).get("waiting_changes") or ():
        render.say(f"  changed in the file and not in effect yet: {line}")
    if document["running_out"] or document["trash"]:
        render.say(f"  {document['running_out']} run out by our TTL, {document['trash']} in the trash")
    if document["partial"]:
        what = "1 is partly here" if document["partial"] == 1 else f"{document['partial']} are partly here"
        render.say(f"  {what} ({render.size(document['partial_bytes'])}): the next attempt goes on from there")
    if document["unmirrorable"]:
        render.say(f"  {document['unmirrorable']} are not served by this server (see `tinker-sync doctor`)")
    for row in document["expiring_unmirrored"][:20]:
        render.say(f"  expires {render.ahead(parse_time(row['expires_at']), now)} uncopied: {row['tinker_path']}")
    for failure in document["failures"][:20]:
        if failure["trouble"] != Trouble.NOT_SERVED.value:
            render.say(
                f"  {failure['tinker_path']}: {failure['error']} "
                f"(tried {failure['attempts']} times, again {render.ahead(parse_time(failure['retry_at']), now)})"
            )
    if len(document["failures"]) > 20:
        render.say(f"  … {len(document['failures']) - 20} more, see --json")


def list_replicas(settings: Settings, run: str, *, as_json: bool) -> int:
    """Replicas of one run, or of all."""
    from tinker_sync.wiring import open_catalog_for_reading  # noqa: PLC0415

    if not run.isprintable() or run.encode(errors="ignore") != run.encode(errors="replace"):
        message = f"{run!a} is no training run"
        raise FixFirst(message)
    prefix = run if run.startswith("tinker://") else f"tinker://{run}"
    with open_catalog_for_reading(settings) as catalog:
        replicas = catalog.replicas(prefix if run else "")
    if as_json:
        render.print_json({"replicas": [_as_json(settings, replica) for replica in replicas]})
        return 0
    rows = [
        (
            str(replica.path) + (" (superseded)" if replica.superseded else ""),
            rfc3339(replica.time.replace(microsecond=0)),
            render.size(replica.total_bytes),
            replica.files,
            replica.fidelity if not replica.damaged else "DAMAGED",
        )
        for replica in replicas
    ]
    render.table(("checkpoint", "time", "size", "files", "fidelity"), rows)
    render.say(f"{len(replicas)} replicas, {render.size(sum(replica.total_bytes for replica in replicas))}")
    return 0


def _as_json(settings: Settings, replica: Replica) -> dict[str, Any]:
    return {
        "tinker_path": str(replica.path),
        "time": rfc3339(replica.time),
        "size_bytes": replica.size_bytes,
        "directory": str(settings.root / replica.directory),
        "total_bytes": replica.total_bytes,
        "files": replica.files,
        "fidelity": replica.fidelity,
        "source": replica.source,
        "committed_at": rfc3339(replica.committed_at),
        "verified_at": rfc3339(replica.verified_at),
        "superseded": replica.superseded,
        "damaged": list(replica.damaged),
    }


def show_path(settings: Settings, path: TinkerPath, *, as_json: bool) -> int:
    """A replica's directory, as it is on the disk now."""
    from tinker_sync.wiring import open_catalog_for_reading  # noqa: PLC0415

    with open_catalog_for_reading(settings) as catalog:
        found = [replica for replica in catalog.replicas(str(path)) if replica.path == path and not replica.superseded]
    if not found or not (settings.root / found[0].directory).is_dir():
        message = f"{path} is not here: see `tinker-sync ls`, or copy it with `tinker-sync fetch {path}`"
        raise TinkerSyncError(message)
    if as_json:
        render.print_json(_as_json(settings, found[0]))
    else:
        typer.echo(str(settings.root / found[0].directory))  # exactly, whatever characters it has
    return 0


def reindex(settings: Settings, *, as_json: bool) -> int:
    """Rebuild the catalog from the tree."""
    from tinker_sync.wiring import rebuild_catalog  # noqa: PLC0415

    replicas, damaged = rebuild_catalog(settings)
    if as_json:
        render.print_json(
            {
                "replicas": replicas,
                "damaged": [
                    {
                        "tinker_path": str(item.path),
                        "directory": str(settings.root / item.directory),
                        "defects": [str(defect) for defect in item.defects],
                    }
                    for item in damaged
                ],
            }
        )
    else:
        render.say(f"{replicas} replicas in the catalog")
        for item in damaged:
            render.say(f"{settings.root / item.directory}: {'; '.join(str(defect) for defect in item.defects)}")
        if damaged:
            render.say("move these away, then run `tinker-sync sync` to copy them again")
    return 1 if damaged else 0


def pin(settings: Settings, wanted: list[str]) -> int:
    """Add pins, or list them."""
    from tinker_sync.destination.files import make_directories  # noqa: PLC0415
    from tinker_sync.destination.safeguards import is_pin, pins_in_hand, read_pins, write_pins  # noqa: PLC0415
    from tinker_sync.wiring import check_owner  # noqa: PLC0415

    if not wanted:
        for line in read_pins(settings.state):
            render.say(line)
        return 0
    for text in wanted:
        if not is_pin(text) or not text.isprintable():
            message = f"{text!a} is no pin: write tinker://<run>/<segment>/<name>, or a glob of the same three parts"
            raise FixFirst(message)
    check_owner(settings)
    make_directories(settings.state, mode=0o700)
    with pins_in_hand(settings.state) as before:
        write_pins(settings.state, [*before, *wanted])
    return 0


def unpin(settings: Settings, wanted: list[str]) -> int:
    """Take pins back; one that is not there is an error, since somebody relies on what it says."""
    from tinker_sync.destination.safeguards import pins_in_hand, write_pins  # noqa: PLC0415
    from tinker_sync.wiring import check_owner  # noqa: PLC0415

    check_owner(settings)
    with pins_in_hand(settings.state) as before:
        missing = [text for text in wanted if text not in before]
        if missing:
            message = f"not pinned: {', '.join(missing)}; `tinker-sync pin` lists what is"
            raise TinkerSyncError(message)
        write_pins(settings.state, [line for line in before if line not in wanted])
    return 0


def check_config(settings: Settings, explicit: Path | None, *, as_json: bool) -> int:
    """The configuration is valid; say what it comes to."""
    from tinker_sync.config import find_config  # noqa: PLC0415
    from tinker_sync.wiring import check_channels, read_token, retention_rules  # noqa: PLC0415

    path = find_config(explicit)
    key_file = settings.api_key_file
    if key_file is not None and not key_file.exists():
        message = f"{path or 'the environment'}: [tinker] api_key_file: {key_file} does not exist"
        raise ConfigInvalid(message)
    retention_rules(settings)
    check_channels(settings)
    read_token(settings)
    if as_json:
        document = settings.model_dump(mode="json")
        render.print_json(
            {
                "config": None if path is None else str(path),
                "base_url": settings.base_url,
                "root": str(settings.root),
                "settings": document,
            }
        )
        return 0
    render.say(f"{path or 'no configuration file: defaults and environment'}: ok")
    render.say(f"  service {settings.base_url}")
    render.say(f"  mirror  {settings.root}")
    render.say(f"  types   {', '.join(settings.mirror.types)}")
    return 0
