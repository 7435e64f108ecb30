"""Run inside the booted root by `scripts/systemd-test`: what the units promise, tried one by one."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from tinker_sync.sandbox import Sandbox, adapter

if TYPE_CHECKING:
    from collections.abc import Callable

UNIT = "tinker-sync.service"
STATE = Path("/var/lib/tinker-sync")
CONFIG = Path("/etc/tinker-sync/config.toml")
OTHER = Path("/home") / "other"
TOOL = "/opt/tinker-sync/bin/tinker-sync"
RUN = "39aa5eb2-e234-5a95-ab68-896e4cac8c45:train:0"
PATH = f"tinker://{RUN}/weights/000000"
results: list[bool] = []


def sh(*command: str, check: bool = False) -> subprocess.CompletedProcess[str]:
    """Run it."""
    return subprocess.run(command, capture_output=True, text=True, check=check)


def show(name: str) -> str:
    """A property of the unit."""
    return sh("systemctl", "show", "-P", name, UNIT).stdout.strip()


def until(what: Callable[[], object], seconds: float = 30) -> bool:
    """Wait for something to be so."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if what():
            return True
        time.sleep(0.2)
    return False


def report(name: str, good: object, detail: str = "") -> None:
    """One line for each promise."""
    results.append(bool(good))
    print(f"{'ok    ' if good else 'FAILED'} {name}{f' ({detail})' if detail else ''}", flush=True)


def serve() -> Sandbox:
    """The local server, in a thread."""
    sandbox, ready = Sandbox(), threading.Event()

    async def forever() -> None:
        async with sandbox.running():
            ready.set()
            await asyncio.Event().wait()

    threading.Thread(target=lambda: asyncio.run(forever()), daemon=True).start()
    assert ready.wait(20)
    return sandbox


def here() -> set[str]:
    """The replicas, by name."""
    return {path.name for path in STATE.glob("*/weights/*")}


