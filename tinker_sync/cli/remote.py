"""`tinker-sync remote …`: the documented RestClient from the shell.

It needs a credential, and no root and no lock but for `delete` and `set-ttl`, which go through enforcement.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinker_sync.cli import render

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from tinker_sync.api.client import RestClient

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Ask the service directly: every documented call.")

JsonOption = Annotated[bool, typer.Option("--json", help="Print the service's answer as one JSON document.")]
PathArgument = Annotated[str, typer.Argument(help="tinker://<run>/<segment>/<name>")]
LimitOption = Annotated[int, typer.Option(min=1, help="Rows to ask for.")]
OffsetOption = Annotated[int, typer.Option(min=0, help="Rows to pass over.")]


def _ask(
    context: typer.Context,
    call: Callable[[RestClient], Awaitable[Any]],
    show: Callable[[Any], None],
    *,
    as_json: bool,
) -> None:
    """Make one call and print its answer."""
    from tinker_sync.cli.app import load_with_logs, run_async  # noqa: PLC0415
    from tinker_sync.wiring import open_service  # noqa: PLC0415

    settings = load_with_logs(context, default_level="warning")

    async def work() -> int:
        async with open_service(settings) as service:
            answer = await call(service.client)
        if as_json:
            render.print_json(None if answer is None else answer.model_dump(mode="json", exclude={"unreadable"}))
        else:
            show(answer)
        return 0

    run_async(work())


def _fields(answer: Any) -> None:
    """One value per line."""
    for name, value in answer.model_dump(mode="json").items():
        render.say(f"{name}: {value if value is not None else '-'}")


def _checkpoints(answer: Any) -> None:
    rows = [
        (
            row.tinker_path,
            row.time.isoformat(timespec="seconds") if row.time else "-",
            render.size(row.size_bytes) if row.size_bytes is not None else "-",
            row.expires_at.isoformat(timespec="seconds") if row.expires_at else "never",
            "public" if row.public else "",
        )
        for row in answer.checkpoints
    ]
    render.table(("checkpoint", "time", "size", "expires", ""), rows)
    _shown(len(rows), answer.cursor)


def _shown(rows: int, cursor: Any) -> None:
    if cursor is not None:
        render.say(f"{rows} of {cursor.total_count}")


@app.command()
def runs(
    context: typer.Context, *, limit: LimitOption = 20, offset: OffsetOption = 0, json: JsonOption = False
) -> None:
    """List training runs."""

    def show(answer: Any) -> None:
        rows: Sequence[Sequence[str]] = [
            (
                run.training_run_id,
                run.base_model,
                f"rank {run.lora_rank}" if run.lora_rank else "-",
                run.last_request_time.isoformat(timespec="seconds") if run.last_request_time else "-",
            )
            for run in answer.training_runs
        ]
        render.table(("training run", "base model", "LoRA", "last request"), rows)
        _shown(len(rows), answer.cursor)

    _ask(context, lambda client: client.list_training_runs(limit, offset), show, as_json=json)


@app.command()
def run(context: typer.Context, training_run_id: str, *, json: JsonOption = False) -> None:
    """Show one training run, by its id or by a checkpoint's tinker path."""
    if training_run_id.startswith("tinker://"):
        _ask(context, lambda client: client.get_training_run_by_tinker_path(training_run_id), _fields, as_json=json)
    _ask(context, lambda client: client.get_training_run(training_run_id), _fields, as_json=json)


@app.command()
def checkpoints(
    context: typer.Context,
    training_run_id: Annotated[str, typer.Argument(help="Only this run's; the whole account without.")] = "",
    *,
    limit: LimitOption = 100,
    offset: OffsetOption = 0,
    json: JsonOption = False,
) -> None:
    """List checkpoints, newest first."""
    if training_run_id:
        _ask(context, lambda client: client.list_checkpoints(training_run_id), _checkpoints, as_json=json)
    _ask(context, lambda client: client.list_user_checkpoints(limit, offset), _checkpoints, as_json=json)


@app.command(name="weights-info")
def weights_info(context: typer.Context, path: PathArgument, *, json: JsonOption = False) -> None:
    """Show base model and LoRA facts of a checkpoint."""
    _ask(context, lambda client: client.get_weights_info_by_tinker_path(path), _fields, as_json=json)


@app.command(name="archive-url")
def archive_url(context: typer.Context, path: PathArgument, *, json: JsonOption = False) -> None:
    """Print a checkpoint's signed archive URL. Whoever has it can read the checkpoint until it expires."""
    _ask(
        context,
        lambda client: client.get_checkpoint_archive_url_from_tinker_path(path),
        lambda answer: typer.echo(answer.url),
        as_json=json,
    )


@app.command(name="external-urls")
def external_urls(
    context: typer.Context,
    path: PathArgument,
    *,
    reveal: Annotated[bool, typer.Option("--reveal", help="Print the signed URLs themselves.")] = False,
    json: JsonOption = False,
) -> None:
    """List an external checkpoint's files. With --reveal, their signed URLs: keys to the bytes until they expire."""

    async def call(client: RestClient) -> Any:
        from tinker_sync.model.paths import SignedUrl  # noqa: PLC0415

        answer = await client.get_external_weights_urls(path)
        if reveal:
            return answer
        return answer.model_copy(update={"urls": {name: str(SignedUrl(url)) for name, url in answer.urls.items()}})

    def show(answer: Any) -> None:
        for name, url in answer.urls.items():
            render.say(f"{name}\t{url}")

    _ask(context, call, show, as_json=json)


