"""Talking to the service manager: sd_notify, in the lines that it takes (systemd's own packages are dead or bind libsystemd).

Protocol: https://www.freedesktop.org/software/systemd/man/sd_notify.html. It never raises: nobody listening is no trouble.
"""

from __future__ import annotations

import os
import socket
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_MOST = 300
"""Letters of a status; systemd shows one line."""


class Supervisor:
    """The socket in `$NOTIFY_SOCKET`, taken out of the environment so that no child talks to it."""

    def __init__(self) -> None:
        self._address = os.environ.pop("NOTIFY_SOCKET", "")
        usec = os.environ.pop("WATCHDOG_USEC", "")
        mine = os.environ.pop("WATCHDOG_PID", "") in ("", str(os.getpid()))
        self.watchdog = int(usec) / 1e6 if usec.isdigit() and mine else None
        """Seconds within which progress must be told; None without a watchdog."""
        self._status = ""

    def ready(self) -> None:
        """It is up."""
        self._tell("READY=1")

    @contextmanager
    def taking_long(self) -> Iterator[None]:
        """Something before `ready` may take long: ask for more time, again and again, from a thread."""
        over = threading.Event()

        def ask() -> None:
            while not over.is_set():
                self._tell("EXTEND_TIMEOUT_USEC=120000000")
                over.wait(30)

        asking = threading.Thread(target=ask, name="extend", daemon=True)
        asking.start()
        try:
            yield
        finally:
            over.set()
            asking.join()

    def reloading(self) -> None:
        """A reload begins; `ready` ends it."""
        self._tell("RELOADING=1")

    def stopping(self) -> None:
        """It is on its way out."""
        self._tell("STOPPING=1")

    def alive(self) -> None:
        """There was progress."""
        if self.watchdog is not None:
            self._tell("WATCHDOG=1")

    def status(self, text: str) -> None:
        """What it does now, told when it changed."""
        line = " ".join(text.split())[:_MOST]
        if line != self._status:
            self._status = line
            self._tell(f"STATUS={line}")

    def _tell(self, message: str) -> None:
        if not self._address:
            return
        address = f"\0{self._address[1:]}" if self._address.startswith("@") else self._address
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.setblocking(False)  # noqa: FBT003 - the library's own
            channel.sendto(message.encode(errors="replace"), address)
