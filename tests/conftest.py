"""What the tests share: a running sandbox, a mirror of it, and the installed command."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import structlog

from tinker_sync.config import Settings
from tinker_sync.journal import read_events
from tinker_sync.model.paths import TinkerPath
from tinker_sync.sandbox import Sandbox
from tinker_sync.wiring import SYSTEM_CLOCK, Silent, open_mirror, open_root, open_service

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from tinker_sync.passes import PassResult
    from tinker_sync.ports import Clock

NOW = datetime(2026, 1, 15, 12, 0, tzinfo=UTC)


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No credential, configuration or proxy of the machine reaches a test."""
    for name in list(os.environ):
        if name.startswith(("TINKER", "XDG_", "CLOUDFLARE_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name in ("STATE_DIRECTORY", "CREDENTIALS_DIRECTORY", "RUNTIME_DIRECTORY", "JOURNAL_STREAM"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))


@pytest.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    """A running local server, empty and well-behaved."""
    server = Sandbox()
    async with server.running():
        yield server


@dataclass
class Site:
    """A mirror of one sandbox: its configuration, and ways to run it."""

    sandbox: Sandbox
    home: Path
    mirror: dict[str, Any] = field(default_factory=dict)
    tinker: dict[str, Any] = field(default_factory=dict)
    transfer: dict[str, Any] = field(default_factory=dict)
    retention: dict[str, Any] = field(default_factory=dict)
    clock: Clock = SYSTEM_CLOCK

    @property
    def root(self) -> Path:
        """The tree."""
        return self.home / "mirror"

    def settings(self) -> Settings:
        """Everything as the configuration file would say it."""
        key = self.home / "key"
        key.write_text(self.sandbox.key)
        return Settings.model_validate(
            {
                "tinker": {"base_url": self.sandbox.base_url, "api_key_file": str(key), **self.tinker},
                "mirror": {"root": str(self.root), "min_free": 0, **self.mirror},
                "transfer": {"stall_timeout": "2s", **self.transfer},
                "retention": self.retention,
            }
        )

    async def sync(self, reporter: Any = None) -> PassResult:
        """One pass in this process."""
        settings = self.settings()
        async with open_service(settings) as service:
            await service.credentials.headers()
            with open_root(settings, command="test", account=service.credentials.account, clock=self.clock) as root:
                async with open_mirror(settings, service, root, reporter or Silent(), clock=self.clock) as mirror:
                    return await mirror.sync()

    async def prune(self, allow: int | None = None) -> PassResult:
        """Enforce once in this process."""
        async with self.opened() as mirror:
            return await mirror.prune(allow=allow)

    def events(self, *names: str) -> list[dict[str, Any]]:
        """The journal, or only events of these names."""
        found = [event for _, event in read_events(self.root / ".tinker-sync")]
        return [event for event in found if not names or event["event"] in names]

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Any]:
        """The engine, for tests that look inside."""
        settings = self.settings()
        async with open_service(settings) as service:
            with open_root(settings, command="test", clock=self.clock) as root:
                async with open_mirror(settings, service, root, Silent(), clock=self.clock) as mirror:
                    yield mirror

    def directory(self, path: TinkerPath | str) -> Path:
        """Where a plainly named replica is."""
        parsed = TinkerPath.parse(path) if isinstance(path, str) else path
        return self.root / parsed.run_id / parsed.segment / parsed.name

    def payload(self, path: TinkerPath | str) -> dict[str, bytes]:
        """A replica's files without its manifest."""
        base = self.directory(path)
        return {
            str(file.relative_to(base)): file.read_bytes()
            for file in sorted(base.rglob("*"))
            if file.is_file() and file.name != ".tinker-sync.json"
        }

    def staging(self) -> list[Path]:
        """What lies in staging: nothing, after any pass."""
        area = self.root / ".tinker-sync" / "staging"
        return list(area.iterdir()) if area.exists() else []

    def write_config(self, extra: str = "") -> Path:
        """The configuration as a file, for the command."""
        key = self.home / "key"
        key.write_text(self.sandbox.key)
        path = self.home / "config.toml"
        path.write_text(
            ("" if "[status]" in extra else '[status]\nlisten = ""\n')
            + f'[tinker]\nbase_url = "{self.sandbox.base_url}"\napi_key_file = "{key}"\n'
            f'[mirror]\nroot = "{self.root}"\nmin_free = "0"\n{extra}'
        )
        return path


@pytest.fixture
def site(sandbox: Sandbox, tmp_path: Path) -> Site:
    """An empty mirror of the sandbox."""
    return Site(sandbox, tmp_path)


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Site]:
    """A mirror of a sandbox that runs beside the test, so that the command can be a process of its own."""
    sandbox = Sandbox(key="tml-very-secret-key")
    ready, stop = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        async with sandbox.running():
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert ready.wait(10)
    try:
        yield Site(sandbox, tmp_path)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)
        loop.close()


def command(*arguments: str) -> list[str]:
    """The installed command, in this interpreter's environment."""
    return [str(Path(sys.executable).parent / "tinker-sync"), *arguments]


def run(
    arguments: Sequence[str], *, check: int | None = None, timeout: float = 60, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the installed command to its end, as a user would. Not for use inside a running event loop with a sandbox."""
    done = subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, **environment},
    )
    if check is not None:
        assert done.returncode == check, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done


def minutes(number: float) -> timedelta:
    """So many minutes."""
    return timedelta(minutes=number)


def hours(number: float) -> timedelta:
    """So many hours."""
    return timedelta(hours=number)
