"""Settings: a TOML file, overridden by `TINKER_SYNC__SECTION__KEY`. `config.example.toml` is the reference of every key.

Nothing below `wiring` imports this: settings end as plain arguments there.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
import re
import tomllib
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_origin
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, EnvSettingsSource, InitSettingsSource, PydanticBaseSettingsSource
from pydantic_settings import SettingsConfigDict as SettingsConfig

from tinker_sync.errors import ConfigInvalid
from tinker_sync.model.paths import CHECKPOINT_TYPES

PREFIX: Final = "TINKER_SYNC__"
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|d|w)")
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_LONGEST: Final = timedelta(days=36500)


def parse_duration(value: object) -> timedelta:
    """`90s`, `15m`, `2h`, `7d`, `4w`, or several: `1h30m`. Raises ValueError."""
    if not isinstance(value, str):
        if isinstance(value, timedelta):
            return value
        message = 'a duration is a text like "90s", "15m", "2h", "7d" or "4w"'
        raise ValueError(message)
    text = value.strip()
    if not re.fullmatch(rf"(?:{_DURATION.pattern}\s*)+", text):
        message = f'{value!r} is no duration: write "90s", "15m", "2h", "7d" or "4w"'
        raise ValueError(message)
    try:
        parts = (timedelta(**{_UNITS[unit]: float(number)}) for number, unit in _DURATION.findall(text))
        total = sum(parts, timedelta())
    except OverflowError:
        total = timedelta.max
    if total > _LONGEST:
        message = f"{value!r} is more than 100 years"
        raise ValueError(message)
    return total


def _parse_size(value: object) -> object:
    """`KB/MB/GB` are decimal, `KiB/MiB/GiB` binary; a number is bytes."""
    if isinstance(value, str) and not re.fullmatch(r"\s*\d+(\.\d+)?\s*([kmgtp]i?b?|b)?\s*", value, re.IGNORECASE):
        message = f'{value!r} is no size: write "500MB" or "5GiB"'
        raise ValueError(message)
    if isinstance(value, bool | float):
        message = 'a size is a text like "5GiB", or a whole number of bytes'
        raise ValueError(message)  # noqa: TRY004 - pydantic turns ValueError alone into a fault of the key
    return value


def _parse_mode(value: object) -> object:
    """File modes are written as in chmod: "0640"."""
    if isinstance(value, str) and re.fullmatch(r"0?[0-7]{3}", value):
        return int(value, 8)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 0o777:
        return value
    message = f'{value!r} is no mode: write it as in chmod, "0640"'
    raise ValueError(message)


def _check_glob(value: str) -> str:
    if value.removeprefix("tinker://").count("/") != 2:
        message = (
            f'{value!r} has not three parts: write "<run glob>/<segment glob>/<name glob>", as in "*/weights/final"'
        )
        raise ValueError(message)
    if not all(value.removeprefix("tinker://").split("/")):
        message = f"{value!r} has an empty part, which matches nothing: write * for anything"
        raise ValueError(message)
    return value


def _no_flag(value: object) -> object:
    """`true` would count as 1."""
    if isinstance(value, bool):
        message = "is a number"
        raise ValueError(message)  # noqa: TRY004 - pydantic turns ValueError alone into a fault of the key
    return value


def _check_name_glob(value: str) -> str:
    if not value or "/" in value:
        message = f'{value!r} matches no name: write a glob for the last part of a path, as in "best*"'
        raise ValueError(message)
    return value


def _check_type(value: str) -> str:
    if value not in CHECKPOINT_TYPES:
        message = f"{value!r} is no checkpoint type: {', '.join(CHECKPOINT_TYPES)}"
        raise ValueError(message)
    return value


def _absolute(value: Path) -> Path:
    text = str(value)
    if "\0" in text or not text.strip() or value == Path():
        message = f"{text!a} is no path"
        raise ValueError(message)
    try:
        return value.expanduser().absolute()
    except RuntimeError as error:
        message = f"{text!r}: there is no such user"
        raise ValueError(message) from error


def _check_url(value: str) -> str:
    try:
        parts = urlsplit(value)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) > 0
    except ValueError:
        usable = False
    if not usable or parts.query or parts.fragment or parts.username or parts.password:
        message = "must start with https:// (or http:// for a server of your own), with nothing but host, port and path"
        raise ValueError(message)
    return value


def _split_address(value: str) -> tuple[str, int]:
    host, _, port = value.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ValueError
    return host, int(port)


def _check_address(value: str) -> str:
    if value:
        try:
            _split_address(value)
        except ValueError:
            message = f'{value!r} is no address: write "127.0.0.1:9464" or "[::1]:9464", or "" for none'
            raise ValueError(message) from None
    return value


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_secret_url(value: SecretStr) -> SecretStr:
    parts = urlsplit(value.get_secret_value())
    if parts.scheme not in ("http", "https") or not parts.netloc:
        message = "must start with https:// or http://"
        raise ValueError(message)
    return value


def _check_program(value: tuple[str, ...]) -> tuple[str, ...]:
    if value and not value[0].startswith("/"):
        message = f"{value[0]!r} is no absolute path of a program; arguments follow it in the list"
        raise ValueError(message)
    if any("\0" in part for part in value):
        message = "an argument holds a NUL"
        raise ValueError(message)
    return value


Listen = Annotated[str, AfterValidator(_check_address)]
SecretHttpUrl = Annotated[SecretStr, AfterValidator(_check_secret_url)]
Program = Annotated[tuple[str, ...], AfterValidator(_check_program)]
Duration = Annotated[timedelta, BeforeValidator(parse_duration)]
Size = Annotated[ByteSize, BeforeValidator(_parse_size)]
Mode = Annotated[int, BeforeValidator(_parse_mode)]
Glob = Annotated[str, AfterValidator(_check_glob)]
Type = Annotated[str, AfterValidator(_check_type)]
Url = Annotated[str, AfterValidator(_check_url)]
Local = Annotated[Path, AfterValidator(_absolute)]
NameGlob = Annotated[str, AfterValidator(_check_name_glob)]
LEAST_TTL = timedelta(hours=1)
MOST_TTL = timedelta(days=3650)
Count = Annotated[int, BeforeValidator(_no_flag), Field(ge=1)]


class Section(BaseModel):
    """A table of the file: an unknown key is an error."""

    # Built as part of `Settings` alone: building each section too would cost every command 50 ms.
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class TinkerSection(Section):
    """[tinker]: the service."""

    base_url: Url | None = None
    api_key_file: Local | None = None
    credential_cmd: str | None = None
    page_size: int = Field(default=1000, ge=1, le=100_000)
    timeout: Duration = timedelta(seconds=60)
    listing: Literal["auto", "user", "runs", "both"] = "auto"
    file_urls_below: str = ""
    types_apart: bool | Literal["auto"] = "auto"
    """Whether deleting `weights/x` leaves `sampler_weights/x` alone; `auto`: so on Tinker itself, elsewhere learnt."""

    @field_validator("timeout")
    @classmethod
    def _positive(cls, value: timedelta) -> timedelta:
        return _longer_than_zero(value)


class MirrorSection(Section):
    """[mirror]: what is copied, and where to."""

    root: Local | None = None
    state: Local | None = None
    types: tuple[Type, ...] = CHECKPOINT_TYPES
    include: tuple[Glob, ...] = ()
    exclude: tuple[Glob, ...] = ()
    min_free: Size = ByteSize(5 * 1024**3)
    max_bytes: Size = ByteSize(0)
    keep_superseded: int = Field(default=3, ge=0)
    file_mode: Mode = 0o600
    dir_mode: Mode = 0o700
    portable_names: bool | Literal["auto"] = "auto"
    must_be_mount: bool = False
    require_marker: bool | Literal["auto"] = "auto"
    short_ttl: Duration = timedelta(hours=3)
    short_ttl_settle: Duration = timedelta(minutes=15)
    extend_ttl: bool = False
    extend_ttl_max: Duration = timedelta(days=14)
    verify_every: Duration = timedelta(days=30)

    @field_validator("extend_ttl_max")
    @classmethod
    def _is_a_ttl(cls, value: timedelta) -> timedelta:
        if not LEAST_TTL <= value <= MOST_TTL:
            message = "a TTL is 1h to 3650d"
            raise ValueError(message)
        return value


class PollSection(Section):
    """[poll]: how often the service looks."""

    interval: Duration = timedelta(seconds=60)
    full_interval: Duration = timedelta(minutes=15)

    @field_validator("interval", "full_interval")
    @classmethod
    def _positive(cls, value: timedelta) -> timedelta:
        return _longer_than_zero(value)


class TransferSection(Section):
    """[transfer]: how bytes come."""

    concurrency: Count = 4
    connections: Count = 16
    bandwidth: Size = ByteSize(0)
    stall_timeout: Duration = timedelta(seconds=60)

    @field_validator("stall_timeout")
    @classmethod
    def _positive(cls, value: timedelta) -> timedelta:
        return _longer_than_zero(value)


class KeepBest(Section):
    """`keep_best` of a policy."""

    metric: str
    mode: Literal["min", "max"]
    count: Count


class Policy(Section):
    """One [[retention.remote]] or [[retention.local]]: what it matches, and at least one rule that keeps."""

    name: str
    types: tuple[Type, ...] = Field(min_length=1)
    include: tuple[Glob, ...] = ()
    base_model: str | None = None
    metadata: dict[str, str] = Field(default_factory=dict)
    keep_last: Count | None = None
    keep_within: Duration | None = None
    keep_hourly: Count | None = None
    keep_daily: Count | None = None
    keep_weekly: Count | None = None
    keep_monthly: Count | None = None
    keep_yearly: Count | None = None
    keep_every_steps: Count | None = None
    keep_names: tuple[NameGlob, ...] = ()
    keep_best: KeepBest | None = None

    @model_validator(mode="after")
    def _keeps_something(self) -> Policy:
        if not self.name.strip():
            message = "a policy needs a name: reports and the journal name it"
            raise ValueError(message)
        if "include" in self.model_fields_set and not self.include:
            message = f"policy {self.name!r}: include = [] names nothing; leave the key out to select everything"
            raise ValueError(message)
        rules = [name for name in type(self).model_fields if name.startswith("keep_") and name != "keep_orphans"]
        if not any(getattr(self, name) for name in rules):
            message = f"policy {self.name!r} has no keep rule, so it would delete everything it matches; add keep_last"
            raise ValueError(message)
        return self


class RemotePolicy(Policy):
    """A policy for the account."""

    delete_adapter_only: bool = False


class LocalPolicy(Policy):
    """A policy for replicas."""

    keep_orphans: bool = True


class RetentionSection(Section):
    """[retention]: what may be deleted, and the brakes."""

    enforce: bool = False
    action: Literal["delete", "expire"] = "delete"
    grace: Duration | None = None
    min_age: Duration = timedelta(hours=1)
    max_deletes: int = Field(default=50, ge=0)
    max_delete_fraction: float = Field(default=0.25, ge=0, le=1)
    max_shrink_fraction: float = Field(default=0.5, ge=0, le=1)
    trash: Duration = timedelta(days=7)
    timezone: str = "UTC"
    price_per_gb_month: float | None = Field(default=None, ge=0)
    remote: tuple[RemotePolicy, ...] = ()
    local: tuple[LocalPolicy, ...] = ()

    @model_validator(mode="after")
    def _says_what_it_means(self) -> RetentionSection:
        if self.action == "expire" and self.grace is not None and not LEAST_TTL <= self.grace <= MOST_TTL:
            message = 'with action = "expire", grace is the TTL that is set: 1h to 3650d'
            raise ValueError(message)
        for side, policies in (("remote", self.remote), ("local", self.local)):
            names = [policy.name for policy in policies]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                message = (
                    f"[[retention.{side}]]: two policies are called {twice[0]!r}; reports name policies, rename one"
                )
                raise ValueError(message)
        return self


class StatusSection(Section):
    """[status]: the page and the metrics."""

    listen: Listen = "127.0.0.1:9464"
    token_file: Local | None = None

    @model_validator(mode="after")
    def _is_not_open_to_all(self) -> StatusSection:
        where = self.address
        if where is not None and self.token_file is None and not _is_loopback(where[0]):
            message = f"listen = {self.listen!r} is no loopback address: name a token_file, or listen on 127.0.0.1"
            raise ValueError(message)
        return self

    @property
    def address(self) -> tuple[str, int] | None:
        """Host and port; None when it is off."""
        return _split_address(self.listen) if self.listen else None


class HooksSection(Section):
    """[hooks]: programs that run after events."""

    committed: Program = ()
    deleted: Program = ()
    failed: Program = ()
    timeout: Duration = timedelta(seconds=60)

    @field_validator("timeout")
    @classmethod
    def _positive(cls, value: timedelta) -> timedelta:
        return _longer_than_zero(value)


class NotifySection(Section):
    """[notify]: who is told."""

    urls: tuple[SecretStr, ...] = ()
    """Secrets: most forms hold a password or a token."""
    heartbeat_url: SecretHttpUrl | None = None
    on: tuple[Literal["failure", "breaker", "expiring", "disk", "silence"], ...] = (
        "failure",
        "breaker",
        "expiring",
        "disk",
        "silence",
    )
    silence: Duration = timedelta(hours=6)

    @field_validator("silence")
    @classmethod
    def _positive(cls, value: timedelta) -> timedelta:
        return _longer_than_zero(value)


class LogSection(Section):
    """[log]."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json"] = "auto"