@app.command()
def sessions(
    context: typer.Context, *, limit: LimitOption = 20, offset: OffsetOption = 0, json: JsonOption = False
) -> None:
    """List session ids."""

    def show(answer: Any) -> None:
        for session_id in answer.sessions:
            render.say(session_id)

    _ask(context, lambda client: client.list_sessions(limit, offset), show, as_json=json)


@app.command()
def session(context: typer.Context, session_id: str, *, json: JsonOption = False) -> None:
    """Show a session's runs and samplers."""
    _ask(context, lambda client: client.get_session(session_id), _fields, as_json=json)


@app.command()
def sampler(context: typer.Context, sampler_id: str, *, json: JsonOption = False) -> None:
    """Show a sampler (<session>:sample:<n>)."""
    _ask(context, lambda client: client.get_sampler(sampler_id), _fields, as_json=json)


@app.command()
def capabilities(context: typer.Context, *, json: JsonOption = False) -> None:
    """List the models that the server can still train or sample."""

    def show(answer: Any) -> None:
        for model in answer.supported_models:
            render.say(f"{model.model_name}\tcontext {model.max_context_length or '-'}")

    _ask(context, lambda client: client.get_server_capabilities(), show, as_json=json)


@app.command()
def usage(context: typer.Context, *, json: JsonOption = False) -> None:
    """Show the storage bill: per project and user, one to two hours old. Needs an admin's key."""

    def show(answer: Any) -> None:
        rate = answer.effective_rate_usd_per_gigabyte_month
        rows = [
            (
                row.project_id or "-",
                row.user_email or "-",
                row.checkpoint_count,
                render.size(row.size_bytes),
                f"${row.estimated_monthly_cost_usd:,.2f}" if row.estimated_monthly_cost_usd is not None else "-",
            )
            for row in answer.data
        ]
        render.table(("project", "user", "checkpoints", "size", "per month"), rows)
        if rate is not None:
            render.say(f"${rate} per GB and month")

    _ask(context, lambda client: client.get_current_checkpoint_storage_usage(), show, as_json=json)


@app.command()
def publish(context: typer.Context, path: PathArgument, *, json: JsonOption = False) -> None:
    """Let everybody read a checkpoint."""
    _ask(
        context,
        lambda client: _unless_so(client.publish_checkpoint_from_tinker_path(path)),
        lambda _: render.say(f"{path} is public"),
        as_json=json,
    )


@app.command()
def unpublish(context: typer.Context, path: PathArgument, *, json: JsonOption = False) -> None:
    """Take a publication back."""
    _ask(
        context,
        lambda client: _unless_so(client.unpublish_checkpoint_from_tinker_path(path)),
        lambda _: render.say(f"{path} is private"),
        as_json=json,
    )


UnprovenOption = Annotated[
    bool, typer.Option("--unproven", help="Without guards and proof; type the path again to confirm.")
]
AgainArgument = Annotated[str, typer.Argument(help="With --unproven: the path again (else it is asked for).")]


@app.command()
def delete(
    context: typer.Context,
    path: PathArgument,
    again: AgainArgument = "",
    *,
    unproven: UnprovenOption = False,
    json: JsonOption = False,
) -> None:
    """Delete a checkpoint for good, through enforcement: guards, a replica that is read back, the journal."""
    _remove(context, path, again, seconds=None, unproven=unproven, action="delete", as_json=json)


@app.command(name="set-ttl")
def set_ttl(
    context: typer.Context,
    path: PathArgument,
    ttl: Annotated[str, typer.Argument(help="How long from now: 12h, 30d, seconds as a number; `none`: for ever.")],
    again: AgainArgument = "",
    *,
    unproven: UnprovenOption = False,
    json: JsonOption = False,
) -> None:
    """Give a checkpoint another time to live. A shorter one counts as a delete: the same guards and proof."""
    from tinker_sync.config import LEAST_TTL, MOST_TTL, parse_duration  # noqa: PLC0415
    from tinker_sync.errors import FixFirst  # noqa: PLC0415

    seconds: int | None = None
    if ttl != "none":
        try:
            wanted = parse_duration(f"{ttl}s" if ttl.isdigit() else ttl)
        except ValueError as error:
            raise FixFirst(str(error)) from error
        if not LEAST_TTL <= wanted <= MOST_TTL:
            message = f"a TTL is 1h to 3650d, or none; {ttl} is not"
            raise FixFirst(message)
        seconds = int(wanted.total_seconds())
    _remove(context, path, again, seconds=seconds, unproven=unproven, action="set-ttl", as_json=json)


def _remove(
    context: typer.Context, text: str, again: str, *, seconds: int | None, unproven: bool, action: str, as_json: bool
) -> None:
    from tinker_sync.cli import retain  # noqa: PLC0415
    from tinker_sync.cli.app import load_with_logs, parse_path, run_async  # noqa: PLC0415
    from tinker_sync.errors import FixFirst  # noqa: PLC0415

    path = parse_path(text)
    settings = load_with_logs(context, default_level="warning")
    if unproven:
        if not again:
            render.warn(f"This is done without proof of a copy, and cannot be undone. Type the path again ({path}):")
            again = sys.stdin.readline().strip()
        if again != str(path):
            message = "the path typed again is another one: nothing was done"
            raise FixFirst(message)
    elif again:
        message = "the path is typed again only with --unproven"
        raise FixFirst(message)
    run_async(retain.remove(settings, path, seconds=seconds, unproven=unproven, action=action, as_json=as_json))


async def _unless_so(call: Awaitable[None]) -> None:
    """A checkpoint that is already as wanted is no error."""
    from tinker_sync.errors import AlreadySo  # noqa: PLC0415

    try:
        await call
    except AlreadySo as already:
        render.warn(str(already))
