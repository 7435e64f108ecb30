"""`RestClient`: one coroutine per documented call, under the documented names.

Every method raises `errors.ServiceTrouble` for trouble of the whole service and `errors.RequestRefused` for this
request; the messages say what to do. Paths are tinker paths (`tinker://<run>/<segment>/<name>`), checkpoint ids are
`<segment>/<name>`. Each call has a deadline of twice the transport's timeout, retries included.
"""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Final, TypeVar

from pydantic import ValidationError

from tinker_sync import __version__
from tinker_sync.api import wire
from tinker_sync.api.credentials import Credentials, CredentialSources
from tinker_sync.errors import (
    AlreadySo,
    BadIdentifier,
    BeingMade,
    Overloaded,
    ProtocolBroken,
    RequestRefused,
    TinkerSyncError,
)
from tinker_sync.model.paths import PathInvalid, SignedUrl, TinkerPath
from tinker_sync.transport import ApiTransport

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from tinker_sync.transport import Answer, StreamedBody

DEFAULT_BASE_URL: Final = "https://tinker.thinkingmachines.dev/services/tinker-prod"
SDK_VERSION: Final = "0.35.0"
"""The version of the official SDK whose contract this client speaks, for `/client/config`."""
TTL_LEAST: Final = 3600
TTL_MOST: Final = 10 * 365 * 86400
_URL_LIFE: Final = timedelta(minutes=15)
"""What the SDK assumes where the answer gives no expiry."""
_ANSWERS: Final = frozenset({409, 425, 503})
"""Of an archive: it is being made. An answer, not a reason for the transport to try again."""

Model = TypeVar("Model", bound=wire.Wire)


class ArchiveAnswer:
    """An archive's signed URL and its end, or the bytes themselves where the server sends them at once."""

    __slots__ = ("body", "expires", "url")

    def __init__(
        self, *, url: SignedUrl | None = None, expires: datetime | None = None, body: StreamedBody | None = None
    ) -> None:
        self.url = url
        self.expires = expires
        self.body = body


