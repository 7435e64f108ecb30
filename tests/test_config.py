"""Settings: precedence, errors that say where and what, and the example that is the reference."""

from __future__ import annotations

import re
import tomllib
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from tinker_sync.config import Settings, find_config, load_settings, parse_duration
from tinker_sync.errors import ConfigInvalid

EXAMPLE = Path(__file__).parents[1] / "config.example.toml"


def load(tmp_path: Path, text: str) -> Settings:
    """Read a file with this content."""
    path = tmp_path / "c.toml"
    path.write_text(text)
    return load_settings(path)


def keys_of(model: type[BaseModel], prefix: str = "") -> set[str]:
    """Every dotted key that a model has."""
    found: set[str] = set()
    for name, field in model.model_fields.items():
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        nested = [item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel)]
        if nested:
            found |= keys_of(nested[0], f"{prefix}{name}.")
        else:
            found.add(prefix + name)
    return found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("keep_last = true", "is a number"), ("keep_last = 1\ninclude = []", "names nothing"),
        ('keep_names = [""]', "matches no name"), ('keep_last = 1\ninclude = ["*//x"]', "has an empty part"),
        ("keep_last = 0", "greater than or equal to 1"), ('keep_within = "-2d"', "is no duration"),
    ],
)  # fmt: skip
def test_policies_that_would_let_more_go_than_they_say(tmp_path: Path, text: str, said: str) -> None:
    """Refused, in words."""
    policy = f'[[retention.remote]]\nname = "p"\ntypes = ["sampler"]\n{text}\n'
    with pytest.raises(ConfigInvalid, match=re.escape(said)):
        load(tmp_path, policy)


def test_two_policies_of_one_name_and_a_short_grace(tmp_path: Path) -> None:
    """Reports name policies; the API takes no TTL under an hour."""
    policy = '[[retention.remote]]\nname = "p"\ntypes = ["sampler"]\nkeep_last = 1\n'
    with pytest.raises(ConfigInvalid, match="two policies are called 'p'"):
        load(tmp_path, policy * 2)
    with pytest.raises(ConfigInvalid, match="1h to 3650d"):
        load(tmp_path, '[retention]\naction = "expire"\ngrace = "30m"\n')


def test_the_example_is_the_reference_of_every_key(tmp_path: Path) -> None:
    """It loads as it stands; with its comments taken off it loads too, and names every key with its default."""
    text = EXAMPLE.read_text()
    load_settings(EXAMPLE)
    full = re.sub(r"^# ?(?=[a-z_]+ = |\[)", "", text, flags=re.MULTILINE)
    settings = load(tmp_path, full)
    document = tomllib.loads(full)

    def named(table: dict[str, Any], prefix: str = "") -> set[str]:
        found: set[str] = set()
        for key, value in table.items():
            if isinstance(value, list) and value and isinstance(value[0], dict):
                for item in value:
                    found |= named(item, f"{prefix}{key}.")
            elif isinstance(value, dict) and key != "metadata":
                found |= named(value, f"{prefix}{key}.")
            else:
                found.add(prefix + key)
        return found

    assert keys_of(Settings) - named(document) == set()
    default = Settings()
    for section in ("tinker", "mirror", "poll", "transfer", "status", "log"):
        for name in type(getattr(settings, section)).model_fields:
            if name in ("api_key_file", "credential_cmd", "root", "state", "base_url", "file_urls_below", "token_file"):
                continue
            if name in ("include", "exclude"):
                continue
            assert getattr(getattr(settings, section), name) == getattr(getattr(default, section), name), name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("\n# only a comment\n", "is empty"),
        ("[mirror\n", "c.toml: "),
        ("[mirror]\nrooot = '/x'\n", r"c.toml:2: unknown key \[mirror\] rooot; did you mean 'root'"),
        ("[miror]\nroot = '/x'\n", r"c.toml:1: unknown section \[miror\]; did you mean 'mirror'"),
        ("[mirror]\nmin_free = '5 apples'\n", r"c.toml:2: \[mirror\] min_free: '5 apples' is no size"),
        ("[poll]\ninterval = '5 parsecs'\n", r"c.toml:2: \[poll\] interval: '5 parsecs' is no duration"),
        ("[poll]\ninterval = '0s'\n", "longer than zero"),
        ("[poll]\ninterval = '99999999999999999999999w'\n", "100 years"),
        ("[mirror]\nroot = '~nosuchuser/x'\n", "no such user"),
        ("[mirror]\nroot = ''\n", "is no path"),
        ("[tinker]\nbase_url = 'ftp://x'\n", "https://"),
        ("[tinker]\nbase_url = 'http://h:999999/'\n", "https://"),
        ("[poll]\ninterval = -5\n", "a duration is a text"),
        ("[transfer]\nconcurrency = 0\n", r"\[transfer\] concurrency"),
        ("[mirror]\ntypes = ['traning']\n", "is no checkpoint type"),
        ("[mirror]\ninclude = ['*']\n", "three parts"),
        ("[mirror]\nfile_mode = '0999'\n", "chmod"),
        ("[tinker]\nlisting = 'all'\n", "listing"),
        ("[[retention.remote]]\nname = 'a'\ntypes = ['sampler']\n", "no keep rule"),
        ("[[retention.remote]]\nname = 'a'\nkeep_last = 3\n", "types is missing"),
        ("[[retention.remote]]\nname = 'a'\ntypes = []\nkeep_last = 3\n", "types"),
        ("[[retention.remote]]\nname = 'a'\ntypes = ['sampler']\nkeep_last = 0\n", "keep_last"),
        ("[[retention.remote]]\nname = 'a'\ntypes = ['sampler']\nkeep_lst = 1\n", "did you mean 'keep_last'"),
    ],
)
def test_what_is_wrong_is_said_with_where_and_what(tmp_path: Path, text: str, said: str) -> None:
    """File, line, key, and the nearest valid one."""
    with pytest.raises(ConfigInvalid, match=said):
        load(tmp_path, text)


