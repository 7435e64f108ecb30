"""Answers of the API. Unknown fields and enum values pass, naive times are UTC, one bad row spoils no page."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from tinker_sync.model.moments import FAR_FUTURE, parse_time


def _lenient_time(value: object) -> object:
    """A time as aware UTC; what cannot be read is absent, which is no reason to lose the row."""
    if isinstance(value, str):
        try:
            return parse_time(value)
        except ValueError:
            return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return datetime.fromtimestamp(value, UTC)
        except (OverflowError, ValueError, OSError):
            return None
    return value if isinstance(value, datetime) else None


def _lenient_expiry(value: object) -> object:
    """None is never; one that cannot be read is some day: it must not pass for never."""
    return None if value is None else _lenient_time(value) or FAR_FUTURE


def _lenient_metadata(value: object) -> object:
    if not isinstance(value, dict):
        return None
    return {str(key): item if isinstance(item, str) else str(item) for key, item in value.items()}


def _lenient_size(value: object) -> object:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63 else None


def _lenient_text(value: object) -> object:
    return value if isinstance(value, str) else ""


def _lenient_flag(value: object) -> object:
    return value if isinstance(value, bool) else False


def _lenient_public(value: object) -> object:
    """Absent is private; anything but a plain false is public, which is the side that deletes nothing."""
    return value is not None and value is not False


def _lenient_cursor(value: object) -> object:
    """A cursor without a usable total is none."""
    total = value.get("total_count") if isinstance(value, dict) else None
    return value if isinstance(total, int) and not isinstance(total, bool) and total >= 0 else None


Text = Annotated[str, BeforeValidator(_lenient_text)]
Flag = Annotated[bool, BeforeValidator(_lenient_flag)]
Moment = Annotated[datetime | None, BeforeValidator(_lenient_time)]
Expiry = Annotated[datetime | None, BeforeValidator(_lenient_expiry)]
Metadata = Annotated[dict[str, str] | None, BeforeValidator(_lenient_metadata)]
Size = Annotated[int | None, BeforeValidator(_lenient_size)]


class Wire(BaseModel):
    """Every answer: unknown fields are kept, nothing is coerced silently but what is said."""

    model_config = ConfigDict(extra="allow", frozen=True)


class Checkpoint(Wire):
    """A listed checkpoint. It has no `training_run_id`: run, type and name come from `tinker_path`."""

    tinker_path: str
    checkpoint_id: Text = ""
    checkpoint_type: Text = ""
    time: Moment = None
    size_bytes: Size = None
    public: Annotated[bool, BeforeValidator(_lenient_public)] = False
    user_metadata: Metadata = None
    expires_at: Expiry = None


class Cursor(Wire):
    """Where a page stands."""

    offset: int = 0
    limit: int = 0
    total_count: int


def _row_by_row(document: Any, name: str, model: type[Wire]) -> Any:
    """Validate each row by itself, and count those that cannot be read."""
    rows = document.get(name) if isinstance(document, dict) else None
    if not isinstance(rows, list):
        return document
    good: list[Wire] = []
    bad: list[str] = []
    for row in rows:
        try:
            good.append(model.model_validate(row))
        except ValidationError as error:
            bad.append(str(error.errors(include_url=False, include_input=False)[0]["msg"]))
    return {**document, name: good, "unreadable": bad}


OptionalCursor = Annotated[Cursor | None, BeforeValidator(_lenient_cursor)]


class CheckpointsListResponse(Wire):
    """A page of checkpoints; rows that are no checkpoint are counted in `unreadable`."""

    checkpoints: list[Checkpoint]
    cursor: OptionalCursor = None
    unreadable: list[str] = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _rows(cls, document: Any) -> Any:
        return _row_by_row(document, "checkpoints", Checkpoint)


class CheckpointRows(Wire):
    """A page of checkpoints with its rows as they came: a listing makes values of them without a model for each."""

    checkpoints: list[Any]
    cursor: OptionalCursor = None


class TrainingRun(Wire):
    """A training run."""

    training_run_id: str
    base_model: Text = ""
    model_owner: Text = ""
    is_lora: Flag = True
    corrupted: Flag = False
    lora_rank: Size = None
    last_request_time: Moment = None
    last_checkpoint: Any = None
    last_sampler_checkpoint: Any = None
    user_metadata: Metadata = None


class TrainingRunsResponse(Wire):
    """A page of training runs."""

    training_runs: list[TrainingRun]
    cursor: OptionalCursor = None
    unreadable: list[str] = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _rows(cls, document: Any) -> Any:
        return _row_by_row(document, "training_runs", TrainingRun)


class WeightsInfoResponse(Wire):
    """What a restore needs to know of weights."""

    base_model: str
    is_lora: bool = True
    lora_rank: int | None = None
    train_unembed: bool | None = None
    train_mlp: bool | None = None
    train_attn: bool | None = None


class CheckpointArchiveUrlResponse(Wire):
    """A signed archive URL and when it ends."""

    url: str = Field(repr=False)
    expires: Moment = None


class ExternalWeightsUrlsResponse(Wire):
    """One signed URL per file: relative path to URL."""

    urls: dict[str, str] = Field(repr=False)
    expires: Moment = None


class ListSessionsResponse(Wire):
    """A page of session ids."""

    sessions: list[str]


class GetSessionResponse(Wire):
    """A session's runs and samplers."""

    training_run_ids: list[str] = Field(default_factory=list)
    sampler_ids: list[str] = Field(default_factory=list)
    user_metadata: Metadata = None
    display_name: str | None = None


class GetSamplerResponse(Wire):
    """A sampler's model."""

    sampler_id: str
    base_model: str = ""
    model_path: str | None = None


class SupportedModel(Wire):
    """A model that can still be trained or sampled."""

    model_name: str | None = None
    max_context_length: int | None = None
    trainable: bool | None = None
    sampleable: bool | None = None


class GetServerCapabilitiesResponse(Wire):
    """What the server offers."""

    supported_models: list[SupportedModel] = Field(default_factory=list)


class CheckpointStorageUsage(Wire):
    """Storage of one project and user."""

    project_id: str | None = None
    user_email: str | None = None
    checkpoint_count: int = 0
    size_bytes: int = 0
    size_gigabytes: float = 0.0
    estimated_monthly_cost_usd: float | None = None


class StorageUsageResponse(Wire):
    """Storage of the account, one to two hours old."""

    effective_rate_usd_per_gigabyte_month: float | None = None
    data: list[CheckpointStorageUsage] = Field(default_factory=list)


class ClientFlags(Wire):
    """What the server asks of clients."""

    pjwt_auth_enabled: bool = False
    credential_default_source: str | None = None


class UploadStartResponse(Wire):
    """Where to put an upload's files: relative path to URL."""

    upload_id: str
    urls: dict[str, str] = Field(repr=False)
    expires: Moment = None


class UploadFinishResponse(Wire):
    """The new checkpoint."""

    tinker_path: str