class Settings(BaseSettings):
    """The whole configuration."""

    model_config = SettingsConfig(
        env_prefix=PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True, env_ignore_empty=True
    )

    tinker: TinkerSection = Field(default_factory=TinkerSection)
    mirror: MirrorSection = Field(default_factory=MirrorSection)
    poll: PollSection = Field(default_factory=PollSection)
    transfer: TransferSection = Field(default_factory=TransferSection)
    retention: RetentionSection = Field(default_factory=RetentionSection)
    status: StatusSection = Field(default_factory=StatusSection)
    hooks: HooksSection = Field(default_factory=HooksSection)
    notify: NotifySection = Field(default_factory=NotifySection)
    log: LogSection = Field(default_factory=LogSection)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment over the file (which comes as init arguments); nothing else."""
        del settings_cls, dotenv_settings, file_secret_settings
        assert isinstance(init_settings, InitSettingsSource)  # noqa: S101 - for the type checker
        assert isinstance(env_settings, EnvSettingsSource)  # noqa: S101 - for the type checker
        return env_settings, init_settings

    @property
    def base_url(self) -> str:
        """The service: the file's, `$TINKER_BASE_URL`, or the official one."""
        official = "https://tinker.thinkingmachines.dev/services/tinker-prod"
        return (self.tinker.base_url or os.environ.get("TINKER_BASE_URL") or official).rstrip("/")

    @property
    def root(self) -> Path:
        """The mirror: the file's, `$STATE_DIRECTORY` (systemd's), or the user's data directory."""
        if self.mirror.root is not None:
            return self.mirror.root
        state = os.environ.get("STATE_DIRECTORY", "").split(":")[0]
        if state:
            return Path(state)
        data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
        return Path(data).expanduser() / "tinker-sync"

    @property
    def state(self) -> Path:
        """Catalog, journal, pins, lock."""
        return self.mirror.state or self.root / ".tinker-sync"

    @property
    def grace(self) -> timedelta:
        """How long a verdict must stand before a delete (none), or how long an expiring checkpoint is left (7 days)."""
        if self.retention.grace is not None:
            return self.retention.grace
        return timedelta(days=7) if self.retention.action == "expire" else timedelta(0)

    @property
    def api_key_file(self) -> Path | None:
        """The file's, or systemd's `LoadCredential=api-key:…`."""
        if self.tinker.api_key_file is not None:
            return self.tinker.api_key_file
        directory = os.environ.get("CREDENTIALS_DIRECTORY")
        # Not `Path.exists`: in ExecReload= systemd names the directory and lets nobody look into it.
        if directory and os.path.exists(os.path.join(directory, "api-key")):  # noqa: PTH110, PTH118
            return Path(directory) / "api-key"
        return None


