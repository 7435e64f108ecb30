"""`run` and `install-service`."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tinker_sync.cli import render
from tinker_sync.errors import FixFirst

if TYPE_CHECKING:
    from tinker_sync.config import Settings

_SYSTEM: Final = Path("/etc/systemd/system")
_SYSUSERS: Final = Path("/etc/sysusers.d")
_PROGRAM: Final = "/opt/tinker-sync/bin/tinker-sync"
_CONFIG: Final = "/etc/tinker-sync/config.toml"
_USER_CONFIG: Final = "%E/tinker-sync/config.toml"
UNITS: Final = ("tinker-sync.service", "tinker-sync@.service", "tinker-sync-once.service", "tinker-sync-once.timer")


async def run(settings: Settings, config: Path | None, root: Path | None) -> int:
    """Serve until cancelled."""
    from tinker_sync.daemon import service  # noqa: PLC0415
    from tinker_sync.daemon.supervisor import Supervisor  # noqa: PLC0415

    return await service.run(settings, config, root, Supervisor())


def install(config: Path | None, *, user: bool, directory: Path | None) -> int:
    """Write the units, with the paths of this installation in them. Raises FixFirst without the right to."""
    program = _program()
    where = directory or (
        Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "systemd" / "user" if user else _SYSTEM
    )
    names = ("tinker-sync-user.service",) if user else UNITS
    try:
        where.mkdir(parents=True, exist_ok=True)
        for name in names:
            text = (_templates() / name).read_text().replace(_PROGRAM, program)
            if config is not None:
                text = text.replace(_CONFIG, str(config.absolute())).replace(_USER_CONFIG, str(config.absolute()))
            target = where / name.replace("-user", "")
            target.write_text(text)
            render.say(f"wrote {target}")
        if not user:
            sysusers = (directory or _SYSUSERS) / "tinker-sync.conf"
            sysusers.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(_templates() / "tinker-sync.sysusers.conf", sysusers)
            render.say(f"wrote {sysusers}")
    except OSError as error:
        message = f"{error.filename}: {error.strerror}; run this as root, or use --user"
        raise FixFirst(message) from error
    if user:
        render.say("next:  put the key into ~/.config/tinker-sync/api-key (chmod 600)")
        render.say("       systemctl --user daemon-reload && systemctl --user enable --now tinker-sync")
    else:
        render.say("next:  put the key into /etc/tinker-sync/api-key (chmod 600, root)")
        render.say("       systemd-sysusers && systemctl daemon-reload && systemctl enable --now tinker-sync")
    return 0


def _program() -> str:
    """The command as the units must call it."""
    found = Path(sys.argv[0])
    if found.name == "tinker-sync" and found.exists():
        return str(found.absolute())
    return str(Path(sys.executable).with_name("tinker-sync"))


def _templates() -> Path:
    """In a wheel beside the package, in a checkout at the top."""
    packaged = Path(__file__).parents[1] / "units"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "systemd"
