"""The commands. Each reads its settings, calls one thing below, prints what came, and returns an exit code.

Exit codes: 0 all done; 1 done with failures, each named; 2 usage, configuration or wrong root; 3 service unreachable,
credential refused, or no listing could be proven; 4 another process holds the root; 130/143 interrupted.
"""

from __future__ import annotations

import gc
import signal
import sys
from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 - typer reads annotations
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from tinker_sync import __version__
from tinker_sync.cli import render
from tinker_sync.errors import FixFirst, TinkerSyncError

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from tinker_sync.config import Settings

app = typer.Typer(
    name="tinker-sync",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="""Keep a verified local copy of every checkpoint in a Tinker account.

    First steps: `tinker-sync demo` shows everything against a local server, without an account. Then set
    TINKER_API_KEY, check with `tinker-sync doctor`, and copy with `tinker-sync sync`. Nothing is ever deleted
    upstream by a copy.
    """,
)

GC_THRESHOLD = (100_000, 20, 20)
"""A plan of a million checkpoints makes millions of small values that live on: looking at them every 700 costs more
than making them."""
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document with stable keys on stdout.")]


@dataclass(frozen=True, slots=True)
class Options:
    """What stands before the command."""

    config: Path | None
    root: Path | None
    log_format: str | None
    log_level: str | None