def main() -> None:
    sandbox = serve()
    sandbox.account.add(RUN, "000000", payload=adapter(0), ttl=timedelta(days=7))
    CONFIG.parent.mkdir(parents=True, exist_ok=True)
    said = Path("/test/readme.out").read_text()
    followed = Path("/test/readme.code").read_text().strip() == "0"
    report("the README's lines, to the letter", followed, "" if followed else said[-600:])
    report("install-service says the next two commands", "systemctl enable --now tinker-sync" in said)
    report(
        "and leave a service that is up, and enabled",
        (show("ActiveState"), show("UnitFileState")) == ("active", "enabled"),
    )
    trouble = until(lambda: "in trouble" in show("StatusText"), 120)  # there is no network in here
    report("that says what is wrong", trouble, show("StatusText"))
    (CONFIG.parent / "api-key").write_text(sandbox.key)
    good = f'[tinker]\nbase_url = "{sandbox.base_url}"\n[mirror]\nmin_free = "0"\n[poll]\ninterval = "1s"\n'
    CONFIG.write_text(good)
    OTHER.mkdir(parents=True, exist_ok=True)
    (OTHER / "secret").write_text("not yours")
    drop = Path("/etc/systemd/system/tinker-sync.service.d")
    drop.mkdir(exist_ok=True)
    probe = (
        f"for f in /etc/x /var/lib/x /usr/x /home/x; do echo x > $f; done; cat {OTHER}/secret /etc/tinker-sync/api-key"
    )
    (drop / "probe.conf").write_text(
        f"[Service]\nWatchdogSec=8\nRestartSec=1\nExecStartPre=-/bin/sh -c '{probe} > %S/tinker-sync/seen 2>/dev/null; true'\n"
    )
    sh("systemctl", "daemon-reload", check=True)
    shutil.rmtree(STATE)  # the root is another account's now
    started = sh("systemctl", "restart", UNIT)
    report("becomes ready", started.returncode == 0 and show("ActiveState") == "active", started.stderr.strip())
    report("mirrors", until(lambda: here() == {"000000"}))
    report("says what it does", until(lambda: "listed" in show("StatusText")), show("StatusText"))
    report(
        "cannot write outside its state directory",
        not any(Path(p).exists() for p in ("/etc/x", "/var/lib/x", "/usr/x", "/home/x")),
    )
    seen = STATE / "seen"
    report("cannot see other people's files", seen.exists() and seen.read_text() == "")
    page = urllib.request.urlopen("http://127.0.0.1:9464/readyz", timeout=10).read().decode()
    report("shows how it is", '"ready": true' in page, page.strip())
    asked = sh("runuser", "-u", "tinker-sync", "--", TOOL, "--config", str(CONFIG), "--root", str(STATE), "fetch", PATH)
    report("is asked by its user", asked.returncode == 0 and "already here" in asked.stdout, asked.stderr.strip())
    asked = sh("runuser", "-u", "nobody", "--", TOOL, "--root", str(STATE), "fetch", PATH)
    report("and by nobody else", asked.returncode not in (0, 1), str(asked.returncode))
    report("runs as its own user", sh("stat", "-c", "%U", str(STATE / RUN)).stdout.strip() == "tinker-sync")

    pid = int(show("MainPID"))
    os.kill(pid, signal.SIGKILL)
    sandbox.account.add(RUN, "000001", payload=adapter(1))
    report("is restarted after kill -9", until(lambda: here() >= {"000001"} and show("MainPID") not in ("0", str(pid))))

    until(lambda: show("ActiveState") == "active")
    pid = int(show("MainPID"))
    os.kill(pid, signal.SIGSTOP)
    report("is killed by the watchdog when it hangs", until(lambda: show("MainPID") not in ("0", str(pid)), 40))
    report("and comes back", until(lambda: show("ActiveState") == "active"))

    time.sleep(12)
    report(
        "is left alone while it makes progress",
        show("ActiveState") == "active" and show("NRestarts") == "2",
        show("NRestarts"),
    )

    CONFIG.write_text(good.replace("interval", "intervall"))
    refused = sh("systemctl", "reload", UNIT)
    report("refuses a bad reload", refused.returncode != 0 and show("ActiveState") == "active")
    CONFIG.write_text(good.replace('"1s"', '"2s"'))
    report("reloads", sh("systemctl", "reload", UNIT).returncode == 0 and show("ActiveState") == "active")
    sandbox.account.add(RUN, "000002", payload=adapter(2))
    report("and goes on", until(lambda: "000002" in here()))

    begun = time.monotonic()
    sh("systemctl", "stop", UNIT)
    report("stops in time", time.monotonic() - begun < 10, f"{time.monotonic() - begun:.1f} s")
    report(
        "and counts as stopped, not failed",
        (show("ActiveState"), show("Result")) == ("inactive", "success"),
        show("Result"),
    )

    (CONFIG.parent / "config.toml").write_text("[mirrror]\n")
    sh("systemctl", "start", UNIT)
    time.sleep(4)
    report(
        "a wrong configuration is not tried again",
        show("ActiveState") == "failed" and show("NRestarts") == "0",
        show("NRestarts"),
    )
    CONFIG.write_text(good)
    sh("systemctl", "reset-failed", UNIT)
    once = sh("systemctl", "start", "tinker-sync-once.service")
    report("the oneshot does a pass", once.returncode == 0, once.stderr.strip())
    verified = sh("systemd-analyze", "security", "--no-pager", UNIT).stdout.strip().splitlines()
    found = re.search(r"level for .*: ([0-9.]+)", verified[-1]) if verified else None
    level = float(found.group(1)) if found else 9.9
    report("exposure is 1.6 or less", level <= 1.6, str(level))


try:
    main()
except BaseException:
    traceback.print_exc(file=sys.stdout)
    results.append(False)
    print(sh("journalctl", "--no-pager", "-n", "30", "-u", UNIT).stdout)
print(f"{sum(results)} passed, {results.count(False)} failed", flush=True)
os._exit(0)