RESTART_ONLY: Final = {
    "tinker": None,
    "mirror": (
        "root",
        "state",
        "min_free",
        "file_mode",
        "dir_mode",
        "portable_names",
        "must_be_mount",
        "keep_superseded",
        "require_marker",
    ),
    "transfer": ("connections", "stall_timeout", "bandwidth"),
    "status": None,
    "log": None,
}
"""What a running service cannot change: whole sections (None), or these keys."""


def reload_difference(old: Settings, new: Settings) -> tuple[list[str], list[str]]:
    """Which keys differ, as `[section] key`, and which of them need a restart."""
    changed: list[str] = []
    fixed: list[str] = []
    for section in _sections():
        mine, theirs = getattr(old, section), getattr(new, section)
        for key in type(mine).model_fields:
            if getattr(mine, key) != getattr(theirs, key):
                keys = RESTART_ONLY.get(section, ())
                (fixed if keys is None or key in keys else changed).append(f"[{section}] {key}")
    return changed, fixed


def retention_difference(old: Settings, new: Settings) -> list[str]:
    """What a changed [retention] would change, a line for each key and each policy."""
    lines: list[str] = []
    for key in RetentionSection.model_fields:
        mine, theirs = getattr(old.retention, key), getattr(new.retention, key)
        if mine == theirs:
            continue
        if key not in ("remote", "local"):
            lines.append(f"{key}: {mine} becomes {theirs}")
            continue
        before, after = ({policy.name: policy for policy in policies} for policies in (mine, theirs))
        for name in sorted({*before, *after}):
            if before.get(name) != after.get(name):
                what = "is new" if name not in before else "is gone" if name not in after else "is changed"
                lines.append(f"{key} policy {name!r} {what}")
    return lines