class RestClient:
    """The documented RestClient, asynchronous."""

    def __init__(self, transport: ApiTransport) -> None:
        self._transport = transport

    @property
    def service_time(self) -> datetime | None:
        """When the last answer was made, by the service's clock; None where it did not say."""
        try:
            moment = parsedate_to_datetime(self._transport.last_date)
        except (TypeError, ValueError):
            return None
        return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)

    async def list_user_checkpoints(self, limit: int = 100, offset: int = 0) -> wire.CheckpointsListResponse:
        """One page of all checkpoints of the user, newest first."""
        return await self._user_checkpoints(wire.CheckpointsListResponse, limit, offset)

    async def user_checkpoint_rows(self, limit: int, offset: int) -> wire.CheckpointRows:
        """The same page, its rows unread."""
        return await self._user_checkpoints(wire.CheckpointRows, limit, offset)

    async def _user_checkpoints(self, model: type[Model], limit: int, offset: int) -> Model:
        return await self._get(model, "checkpoints", params={"limit": limit, "offset": offset})

    async def list_checkpoints(
        self, training_run_id: str, limit: int | None = None, offset: int | None = None
    ) -> wire.CheckpointsListResponse:
        """The checkpoints of a run. Documented as unpaginated; some servers page it all the same."""
        return await self._checkpoints(wire.CheckpointsListResponse, training_run_id, limit, offset)

    async def checkpoint_rows(
        self, training_run_id: str, limit: int | None = None, offset: int | None = None
    ) -> wire.CheckpointRows:
        """The same, its rows unread."""
        return await self._checkpoints(wire.CheckpointRows, training_run_id, limit, offset)

    async def _checkpoints(
        self, model: type[Model], training_run_id: str, limit: int | None, offset: int | None
    ) -> Model:
        params = {name: value for name, value in (("limit", limit), ("offset", offset)) if value is not None}
        return await self._get(model, "training_runs", training_run_id, "checkpoints", params=params)

    async def list_training_runs(
        self, limit: int = 20, offset: int = 0, access_scope: str = "owned"
    ) -> wire.TrainingRunsResponse:
        """One page of training runs."""
        params: dict[str, str | int] = {"limit": limit, "offset": offset, "access_scope": access_scope}
        return await self._get(wire.TrainingRunsResponse, "training_runs", params=params)

    async def get_training_run(self, training_run_id: str, access_scope: str = "owned") -> wire.TrainingRun:
        """One training run."""
        params = {"access_scope": access_scope}
        return await self._get(wire.TrainingRun, "training_runs", training_run_id, params=params)

    async def get_training_run_by_tinker_path(self, tinker_path: str, access_scope: str = "owned") -> wire.TrainingRun:
        """The run of a checkpoint."""
        return await self.get_training_run(_parse(tinker_path).run_id, access_scope)

    async def get_weights_info_by_tinker_path(self, tinker_path: str) -> wire.WeightsInfoResponse:
        """Base model and LoRA facts of a checkpoint."""
        answer = await self._transport.call(
            "POST", ("api", "v1", "weights_info"), body={"tinker_path": str(_parse(tinker_path))}
        )
        return _read(wire.WeightsInfoResponse, answer)

    async def get_checkpoint_archive_url(
        self, training_run_id: str, checkpoint_id: str
    ) -> wire.CheckpointArchiveUrlResponse:
        """The archive's signed URL. Raises BeingMade while the server still packs it (503, 425, 409)."""
        async with self.open_archive(training_run_id, checkpoint_id) as answer:
            if answer.url is None:
                message = "this server sends the archive's bytes at once, and no URL"
                raise RequestRefused(message, status=200)
            return wire.CheckpointArchiveUrlResponse(url=answer.url.reveal(), expires=answer.expires)

    async def get_checkpoint_archive_url_from_tinker_path(self, tinker_path: str) -> wire.CheckpointArchiveUrlResponse:
        """The same by tinker path."""
        path = _parse(tinker_path)
        return await self.get_checkpoint_archive_url(path.run_id, path.checkpoint_id)

    @asynccontextmanager
    async def open_archive(self, training_run_id: str, checkpoint_id: str) -> AsyncIterator[ArchiveAnswer]:
        """The archive in whatever form this server gives it: 302, 200 with JSON, or the bytes at once."""
        segments = _checkpoint_segments(training_run_id, checkpoint_id, "archive")
        try:
            async with self._transport.stream(
                "GET", segments, headers={"Accept": "application/json, application/gzip;q=0.9"}, final=_ANSWERS
            ) as (answer, body):
                yield ArchiveAnswer(body=body) if body is not None else _archive_answer(answer)
        except (RequestRefused, Overloaded) as error:
            raise _as_being_made(error) from error

    async def get_external_weights_urls(self, tinker_path: str) -> wire.ExternalWeightsUrlsResponse:
        """One signed URL per file of an `external` checkpoint."""
        path = _parse(tinker_path)
        segments = _checkpoint_segments(path.run_id, path.checkpoint_id, "external_weights_urls")
        try:
            answer = await self._transport.call("GET", segments, final=_ANSWERS)
        except (RequestRefused, Overloaded) as error:
            raise _as_being_made(error) from error
        return _read(wire.ExternalWeightsUrlsResponse, answer)

    async def delete_checkpoint(self, training_run_id: str, checkpoint_id: str, *, once: bool = False) -> None:
        """Delete for good. There is no way back and no precondition: see `enforcement` for the safe way.

        `once` sends it a single time: whoever tries again can look first whether it still is the same object.
        """
        await self._transport.call("DELETE", _checkpoint_segments(training_run_id, checkpoint_id), once=once)

    async def delete_checkpoint_from_tinker_path(self, tinker_path: str, *, once: bool = False) -> None:
        """The same by tinker path."""
        path = _parse(tinker_path)
        await self.delete_checkpoint(path.run_id, path.checkpoint_id, once=once)

    async def publish_checkpoint_from_tinker_path(self, tinker_path: str) -> None:
        """Let everybody read it. Raises AlreadySo when it is public already."""
        await self._publish("POST", tinker_path, "public")

    async def unpublish_checkpoint_from_tinker_path(self, tinker_path: str) -> None:
        """Take that back. Raises AlreadySo when it is private already."""
        await self._publish("DELETE", tinker_path, "private")

    async def _publish(self, method: str, tinker_path: str, wanted: str) -> None:
        path = _parse(tinker_path)
        segments = _checkpoint_segments(path.run_id, path.checkpoint_id, "publish")
        try:
            await self._transport.call(method, segments, final=frozenset({409}))
        except RequestRefused as error:
            if error.status == 409:
                message = f"{path} is {wanted} already"
                raise AlreadySo(message, status=409) from error
            raise

    async def set_checkpoint_ttl_from_tinker_path(
        self, tinker_path: str, ttl_seconds: int | None, *, once: bool = False
    ) -> None:
        """Let it expire that many seconds from now (3600 to ten years), or never (None)."""
        if ttl_seconds is not None and not TTL_LEAST <= ttl_seconds <= TTL_MOST:
            message = f"a TTL is {TTL_LEAST} seconds to ten years, or none at all; {ttl_seconds} is not"
            raise BadIdentifier(message, status=0)
        path = _parse(tinker_path)
        segments = _checkpoint_segments(path.run_id, path.checkpoint_id, "ttl")
        await self._transport.call("PUT", segments, body={"ttl_seconds": ttl_seconds}, once=once)

    async def list_sessions(
        self, limit: int = 20, offset: int = 0, access_scope: str = "owned"
    ) -> wire.ListSessionsResponse:
        """One page of session ids."""
        params: dict[str, str | int] = {"limit": limit, "offset": offset, "access_scope": access_scope}
        return await self._get(wire.ListSessionsResponse, "sessions", params=params)

    async def get_session(self, session_id: str, access_scope: str = "owned") -> wire.GetSessionResponse:
        """A session's runs and samplers."""
        return await self._get(wire.GetSessionResponse, "sessions", session_id, params={"access_scope": access_scope})

    async def get_sampler(self, sampler_id: str) -> wire.GetSamplerResponse:
        """A sampler (`<session>:sample:<n>`)."""
        return await self._get(wire.GetSamplerResponse, "samplers", sampler_id)

    async def get_server_capabilities(self) -> wire.GetServerCapabilitiesResponse:
        """The models that can still be trained."""
        return await self._get(wire.GetServerCapabilitiesResponse, "get_server_capabilities")

    async def get_current_checkpoint_storage_usage(self) -> wire.StorageUsageResponse:
        """Storage and its rate, one to two hours old. Admins only: NotAllowed for others."""
        return await self._get(wire.StorageUsageResponse, "billing", "usage", "checkpoints", "current")

    async def start_external_weights_upload(
        self, base_model: str, lora_config: Mapping[str, object], destination_project_id: str | None = None
    ) -> wire.UploadStartResponse:
        """Begin an upload (servers of SDK 0.39 and later): where to PUT each file."""
        body = {
            "base_model": base_model,
            "lora_config": dict(lora_config),
            "destination_project_id": destination_project_id,
        }
        answer = await self._transport.call("POST", ("api", "v1", "external_weights_upload_start"), body=body)
        return _read(wire.UploadStartResponse, answer)

    async def finish_external_weights_upload(self, upload_id: str) -> wire.UploadFinishResponse:
        """End an upload: the new checkpoint's path."""
        answer = await self._transport.call(
            "POST", ("api", "v1", "external_weights_upload_finish"), body={"upload_id": upload_id}
        )
        return _read(wire.UploadFinishResponse, answer)

    async def _get(self, model: type[Model], *segments: str, params: Mapping[str, str | int] | None = None) -> Model:
        return _read(model, await self._transport.call("GET", ("api", "v1", *segments), params=params))