def test_all_faults_come_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File and environment, in one answer."""
    monkeypatch.setenv("TINKER_SYNC__MIROR__ROOT", "/x")
    with pytest.raises(ConfigInvalid) as caught:
        load(tmp_path, "[mirror]\nrooot = 1\n[transfer]\nconcurrency = 'x'\n")
    assert len(str(caught.value).splitlines()) == 3


def test_the_environment_overrides_the_file_and_the_option_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--root` over `TINKER_SYNC__MIRROR__ROOT` over the file, key by key."""
    path = tmp_path / "c.toml"
    path.write_text("[mirror]\nroot = '/file'\nkeep_superseded = 7\n")
    assert load_settings(path).root == Path("/file")
    monkeypatch.setenv("TINKER_SYNC__MIRROR__ROOT", "/environment")
    monkeypatch.setenv("TINKER_SYNC__TRANSFER__CONCURRENCY", "9")
    settings = load_settings(path)
    assert (settings.root, settings.transfer.concurrency) == (Path("/environment"), 9)
    assert settings.mirror.keep_superseded == 7
    assert load_settings(path, root=Path("/option")).root == Path("/option")
    monkeypatch.setenv("TINKER_SYNC__MIRROR__TYPES", "training")
    with pytest.raises(ConfigInvalid, match=r"\$TINKER_SYNC__MIRROR__TYPES: a list is JSON"):
        load_settings(path)
    monkeypatch.setenv("TINKER_SYNC__MIRROR__TYPES", '["training"]')
    assert load_settings(path).mirror.types == ("training",)
    monkeypatch.setenv("TINKER_SYNC__MIRROR__KEEP_SUPERSEDED", "-3")
    with pytest.raises(ConfigInvalid, match=r"\$TINKER_SYNC__MIRROR__KEEP_SUPERSEDED"):
        load_settings(path)
    monkeypatch.delenv("TINKER_SYNC__MIRROR__KEEP_SUPERSEDED")
    monkeypatch.setenv("TINKER_SYNC__TRANSFER__CONCURRENCY", "many")
    with pytest.raises(ConfigInvalid, match=r"\$TINKER_SYNC__TRANSFER__CONCURRENCY"):
        load_settings(path)


def test_where_the_file_and_the_root_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named, user's, none; root from systemd's or the user's data directory."""
    assert find_config(None) is None or find_config(None) == Path("/etc/tinker-sync/config.toml")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "tinker-sync").mkdir()
    (tmp_path / "tinker-sync" / "config.toml").write_text("[log]\nlevel = 'debug'\n")
    assert load_settings().log.level == "debug"
    monkeypatch.setenv("TINKER_SYNC_CONFIG", str(tmp_path / "none.toml"))
    with pytest.raises(ConfigInvalid, match="does not exist"):
        load_settings()
    monkeypatch.delenv("TINKER_SYNC_CONFIG")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert Settings().root == Path("/data/tinker-sync")
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/tinker-sync")
    assert Settings().root == Path("/var/lib/tinker-sync")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert Settings().api_key_file is None
    (tmp_path / "api-key").write_text("tml-x")
    assert Settings().api_key_file == tmp_path / "api-key"


def test_durations_and_sizes(tmp_path: Path) -> None:
    """Five units, combined ones, decimal and binary sizes."""
    assert parse_duration("90s") == timedelta(seconds=90)
    assert parse_duration("1h30m") == timedelta(minutes=90)
    assert parse_duration("4w") == timedelta(weeks=4)
    settings = load(tmp_path, "[mirror]\nmin_free = '5GB'\nmax_bytes = '2 TiB'\n")
    assert (settings.mirror.min_free, settings.mirror.max_bytes) == (5 * 10**9, 2 * 2**40)
