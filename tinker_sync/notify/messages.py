"""Sends notifications through Apprise, and a heartbeat. A channel that fails is a line in the log, and nothing else."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Self

import structlog

from tinker_sync.errors import ConfigInvalid, ServiceTrouble
from tinker_sync.transport import Pinger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tinker_sync.notify.alarms import Message

log = structlog.get_logger()

_WAITING_MOST: Final = 100
_SEND_MOST: Final = 60.0
"""Seconds that all channels together may take for one message."""
_TRIES: Final = 3
BEAT_EVERY: Final = 55.0
"""Seconds between heartbeats at least; they follow proven listings."""


class Messenger:
    """Notifications and heartbeats of one service. Async context manager.

    Leaving it in peace waits a while for what is queued. Raises ConfigInvalid for URLs that nobody understands.
    """

    def __init__(
        self, urls: Sequence[str], heartbeat_url: str | None, *, user_agent: str, patience: float | None = None
    ) -> None:
        self._patience = _SEND_MOST if patience is None else patience
        self._user_agent = user_agent
        self._queue: asyncio.Queue[Message] = asyncio.Queue(_WAITING_MOST)
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="notify")
        self._tasks: list[asyncio.Task[None]] = []
        self._beat = asyncio.Event()
        self.configure(urls, heartbeat_url)

    def configure(self, urls: Sequence[str], heartbeat_url: str | None) -> None:
        """Other channels from now on. Raises ConfigInvalid."""
        self._channels = open_channels(urls)
        self._heartbeat_url = heartbeat_url

    async def __aenter__(self) -> Self:
        self._tasks = [
            asyncio.create_task(self._send_on(), name="notify"),
            asyncio.create_task(self._beat_on(), name="heartbeat"),
        ]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._patience):
                        await self._queue.join()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._sender.shutdown(wait=False, cancel_futures=True)

    def send(self, message: Message) -> None:
        """Queue it."""
        if self._channels is None:
            return
        try:
            self._queue.put_nowait(message)
        except asyncio.QueueFull:
            log.warning("notify.dropped", about=message.kind)

    def alive(self) -> None:
        """There was a proven listing: let the heartbeat URL know, if it is time."""
        self._beat.set()

    async def _send_on(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            message = await self._queue.get()
            try:
                for attempt in range(1, _TRIES + 1):
                    channels = self._channels
                    if channels is None:
                        break
                    sending = loop.run_in_executor(self._sender, _notify, channels, message)
                    with suppress(TimeoutError):
                        async with asyncio.timeout(_SEND_MOST):
                            if await asyncio.shield(sending):
                                break
                    log.warning("notify.failed", about=message.kind, attempt=attempt)
                    if attempt < _TRIES:
                        await asyncio.sleep(10.0 * attempt)
            finally:
                self._queue.task_done()

    async def _beat_on(self) -> None:
        async with Pinger(self._user_agent) as pinger:
            while True:
                await self._beat.wait()
                self._beat.clear()
                url = self._heartbeat_url
                if url is None:
                    continue
                try:
                    await pinger.ping(url)
                except ServiceTrouble as error:
                    log.warning("heartbeat.failed", error=str(error))
                await asyncio.sleep(BEAT_EVERY)


def open_channels(urls: Sequence[str]) -> Any:
    """Apprise with these URLs; None without any. Raises ConfigInvalid, which never shows a URL: it holds passwords."""
    if not urls:
        return None
    try:
        import apprise  # noqa: PLC0415 - an extra
    except ImportError as error:
        message = "[notify] urls needs Apprise: pip install 'tinker-sync[notify]'"
        raise ConfigInvalid(message) from error
    logging.getLogger("apprise").setLevel(logging.CRITICAL)  # it logs URLs
    channels = apprise.Apprise()
    for number, url in enumerate(urls, start=1):
        if not channels.add(url):
            message = (
                f"[notify] urls: the {number}. URL is none that Apprise understands (apprise has the list of forms)"
            )
            raise ConfigInvalid(message)
    return channels


def _notify(channels: Any, message: Message) -> bool:
    try:
        return bool(channels.notify(title=message.title, body=message.body))
    except Exception:  # noqa: BLE001 - a channel's bug, and its text can hold a password
        return False
