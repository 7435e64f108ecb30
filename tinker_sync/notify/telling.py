"""Decides with what was said before what people are told now, and sees it delivered: nothing counts as told until it was."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Protocol

from tinker_sync.notify.alarms import as_json, from_json, next_messages

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from datetime import datetime
    from typing import Any

    from tinker_sync.notify.alarms import Told
    from tinker_sync.notify.messages import Messenger


class Memory(Protocol):
    """Where what was told outlives the process: the catalog."""

    def told(self) -> Mapping[str, Any]:
        """What was saved last."""
        ...

    def save_told(self, told: Mapping[str, Any]) -> None:
        """Keep it."""
        ...


class Telling:
    """The alarms of one mirror. It belongs to the event loop."""

    def __init__(self, messenger: Messenger, memory: Memory, *, on: Collection[str], who: str) -> None:
        self._messenger = messenger
        self._memory = memory
        self._on = frozenset(on)
        self._who = who
        self._told: dict[str, Told] | None = None
        """As it will be when everything was delivered."""

    def configure(self, on: Collection[str]) -> None:
        """Other kinds from now on; of one that was taken out nothing is told, not even that it is over."""
        self._on = frozenset(on)

    async def tell(self, alarms: Mapping[str, str], now: datetime) -> None:
        """Tell what is new of these, and what is over. Raises CatalogUnusable."""
        if not self._messenger.reaches_somebody:
            self._told = None  # nothing counts as told but what was delivered before
            return
        if self._told is None:
            self._told = from_json(await asyncio.to_thread(self._memory.told))
        wanted = {name: text for name, text in alarms.items() if self._is_on(name)}
        before = {name: told for name, told in self._told.items() if self._is_on(name)}
        messages, after = next_messages(before, wanted, now=now, who=self._who)
        self._told |= after
        for message in messages:
            self._messenger.send(message, partial(self._save, message.kind))

    def _is_on(self, name: str) -> bool:
        return name.partition(":")[0] in self._on

    async def _save(self, name: str) -> None:
        """It was delivered. Raises CatalogUnusable."""
        if self._told is not None:
            entry = {name: self._told[name]}
            await asyncio.to_thread(self._merge, entry)

    def _merge(self, entry: dict[str, Told]) -> None:
        self._memory.save_told({**self._memory.told(), **as_json(entry)})