def _version(value: bool) -> None:  # noqa: FBT001 - typer's callback
    if value:
        typer.echo(f"tinker-sync {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(
            help="Configuration file (else $TINKER_SYNC_CONFIG, ~/.config/tinker-sync/config.toml, /etc/tinker-sync/…)."
        ),
    ] = None,
    root: Annotated[Path | None, typer.Option(help="The mirror's directory; overrides [mirror] root.")] = None,
    log_format: Annotated[str | None, typer.Option(help="auto, console or json.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options that stand before the command."""
    del version
    if log_format not in (None, "auto", "console", "json"):
        message = f"--log-format {log_format!r}: use auto, console or json"
        raise FixFirst(message)
    if log_level not in (None, "debug", "info", "warning", "error"):
        message = f"--log-level {log_level!r}: use debug, info, warning or error"
        raise FixFirst(message)
    context.obj = Options(config, root, log_format, log_level)


def load(context: typer.Context) -> Settings:
    """The settings for a command. Raises ConfigInvalid."""
    from tinker_sync.config import load_settings  # noqa: PLC0415

    chosen: Options = context.obj
    return load_settings(chosen.config, root=chosen.root)


def load_with_logs(context: typer.Context, *, default_level: str | None = None) -> Settings:
    """The settings, with logging set up as they say; `default_level` is for commands that talk for themselves."""
    from tinker_sync.cli.logs import set_up_logging  # noqa: PLC0415

    settings = load(context)
    chosen: Options = context.obj
    configured = settings.log.level if "level" in settings.log.model_fields_set else default_level
    level = chosen.log_level or configured or settings.log.level
    set_up_logging(level, chosen.log_format or settings.log.format)
    return settings


def run_async(work: Coroutine[Any, Any, int]) -> NoReturn:
    """Run a command's coroutine; SIGINT and SIGTERM cancel it, so that everything is cleaned up, then exit 128 + n."""
    import asyncio  # noqa: PLC0415

    gc.freeze()
    gc.set_threshold(*GC_THRESHOLD)
    gc.enable()

    async def main() -> int:
        task = asyncio.current_task()
        received: list[int] = []

        def stop(number: int) -> None:
            received.append(number)
            if task is not None:
                task.cancel()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop, number)
        try:
            code = await work
            return 128 + signal.SIGINT if signal.SIGINT in received else code
        except asyncio.CancelledError:
            if received:
                if "--json" in sys.argv:
                    render.print_json({"error": "interrupted", "exit_code": 128 + received[0]})
                render.warn("interrupted: nothing half-made was left behind; run it again to go on")
                return 128 + received[0]
            raise

    raise typer.Exit(asyncio.run(main()))


@app.command()
def sync(context: typer.Context, *, json: JsonOption = False) -> None:
    """Copy what is not here yet, once: list, transfer, verify, commit.

    Copies the soonest-expiring checkpoints first. Failures of single checkpoints stop nothing; they are named, and
    tried again by a later run. Exit code 0: everything wanted is here. 1: some failed. 3: the account could not be
    listed completely.
    """
    from tinker_sync.cli import progress, work  # noqa: PLC0415

    with progress.reporter(quiet=json) as reporter:
        settings = load_with_logs(context, default_level=reporter.log_level)
        run_async(work.sync(settings, reporter, as_json=json))


@app.command(name="run")
def serve(context: typer.Context) -> None:
    """The service: poll, copy and enforce until SIGTERM; SIGHUP and a changed configuration file reload.

    Made for systemd (`tinker-sync install-service`), and content without. Exit code 0 on SIGTERM.
    """
    from tinker_sync.cli import service  # noqa: PLC0415

    settings = load_with_logs(context)
    run_async(service.run(settings, context.obj.config, context.obj.root))


@app.command(name="install-service")
def install_service(
    context: typer.Context,
    *,
    user: Annotated[bool, typer.Option("--user", help="For this user's own systemd, without root.")] = False,
    directory: Annotated[Path | None, typer.Option(help="Write the units there instead; for a look.")] = None,
) -> None:
    """Write the systemd units with the right paths, and say the next two commands."""
    from tinker_sync.cli import service  # noqa: PLC0415

    raise typer.Exit(service.install(context.obj.config, user=user, directory=directory))


@app.command()
def fetch(
    context: typer.Context,
    paths: Annotated[list[str], typer.Argument(help="Tinker paths: tinker://<run>/<segment>/<name>")],
    *,
    json: JsonOption = False,
) -> None:
    """Copy exactly these checkpoints now, whatever filters and back-off say."""
    from tinker_sync.cli import progress, work  # noqa: PLC0415

    wanted = [parse_path(text) for text in paths]
    with progress.reporter(quiet=json) as reporter:
        settings = load_with_logs(context, default_level=reporter.log_level)
        run_async(work.fetch(settings, wanted, reporter, as_json=json))


@app.command()
def status(context: typer.Context, *, json: JsonOption = False) -> None:
    """What is here, what is missing, what failed; from the local catalog alone, without asking the service."""
    from tinker_sync.cli import local  # noqa: PLC0415

    raise typer.Exit(local.status(load(context), as_json=json))


@app.command(name="ls")
def list_replicas(
    context: typer.Context,
    run: Annotated[str, typer.Argument(help="Only this training run (or the beginning of its id).")] = "",
    *,
    json: JsonOption = False,
) -> None:
    """List the replicas that are here."""
    from tinker_sync.cli import local  # noqa: PLC0415

    raise typer.Exit(local.list_replicas(load(context), run, as_json=json))


@app.command(name="path")
def show_path(
    context: typer.Context,
    tinker_path: Annotated[str, typer.Argument(help="tinker://<run>/<segment>/<name>")],
    *,
    json: JsonOption = False,
) -> None:
    """Print a replica's directory, for use in other commands: --lora-modules a=$(tinker-sync path tinker://…)."""
    from tinker_sync.cli import local  # noqa: PLC0415

    raise typer.Exit(local.show_path(load(context), parse_path(tinker_path), as_json=json))


@app.command()
def verify(
    context: typer.Context,
    paths: Annotated[list[str] | None, typer.Argument(help="Only these tinker paths.")] = None,
    *,
    repair: Annotated[
        bool, typer.Option("--repair", help="Fetch damaged replicas again, where upstream still is.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Read every replica back from the disk and compare it with its manifest.

    A damaged replica keeps its place until the repaired one is whole; only bytes equal to its manifest repair it.
    Exit code 0: all is well, or all was repaired. 1: damage remains, each named.
    """
    from tinker_sync.cli import progress, work  # noqa: PLC0415

    wanted = [parse_path(text) for text in paths or []]
    with progress.reporter(quiet=json or not repair) as reporter:
        settings = load_with_logs(context, default_level="warning")
        run_async(work.verify(settings, wanted, reporter, repair=repair, as_json=json))


@app.command()
def reindex(context: typer.Context, *, json: JsonOption = False) -> None:
    """Rebuild the catalog from the tree, and report what has no readable manifest.

    The catalog is only an index: deleting it loses nothing but the history of failures.
    """
    from tinker_sync.cli import local  # noqa: PLC0415

    raise typer.Exit(local.reindex(load_with_logs(context, default_level="warning"), as_json=json))


@app.command()
def plan(
    context: typer.Context,
    *,
    at: Annotated[str | None, typer.Option(help="Plan for another time: 2026-12-24T18:00:00Z")] = None,
    diff: Annotated[Path | None, typer.Option(help="Show what this other configuration file would change.")] = None,
    json: JsonOption = False,
) -> None:
    """Show what retention would let go now, and why, per checkpoint and side. Changes nothing.

    Exit code 3: the listing could not be proven, so nothing may go. 5: the breaker would stop it.
    """
    from tinker_sync.cli import plan as planning  # noqa: PLC0415

    settings = load_with_logs(context, default_level="warning")
    run_async(planning.show(settings, at=at, diff=diff, as_json=json))


@app.command()
def prune(
    context: typer.Context,
    *,
    apply: Annotated[bool, typer.Option("--apply", help="Do it; without this, the same as `plan`.")] = False,
    allow: Annotated[
        int | None, typer.Option(min=1, help="Lift the breaker's limits this once, for at most so many deletes.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Enforce retention now, transferring nothing: delete what the policies let go, after proof.

    Every delete needs a proven listing, a replica that was read back in this pass, and an intent in the journal. Exit
    code 3: the listing could not be proven. 4: another process holds the root. 5: breaker or stop flag; none happened.
    """
    from tinker_sync.cli import retain  # noqa: PLC0415

    settings = load_with_logs(context, default_level="warning")
    run_async(retain.prune(settings, apply=apply, allow=allow, as_json=json))


@app.command()
def history(
    context: typer.Context,
    paths: Annotated[list[str] | None, typer.Argument(help="Only these tinker paths, or training runs.")] = None,
    *,
    event: Annotated[
        list[str] | None, typer.Option(help="Only such events: delete, delete.intent, ttl, local, …")
    ] = None,
    since: Annotated[str | None, typer.Option(help="Only from this time on: 2026-12-24T18:00:00Z")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=0, help="Only so many of the newest; 0 shows all.")] = 100,
    check: Annotated[bool, typer.Option("--check", help="Follow the chain of hashes; exit code 1 for damage.")] = False,
    json: JsonOption = False,
) -> None:
    """Show the journal: each deletion with its rule, its proof and the service's answer."""
    from tinker_sync.cli import retain  # noqa: PLC0415

    code = retain.history(
        load(context), paths=paths or [], events=event or [], since=since, limit=limit, check=check, as_json=json
    )
    raise typer.Exit(code)


@app.command()
def resume(context: typer.Context) -> None:
    """Lift the stop flag, after a look at why it was set."""
    from tinker_sync.cli import retain  # noqa: PLC0415

    raise typer.Exit(retain.resume(load(context)))


trash = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="What local retention let go.")
app.add_typer(trash, name="trash")


@trash.command(name="ls")
def trash_list(context: typer.Context, *, json: JsonOption = False) -> None:
    """List what is in the trash, and when it is deleted for good."""
    from tinker_sync.cli import retain  # noqa: PLC0415

    raise typer.Exit(retain.trash_list(load(context), as_json=json))


@trash.command(name="restore")
def trash_restore(
    context: typer.Context,
    names: Annotated[list[str], typer.Argument(help="Entries or tinker paths, as `trash ls` shows them.")],
    *,
    json: JsonOption = False,
) -> None:
    """Put replicas back where they were."""
    from tinker_sync.cli import retain  # noqa: PLC0415

    raise typer.Exit(retain.trash_restore(load_with_logs(context, default_level="warning"), names, as_json=json))


@trash.command(name="empty")
def trash_empty(context: typer.Context, *, json: JsonOption = False) -> None:
    """Delete everything that is in the trash, now and for good."""
    from tinker_sync.cli import retain  # noqa: PLC0415

    raise typer.Exit(retain.trash_empty(load_with_logs(context, default_level="warning"), as_json=json))


@app.command()
def explain(
    context: typer.Context,
    tinker_path: Annotated[str, typer.Argument(help="tinker://<run>/<segment>/<name>")],
    *,
    json: JsonOption = False,
) -> None:
    """Tell one checkpoint's story: where it is, why it is kept or would go, what proof there is or is missing."""
    from tinker_sync.cli import plan as planning  # noqa: PLC0415

    settings = load_with_logs(context, default_level="warning")
    run_async(planning.explain(settings, parse_path(tinker_path), as_json=json))


@app.command()
def pin(
    context: typer.Context,
    paths: Annotated[
        list[str] | None, typer.Argument(help="Tinker paths, or globs <run>/<segment>/<name>; none lists the pins.")
    ] = None,
) -> None:
    """Never let these go, on any side. Without arguments: list what is pinned."""
    from tinker_sync.cli import local  # noqa: PLC0415

    raise typer.Exit(local.pin(load(context), paths or []))


@app.command()
def unpin(
    context: typer.Context,
    paths: Annotated[list[str], typer.Argument(help="Pins, exactly as `tinker-sync pin` lists them.")],
) -> None:
    """Take pins back."""
    from tinker_sync.cli import local  # noqa: PLC0415

    raise typer.Exit(local.unpin(load(context), paths))


@app.command(name="check-config")
def check_config(context: typer.Context, *, json: JsonOption = False) -> None:
    """Read the configuration, say what is wrong with it, or what it comes to. Asks no service."""
    from tinker_sync.cli import local  # noqa: PLC0415

    chosen: Options = context.obj
    raise typer.Exit(local.check_config(load(context), chosen.config, as_json=json))


@app.command()
def doctor(context: typer.Context, *, json: JsonOption = False) -> None:
    """Try everything that a mirror needs, and say what to do about what is missing.

    Configuration, disk, lock, clock, credential, listing, and per type what this server can hand out. Changes
    nothing upstream and no replica.
    """
    from tinker_sync.cli import doctor as checks  # noqa: PLC0415

    settings = load_with_logs(context, default_level="error")
    run_async(checks.examine(settings, context.obj.config, as_json=json))


@app.command()
def demo(
    context: typer.Context,
    *,
    stay: Annotated[bool, typer.Option("--stay", help="Keep the server up afterwards, for playing.")] = False,
    directory: Annotated[
        Path | None, typer.Option(help="Where the demo's mirror goes; a new temporary directory by default.")
    ] = None,
) -> None:
    """Show in half a minute what this program does, against a local server with generated adapters. No account."""
    from tinker_sync.cli.demo import show  # noqa: PLC0415
    from tinker_sync.cli.logs import set_up_logging  # noqa: PLC0415

    chosen: Options = context.obj
    set_up_logging(chosen.log_level or "error", chosen.log_format or "auto")
    run_async(show(directory, stay=stay))


def parse_path(text: str) -> Any:
    """A tinker path from the command line. Raises FixFirst."""
    from tinker_sync.model.paths import PathInvalid, TinkerPath  # noqa: PLC0415

    try:
        return TinkerPath.parse(text)
    except PathInvalid as error:
        raise FixFirst(str(error)) from error


def run() -> int:
    """Run the command line; every error that a user can cause ends here as words and an exit code."""
    from tinker_sync.cli import remote  # noqa: PLC0415 - registers itself with `app`

    if "remote" not in {group.name for group in app.registered_groups}:
        app.add_typer(remote.app, name="remote")
    try:
        app(prog_name="tinker-sync")
    except TinkerSyncError as error:
        return _give_up(str(error), error.exit_code)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _give_up(f"{where}{error.strerror or error}", 1)
    return 0


def _give_up(message: str, exit_code: int) -> int:
    """The whole command failed: words on stderr, and with `--json` still one document on stdout."""
    for line in message.splitlines():
        render.warn(f"tinker-sync: {line}")
    if "--json" in sys.argv:
        render.print_json({"error": message, "exit_code": exit_code})
    return exit_code
