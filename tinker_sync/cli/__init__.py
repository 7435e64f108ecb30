"""The command line: `app` has the commands, `remote` the account's, `render` and `progress` what is printed.

Imports stand inside functions where they cost: `--help` loads nothing but the command-line library.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from typing import NoReturn


def main() -> None:
    """Entry point of `tinker-sync`."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _exit_on_signal)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, PTH123 - for the life of the process
    # Importing libraries makes no garbage, but collecting it takes a fifth of a short command's time.
    gc.disable()
    from tinker_sync.cli.app import run  # noqa: PLC0415 - so that importing this package costs nothing

    sys.exit(run())


def _exit_on_signal(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)