@asynccontextmanager
async def open_rest_client(
    base_url: str | None = None, credential: str | None = None, *, attempt_timeout: float = 60.0
) -> AsyncIterator[RestClient]:
    """A client for use as a library; base URL and credential default to what the official SDK would find."""
    chosen = base_url or os.environ.get("TINKER_BASE_URL") or DEFAULT_BASE_URL
    async with ApiTransport(
        chosen, None, timeout=attempt_timeout, user_agent=f"tinker-sync/{__version__}", extra_headers=access_headers()
    ) as transport:
        sources = CredentialSources.from_environment(key=credential)
        transport.use(Credentials(sources, transport, sdk_version=SDK_VERSION))
        yield RestClient(transport)


def access_headers() -> dict[str, str]:
    """Cloudflare Access, for the API host only: both variables or nothing."""
    identity = os.environ.get("CLOUDFLARE_ACCESS_CLIENT_ID", "")
    secret = os.environ.get("CLOUDFLARE_ACCESS_CLIENT_SECRET", "")
    return {"CF-Access-Client-Id": identity, "CF-Access-Client-Secret": secret} if identity and secret else {}


def _checkpoint_segments(training_run_id: str, checkpoint_id: str, *rest: str) -> tuple[str, ...]:
    """The slash of a checkpoint id is ours and stands unescaped; a bare id has none."""
    segment, slash, name = checkpoint_id.partition("/")
    parts = (segment, name) if slash else (checkpoint_id,)
    return ("api", "v1", "training_runs", training_run_id, "checkpoints", *parts, *rest)


def _archive_answer(answer: Answer) -> ArchiveAnswer:
    if 300 <= answer.status < 400:
        location = answer.headers.get("location")
        if not location:
            message = f"the service answered {answer.status} for an archive, without Location"
            raise ProtocolBroken(message)
        return ArchiveAnswer(url=SignedUrl.joined(answer.url, location), expires=_expires(answer.headers))
    document = _read(wire.CheckpointArchiveUrlResponse, answer)
    return ArchiveAnswer(url=SignedUrl.joined(answer.url, document.url), expires=document.expires or _soon())


def _as_being_made(error: RequestRefused | Overloaded) -> TinkerSyncError:
    """503, 425 and 409 of an archive all mean the same; every other refusal stays what it is."""
    if error.status not in _ANSWERS:
        return error
    message = f"the server still packs it ({error.status})"
    return BeingMade(message, status=error.status, retry_after=error.retry_after)


def _parse(tinker_path: str) -> TinkerPath:
    try:
        return TinkerPath.parse(tinker_path)
    except PathInvalid as error:
        raise BadIdentifier(str(error), status=0) from error


def _read(model: type[Model], answer: Answer) -> Model:
    try:
        return model.model_validate(answer.json())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the answer"
        message = f"the service's answer is not the API's ({where}: {first['msg']}): is [tinker] base_url right?"
        raise ProtocolBroken(message) from None


def _expires(headers: Mapping[str, str]) -> datetime:
    try:
        moment = parsedate_to_datetime(headers.get("expires", ""))
        moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, TypeError, OverflowError):
        return _soon()
    return moment


def _soon() -> datetime:
    return datetime.now(UTC) + _URL_LIFE
