"""`tinker-sync demo`: the product in half a minute, against the bundled server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

from tinker_sync.cli import plan, render, retain, work
from tinker_sync.config import FileSettings, Settings
from tinker_sync.sandbox import Fault, Payload, Sandbox, adapter
from tinker_sync.wiring import Silent

_PAUSE = 1.5


async def show(directory: Path | None, *, stay: bool) -> int:
    """Run the demo; returns 0 when everything that it shows came out as it says."""
    home = directory if directory is not None else Path(tempfile.mkdtemp(prefix="tinker-sync-demo-"))
    home.mkdir(parents=True, exist_ok=True)
    root = home.absolute() / "mirror"
    if root.exists():
        render.warn(f"tinker-sync: {root} is there already; name another --directory")
        return 2
    sandbox = Sandbox()
    async with sandbox.running():
        settings = _write_config(home, root, sandbox)
        good = await _scenes(sandbox, settings, home)
        if stay:
            await _stay(sandbox, home)
    return 0 if good else 1


def _write_config(home: Path, root: Path, sandbox: Sandbox) -> Settings:
    """The configuration is a file, so that every command can be tried on the demo's mirror afterwards."""
    key = home / "api-key"
    key.write_text(sandbox.key + "\n")
    key.chmod(0o600)
    (home / "config.toml").write_text(
        f'[tinker]\nbase_url = "{sandbox.base_url}"\napi_key_file = "{key}"\ntypes_apart = true\n\n'
        f'[mirror]\nroot = "{root}"\nmin_free = "0"\n\n[retention]\nmin_age = "1m"\n\n'
        '[[retention.remote]]\nname = "samplers"\ntypes = ["sampler"]\nkeep_last = 1\nkeep_names = ["best*"]\n'
    )
    return FileSettings(
        tinker={"base_url": sandbox.base_url, "api_key_file": str(key), "types_apart": True},
        mirror={"root": str(root), "min_free": 0},
        retention={
            "min_age": "1m",
            "remote": [{"name": "samplers", "types": ["sampler"], "keep_last": 1, "keep_names": ["best*"]}],
        },
    )


async def _scenes(sandbox: Sandbox, settings: Settings, home: Path) -> bool:
    account, now = sandbox.account, datetime.now(UTC)
    _say(f"1  A Tinker account, served on {sandbox.base_url.split('/services')[0]} by the bundled local server:")
    run = account.add_run(base_model="Qwen/Qwen3-8B", lora_rank=32)
    for step in (20, 40, 60):
        born = now - timedelta(minutes=70 - step)
        for kind in ("training", "sampler"):
            account.add(run, f"{step:06}", kind, time=born, ttl=timedelta(days=7), payload=_payload(step, kind))
    account.add(run, "final", "sampler", time=now - timedelta(minutes=2), payload=_payload(99, "sampler"))
    render.say("   one run, saved every 20 steps in both types with a TTL of 7 days, and a final sampler")
    await asyncio.sleep(_PAUSE)

    _say("2  tinker-sync sync: everything is copied, soonest to expire first, proven while it is written")
    good = await _sync(settings) == 0
    await asyncio.sleep(_PAUSE)

    _say("3  More checkpoints appear, one download is cut in the middle; the next sync copies only what is new")
    for step in (80, 100):
        account.add(run, f"{step:06}", "training", ttl=timedelta(days=7), payload=_payload(step, "training"))
    external = account.add(account.add_run(base_model="meta-llama/Llama-3.1-8B"), "export", "external")
    sandbox.faults.append(Fault("storage", "cut", times=1, match="weights/000100", at=200_000))
    render.say(f"   (an external checkpoint too, which comes file by file: {external.path.name})")
    good &= await _sync(settings) == 0
    await asyncio.sleep(_PAUSE)

    _say("4  A disk error: one byte of one replica changes behind our back")
    victim = _damage(settings.root)
    render.say(f"   {victim.relative_to(settings.root)}")
    good &= await work.verify(settings, [], Silent(), repair=False, as_json=False) == 1
    await asyncio.sleep(_PAUSE)

    _say("5  tinker-sync verify --repair: fetched again; only bytes equal to the manifest may take its place")
    good &= await work.verify(settings, [], Silent(), repair=True, as_json=False) == 0
    good &= await work.verify(settings, [], Silent(), repair=False, as_json=False) == 0
    await asyncio.sleep(_PAUSE)

    _say("6  tinker-sync plan: what the policies would let go upstream, and why; it changes nothing")
    good &= await plan.show(settings, as_json=False) == 0
    await asyncio.sleep(_PAUSE)

    _say("7  tinker-sync prune --apply: each only after its copy was read back; the journal has the proof")
    good &= await retain.prune(settings, apply=True, allow=None, as_json=False) == 0
    good &= retain.history(
        settings, paths=[], events=["delete.intent"], since=None, limit=3, check=False, as_json=False
    ) == 0  # fmt: skip
    good &= len(account.deleted) == 3
    await asyncio.sleep(_PAUSE)

    _say("8  What is on the disk: a replica's directory is its tinker path")
    _print_tree(settings.root)
    command = f"{sys.argv[0]} --config {home / 'config.toml'}"
    _say("Everything is in " + str(home))
    render.say(f"   try:  {command} status")
    render.say(f"         {command} ls")
    render.say(f"   remove it with:  rm -r {home}")
    if not good:
        render.warn("tinker-sync: the demo did not go as it should have; please report this")
    return good


def _payload(seed: int, kind: str) -> Payload:
    return adapter(seed, rank=32, hidden=512, layers=4, optimizer=kind == "training")


async def _sync(settings: Settings) -> int:
    return await work.sync(settings, Silent(), as_json=False)


def _damage(root: Path) -> Path:
    """Change one byte of one weights file, as a disk would."""
    files = sorted(path for path in root.rglob("adapter_model.safetensors") if not path.is_symlink())
    victim = random.Random(4).choice(files)  # noqa: S311 - any file will do
    with victim.open("r+b") as file:
        file.seek(victim.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0x01]))
    return victim


def _print_tree(root: Path, depth: int = 0) -> None:
    for path in sorted(root.iterdir()):
        if path.name == ".tinker-sync":
            continue
        label = f"{path.name} -> {path.readlink()}" if path.is_symlink() else path.name
        if path.is_symlink() or path.is_file():
            what = "" if path.is_symlink() else f"  {render.size(path.stat().st_size)}"
            render.say("   " + "  " * depth + label + what)
        elif depth < 2:
            render.say("   " + "  " * depth + label + "/")
            _print_tree(path, depth + 1)
        else:
            inside = sorted(item.name for item in path.iterdir())
            render.say("   " + "  " * depth + f"{label}/  {', '.join(inside)}")


async def _stay(sandbox: Sandbox, home: Path) -> None:
    _say("The server stays up until Ctrl-C. Let it do things:")
    control = sandbox.base_url + "/sandbox"
    render.say(f'   curl -d \'{{"name": "000120", "ttl_seconds": 14400}}\' {control}/checkpoints')
    render.say(f'   curl -d \'{{"where": "storage", "kind": "cut", "at": 1000, "times": 1}}\' {control}/faults')
    render.say(f"   {sys.argv[0]} --config {home / 'config.toml'} sync")
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.Event().wait()


def _say(text: str) -> None:
    render.say("")
    render.say(text)
