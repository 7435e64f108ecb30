"""The official SDK and its command drive the local server, so that the server is the API's and not merely ours.

Needs two virtual environments: `scripts/interop` makes them and runs this.
"""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Site, run
from tests.test_cli import site  # noqa: F401 - the fixture: a sandbox beside the test
from tinker_sync.sandbox import adapter

pytestmark = [pytest.mark.interop, pytest.mark.timeout(180)]
RUN = "39aa5eb2-e234-5a95-ab68-896e4cac8c45:train:0"


def environment(version: str) -> Path:
    """The virtual environment with that SDK."""
    return Path(os.environ[f"INTEROP_SDK_{version}"])


def sdk(version: str, site: Site, code: str) -> Any:  # noqa: F811
    """Run code against the local server; it prints one JSON document."""
    program = f"import json, tinker\nclient = tinker.ServiceClient().create_rest_client()\n{code}"
    done = subprocess.run(
        [environment(version) / "bin" / "python", "-W", "ignore", "-c", program],
        capture_output=True, text=True, timeout=120, check=False, env=variables(site),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def cli(version: str, site: Site, *arguments: str, cwd: Path | None = None) -> str:  # noqa: F811
    """Run the SDK's own command."""
    done = subprocess.run(
        [environment(version) / "bin" / "tinker", "-f", "json", *arguments],
        capture_output=True, text=True, timeout=120, check=False, env=variables(site), cwd=cwd,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def variables(site: Site) -> dict[str, str]:  # noqa: F811
    """Where the SDK finds the server."""
    return {
        **os.environ,
        "TINKER_BASE_URL": site.sandbox.base_url,
        "TINKER_API_KEY": site.sandbox.key,
        "TINKER_TELEMETRY": "0",
    }


def fill(site: Site) -> dict[str, str]:  # noqa: F811
    """One of each type."""
    site.sandbox.account.add_run(RUN, lora_rank=16)
    return {
        kind: str(site.sandbox.account.add(RUN, f"{kind}-1", kind, payload=payload).path)
        for kind, payload in (
            ("training", adapter(1, optimizer=True)),
            ("sampler", adapter(2)),
            ("external", adapter(3, marker=False)),
        )
    }


@pytest.mark.parametrize("version", ["35", "38"])
@pytest.mark.parametrize("jwt", [False, True])
def test_the_sdks_rest_client(site: Site, version: str, jwt: bool) -> None:  # noqa: F811
    """Every documented call that both SDKs have, parsed by their models, with and without the JWT exchange."""
    site.sandbox.quirks.jwt = jwt
    paths = fill(site)
    got = sdk(
        version,
        site,
        f"""
training, sampler, external = {paths["training"]!r}, {paths["sampler"]!r}, {paths["external"]!r}
page = client.list_user_checkpoints(limit=2, offset=0).result()
run = client.get_training_run_by_tinker_path(training).result()
info = client.get_weights_info_by_tinker_path(training).result()
urls = client.get_external_weights_urls(external).result()
client.publish_checkpoint_from_tinker_path(sampler).result()
client.unpublish_checkpoint_from_tinker_path(sampler).result()
client.set_checkpoint_ttl_from_tinker_path(training, 7200).result()
row = [c for c in client.list_checkpoints({RUN!r}).result().checkpoints if c.tinker_path == training][0]
usage = client.get_current_checkpoint_storage_usage if hasattr(client, "get_current_checkpoint_storage_usage") else None
client.delete_checkpoint_from_tinker_path(sampler).result()
runs = client.list_training_runs().result()
sessions = client.list_sessions().result()
print(json.dumps({{
    "total": page.cursor.total_count, "rank": run.lora_rank, "base": info.base_model, "files": sorted(urls.urls),
    "expires": row.expires_at is not None, "runs": len(runs.training_runs), "sessions": sessions.sessions,
}}))
""",
    )
    assert got == {
        "total": 3, "rank": 16, "base": "Qwen/Qwen3-8B",
        "files": ["adapter_config.json", "adapter_model.safetensors"], "expires": True, "runs": 1, "sessions": [],
    }  # fmt: skip
    assert [str(path) for path in site.sandbox.account.deleted] == [paths["sampler"]]


@pytest.mark.parametrize("archive_json", [False, True])
def test_the_same_archive_is_byte_identical(site: Site, tmp_path: Path, archive_json: bool) -> None:  # noqa: F811
    """What the SDK's URL brings, unpacked by tarfile, is what our replica holds."""
    site.sandbox.quirks.archive_json = archive_json
    paths = fill(site)
    code = f"print(json.dumps(client.get_checkpoint_archive_url_from_tinker_path({paths['training']!r}).result().url))"
    url = sdk("35", site, code)
    with urllib.request.urlopen(url, timeout=20) as answer:  # noqa: S310 - loopback
        archive = answer.read()
    site.sandbox.quirks.archive_json = False
    run(["--config", str(site.write_config()), "sync"], check=0)
    kept = tmp_path / "archive.tar"
    kept.write_bytes(archive)
    with tarfile.open(kept) as tar:
        theirs = {entry.name: tar.extractfile(entry).read() for entry in tar if entry.isfile()}  # type: ignore[union-attr]
    assert theirs == site.payload(paths["training"])


@pytest.mark.parametrize(("version", "kind"), [("35", "training"), ("35", "sampler"), ("38", "external")])
def test_the_sdks_command_lists_downloads_deletes(site: Site, tmp_path: Path, version: str, kind: str) -> None:  # noqa: F811
    """`tinker checkpoint list|download|delete` against the local server; its download equals our replica."""
    paths = fill(site)
    listed = json.loads(cli(version, site, "checkpoint", "list", "--limit", "0"))
    assert {row["tinker_path"] for row in listed["checkpoints"]} == set(paths.values())
    out = tmp_path / "theirs"
    out.mkdir()
    report = json.loads(cli(version, site, "checkpoint", "download", paths[kind], "-o", str(out)))
    base = Path(report["destination"])
    theirs = {str(path.relative_to(base)): path.read_bytes() for path in base.rglob("*") if path.is_file()}
    run(["--config", str(site.write_config()), "sync"], check=0)
    assert theirs == site.payload(paths[kind])
    deleted = json.loads(cli(version, site, "checkpoint", "delete", "--yes", paths[kind]).splitlines()[-1])
    assert deleted == {"deleted_count": 1, "failed": []}
    assert [str(path) for path in site.sandbox.account.deleted] == [paths[kind]]


def test_the_sdks_export_of_a_training_checkpoint(site: Site, tmp_path: Path) -> None:  # noqa: F811
    """0.38 downloads a training checkpoint by exporting it: session, load, save, sign, fetch, delete."""
    paths = fill(site)
    report = json.loads(cli("38", site, "checkpoint", "download", paths["training"], "-o", str(tmp_path)))
    names = sorted(path.name for path in Path(report["destination"]).iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    assert len(site.sandbox.account.deleted) == 1, "the export is deleted again"
