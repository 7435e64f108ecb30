"""The command line: `app` has the commands, `remote` the account's, `render` and `progress` what is printed.

Imports stand inside functions where they cost: `--help` loads nothing but the command-line library.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of `tinker-sync`."""
    from tinker_sync.cli.app import run  # noqa: PLC0415 - so that importing this package costs nothing

    sys.exit(run())
