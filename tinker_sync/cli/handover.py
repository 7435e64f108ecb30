"""Hands work to the service that holds the root, over its control socket, and shows what it reports."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import httpx

from tinker_sync.errors import RootBusy, TinkerSyncError
from tinker_sync.model.moments import UNKNOWN_TIME
from tinker_sync.model.paths import TinkerPath
from tinker_sync.model.work import Transfer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from tinker_sync.ports import Reporter

_CONNECT: Final = 5.0


class HandedOver(TinkerSyncError):
    """The service could not do what it was asked for; `exit_code` is what the command would have ended with."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


async def hand_over(
    address: Path, what: str, paths: Sequence[TinkerPath], heard: Callable[[Mapping[str, Any]], None]
) -> Mapping[str, Any]:
    """Ask for `what` and return its result; `heard` gets every line before. Raises RootBusy, HandedOver."""
    transport = httpx.AsyncHTTPTransport(uds=str(address))
    timeout = httpx.Timeout(None, connect=_CONNECT)
    try:
        async with httpx.AsyncClient(transport=transport, timeout=timeout, trust_env=False) as client:
            body = {"paths": [str(path) for path in paths]}
            async with client.stream("POST", f"http://service/{what}", json=body) as answer:
                async for line in answer.aiter_lines():
                    document = json.loads(line)
                    if "error" in document and "exit_code" in document:
                        raise HandedOver(str(document["error"]), int(document["exit_code"]))
                    if "result" in document:
                        result: Mapping[str, Any] = document["result"]
                        return result
                    heard(document)
    except (httpx.HTTPError, ValueError, OSError) as error:
        message = (
            f"the service holds the root and does not answer on {address} ({type(error).__name__}): "
            "ask again in a moment, as the user that it runs as"
        )
        raise RootBusy(message) from error
    message = "the service ended before the work did; it goes on with its next start"
    raise RootBusy(message)


class Relay:
    """Turns lines about transfers into calls of a reporter. Transfers that somebody else asked for are left out."""

    def __init__(self, reporter: Reporter, paths: Sequence[TinkerPath]) -> None:
        self._reporter = reporter
        self._transfers = {str(path): Transfer(path, UNKNOWN_TIME, None, 0) for path in paths}

    def hear(self, line: Mapping[str, Any]) -> None:
        """One line."""
        event = line.get("event")
        if event == "planned":
            self._reporter.planned(int(line["transfers"]), int(line["bytes"]))
        if line.get("path") not in self._transfers and event == "damaged":
            path = TinkerPath.parse(line["path"])
            self._transfers[line["path"]] = Transfer(path, UNKNOWN_TIME, None, 0)
        transfer = self._transfers.get(line.get("path", ""))
        if transfer is None:
            return
        if event == "started":
            self._reporter.started(transfer, line["expected"])
        elif event == "advanced":
            self._reporter.advanced(transfer, int(line["received"]))
        elif event == "ended":
            self._reporter.ended(transfer, line["error"])