def reloaded(old: Settings, new: Settings, *, retention: bool) -> Settings:
    """The new settings, with the old values of what cannot change while running, and of [retention] unless asked for."""
    sections: dict[str, object] = {}
    for section in _sections():
        mine, theirs = getattr(old, section), getattr(new, section)
        keys = RESTART_ONLY.get(section, ())
        if keys is None or (section == "retention" and not retention):
            sections[section] = mine
        else:
            sections[section] = theirs.model_copy(update={key: getattr(mine, key) for key in keys})
    return new.model_copy(update=sections)


class FileSettings(Settings):
    """Settings that the environment does not touch: the demo's must not lead into a real mirror."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """What is given, and nothing else."""
        del settings_cls, env_settings, dotenv_settings, file_secret_settings
        return (init_settings,)


def _longer_than_zero(value: timedelta) -> timedelta:
    if value <= timedelta(0):
        message = "must be longer than zero"
        raise ValueError(message)
    return value


def find_config(explicit: Path | None) -> Path | None:
    """The file to read: `--config`, `$TINKER_SYNC_CONFIG`, the user's, `/etc`; None where there is none.

    Raises ConfigInvalid when one that was named is missing.
    """
    named = explicit or (Path(text) if (text := os.environ.get("TINKER_SYNC_CONFIG")) else None)
    if named is not None:
        if not _exists(named):
            message = f"the configuration file {named} does not exist"
            raise ConfigInvalid(message)
        return named
    home = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    for candidate in (home / "tinker-sync" / "config.toml", Path("/etc/tinker-sync/config.toml")):
        if _exists(candidate):
            return candidate
    return None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        message = f"the configuration file {path} cannot be read: {error.strerror}"
        raise ConfigInvalid(message) from error


def load_settings(explicit: Path | None = None, *, root: Path | None = None) -> Settings:
    """Read file and environment; `root` is the option that overrides both.

    Raises ConfigInvalid that names file, line, key, what is wrong, and the nearest valid key, for all faults at once.
    """
    path = find_config(explicit)
    text = "" if path is None else _read(path)
    whence = "the environment" if path is None else str(path)
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        said = "is nested too deeply" if isinstance(error, RecursionError) else error
        message = f"{whence}: {said}"
        raise ConfigInvalid(message) from error
    if path is not None and not document:
        message = f"{whence} is empty (half-saved?): remove it to run on defaults, or copy config.example.toml there"
        raise ConfigInvalid(message)
    faults = _environment_faults()
    try:
        settings = Settings(**({name: {} for name in _sections()} | document))
    except ValidationError as error:
        faults += [_explain(fault, whence, text) for fault in error.errors(include_url=False)]
    except ValueError as error:  # pydantic-settings: a value in the environment that is no JSON where JSON is due
        faults = faults or [f"{PREFIX}…: {error}"]
    if faults:
        raise ConfigInvalid("\n".join(faults))
    if root is not None:
        mirror = settings.mirror.model_copy(update={"root": _absolute(root)})
        settings = settings.model_copy(update={"mirror": mirror})
    return settings


def _read(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            message = f"the configuration file {path} is no regular file"
            raise ConfigInvalid(message)
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        message = f"the configuration file {path} cannot be read: {reason}"
        raise ConfigInvalid(message) from error


def _sections() -> dict[str, type[BaseModel]]:
    return {
        name: field.annotation
        for name, field in Settings.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }


def _environment_faults() -> list[str]:
    """`TINKER_SYNC__…` variables that set nothing: pydantic-settings would pass over the misspelt section."""
    sections = _sections()
    faults: list[str] = []
    for variable in sorted(os.environ):
        if not variable.upper().startswith(PREFIX):
            continue
        section, _, rest = variable[len(PREFIX) :].lower().partition("__")
        key = rest.split("__")[0]
        if section not in sections:
            faults.append(f"${variable}: there is no section [{section}]{_nearest(section, sections)}")
        elif not key:
            faults.append(f"${variable}: name a key, as in {PREFIX}MIRROR__ROOT")
        elif key in sections[section].model_fields and not _is_value(sections[section], key, os.environ[variable]):
            faults.append(f'${variable}: a list is JSON in the environment, as in \'["a", "b"]\'')
    return faults


def _is_value(section: type[BaseModel], key: str, text: str) -> bool:
    """Whether a variable's text can be the key's at all: lists come as JSON."""
    if get_origin(section.model_fields[key].annotation) is not tuple:
        return True
    try:
        return isinstance(json.loads(text), list)
    except ValueError:
        return False


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _explain(fault: Any, whence: str, text: str) -> str:
    """One fault of pydantic's as a line: where, key, what, and the nearest valid key."""
    location = [part for part in fault["loc"] if not (isinstance(part, str) and part in ("bool", "literal['auto']"))]
    where = _dotted(location)
    line = _line_of(location, text)
    variable = PREFIX + "__".join(str(part).upper() for part in location)
    if any(name.upper() == variable for name in os.environ):
        place = f"${variable}"
    else:
        place = f"{whence}:{line}" if line is not None else whence
    if fault["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        kind = "section" if len(location) == 1 else "key"
        return f"{place}: unknown {kind} {where}{_nearest(str(location[-1]), known)}"
    if fault["type"] == "missing":
        return f"{place}: {where} is missing"
    said = str(fault["msg"]).removeprefix("Value error, ")
    return f"{place}: {where}: {said}"


def _dotted(location: list[Any]) -> str:
    if not location:
        return "the configuration"
    section, *rest = location
    names = [str(part) for part in rest if not isinstance(part, int)]
    return f"[{section}] {'.'.join(names)}" if names else f"[{section}]"


def _known_keys(location: list[Any]) -> list[str]:
    model: Any = Settings
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next((item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel)), model)
    return list(model.model_fields)


def _line_of(location: list[Any], text: str) -> int | None:
    """The line of a key, found by reading headers and keys; tomllib keeps none."""
    names = [str(part) for part in location if not isinstance(part, int)]
    if not names:
        return None
    wanted_table = [part for part in location if isinstance(part, int)]
    occurrence = wanted_table[0] if wanted_table and len(location) > 2 else 0
    header, best, seen = "", None, -1
    for number, line in enumerate(text.splitlines(), start=1):
        table = re.match(r"\s*\[+\s*([^\]]+?)\s*\]+", line)
        if table:
            header = table.group(1).replace(" ", "").replace('"', "")
            if header == ".".join(names[:2]) and line.lstrip().startswith("[["):
                seen += 1
            if header in (names[0], ".".join(names[:2])) and (seen < 0 or seen == occurrence):
                best = best or number
            continue
        key = re.match(r'\s*"?([A-Za-z0-9_-]+)"?\s*=', line)
        full = ".".join([header, key.group(1)]) if key else ""
        if full in (".".join(names), ".".join([*names[:2], names[-1]])) and seen in (-1, occurrence):
            return number
    return best
