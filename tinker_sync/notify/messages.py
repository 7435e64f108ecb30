"""Sends notifications through Apprise, and a heartbeat. A channel that fails is a line in the log, and nothing else.

What no channel took is tried again, for as long as it takes: an alarm about a host without network is told when it has one.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Self

import structlog

from tinker_sync.errors import ConfigInvalid, ServiceTrouble, TinkerSyncError
from tinker_sync.model.news import News
from tinker_sync.transport import Pinger

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from tinker_sync.notify.alarms import Message

log = structlog.get_logger()

_WAITING_MOST: Final = 100
_SEND_MOST: Final = 60.0
"""Seconds that one channel may take for one message."""
_AGAIN_FIRST: Final = 10.0
_AGAIN_MOST: Final = 600.0
BEAT_EVERY: Final = 55.0
"""Seconds between heartbeats at least."""


class Messenger:
    """Notifications and heartbeats of one mirror. Async context manager.

    Leaving it waits for what is under way, at most `patience` seconds, whatever ended the work, unless it was cancelled.
    Raises ConfigInvalid for URLs that nobody understands.
    """

    def __init__(
        self, urls: Sequence[str], heartbeat_url: str | None, *, user_agent: str, patience: float | None = None
    ) -> None:
        self._patience = _SEND_MOST if patience is None else patience
        self._user_agent = user_agent
        self._waiting: deque[tuple[Message, Callable[[], Awaitable[None]]]] = deque()
        self._tasks: list[asyncio.Task[None]] = []
        self._queued = asyncio.Event()
        self._beat = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._rested = asyncio.Event()
        self._rested.set()
        self._resting = False
        """Between two heartbeats: whoever leaves does not wait for the next."""
        self._news = News()
        self._stuck: list[Any] = []
        """Channels whose thread has not come back; no other is started for them."""
        self.configure(urls, heartbeat_url)

    def configure(self, urls: Sequence[str], heartbeat_url: str | None) -> None:
        """Other channels from now on. Raises ConfigInvalid, and then nothing has changed."""
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
            if kind is None or issubclass(kind, Exception):
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._patience):
                        await self._idle.wait()
                        await self._rested.wait()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            if self._waiting:
                log.warning("notify.left", messages=len(self._waiting))

    @property
    def reaches_somebody(self) -> bool:
        """Whether there is any channel."""
        return bool(self._channels)

    def send(self, message: Message, delivered: Callable[[], Awaitable[None]]) -> None:
        """Queue it; `delivered` is called when a channel took it."""
        if not self._channels:
            return
        if len(self._waiting) >= _WAITING_MOST:
            dropped, _ = self._waiting.popleft()
            log.warning("notify.dropped", about=dropped.kind)
        self._waiting.append((message, delivered))
        self._idle.clear()
        self._queued.set()

    def alive(self) -> None:
        """All is well: let the heartbeat URL know, if it is time."""
        if self._heartbeat_url is not None:
            if not self._resting:
                self._rested.clear()
            self._beat.set()

    async def _send_on(self) -> None:
        again = _AGAIN_FIRST
        while True:
            self._queued.clear()
            while self._waiting:
                message, delivered = self._waiting[0]
                if not self._channels:  # a reload took them all away
                    self._waiting.clear()
                    break
                if not await self._deliver(message):
                    log.warning("notify.failed", about=message.kind, again_in=again)
                    await asyncio.sleep(again)
                    again = min(_AGAIN_MOST, 2 * again)
                    continue
                again = _AGAIN_FIRST
                with suppress(IndexError):
                    if self._waiting[0][0] is message:
                        self._waiting.popleft()
                try:
                    await delivered()
                except TinkerSyncError as error:  # then a restart tells it once more
                    log.warning("notify.forgotten", error=str(error))
            self._idle.set()
            await self._queued.wait()

    async def _deliver(self, message: Message) -> bool:
        """To all channels, each by itself: whether at least one took it. A broken one does not make the others repeat."""
        took = []
        for number, channel in enumerate(self._channels, start=1):
            if channel in self._stuck:
                took.append(False)
                continue
            try:
                async with asyncio.timeout(_SEND_MOST):
                    good = await self._in_a_thread(channel, message)
            except TimeoutError:
                good = False
            took.append(good)
            if good:
                self._news.over(f"channel {number}")
            elif self._news.is_new(f"channel {number}", "failed"):
                log.warning("notify.channel_failed", url=f"number {number} of [notify] urls", about=message.kind)
        return any(took)

    async def _in_a_thread(self, channel: Any, message: Message) -> bool:
        """In a thread of its own that nobody waits for at the exit: a channel can hang for longer than a stop may take."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[bool] = loop.create_future()
        self._stuck.append(channel)

        def finish(result: bool) -> None:  # noqa: FBT001 - the loop calls it
            self._stuck.remove(channel)
            if not done.done():
                done.set_result(result)

        def run() -> None:
            result = _notify(channel, message)
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(finish, result)

        try:
            threading.Thread(target=run, name="notify", daemon=True).start()
        except RuntimeError:  # no threads left
            finish(result=False)
        return await done

    async def _beat_on(self) -> None:
        async with Pinger(self._user_agent) as pinger:
            while True:
                await self._beat.wait()
                self._beat.clear()
                url = self._heartbeat_url
                if url is not None:
                    try:
                        await pinger.ping(url)
                    except ServiceTrouble as error:
                        if self._news.is_new("heartbeat", str(error)):
                            log.warning("heartbeat.failed", error=str(error))
                    else:
                        self._news.over("heartbeat")
                self._rested.set()
                self._resting = True
                await asyncio.sleep(BEAT_EVERY)
                self._resting = False


def open_channels(urls: Sequence[str]) -> list[Any]:
    """One plugin of Apprise's for each URL. Raises ConfigInvalid, which never shows a URL: it holds passwords.

    (Its collection of several sends from threads of its own, for which the process would wait at its end.)
    """
    if not urls:
        return []
    try:
        import apprise  # noqa: PLC0415 - an extra
    except ImportError as error:
        message = "[notify] urls needs Apprise: pip install 'tinker-sync[notify]'"
        raise ConfigInvalid(message) from error
    logging.getLogger("apprise").setLevel(logging.CRITICAL)  # it logs URLs
    channels = []
    for number, url in enumerate(urls, start=1):
        channel = apprise.Apprise.instantiate(url, suppress_exceptions=True)
        if channel is None:
            message = (
                f"[notify] urls: the {number}. URL is none that Apprise understands (apprise has the list of forms)"
            )
            raise ConfigInvalid(message)
        channels.append(channel)
    return channels


def _notify(channel: Any, message: Message) -> bool:
    try:
        return bool(channel.notify(title=message.title, body=message.body))
    except Exception:  # noqa: BLE001 - a channel's bug, and its text can hold a password
        return False
