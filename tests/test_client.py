"""RestClient: every documented call, against the local server; and where the credential comes from."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tinker_sync.api import RestClient, open_rest_client
from tinker_sync.api.credentials import Credentials, CredentialSources
from tinker_sync.errors import BadIdentifier, BeingMade, CredentialMissing, CredentialRefused, NotFound
from tinker_sync.sandbox import Fault, Quirks, Sandbox
from tinker_sync.transport import ApiTransport

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def client(sandbox: Sandbox) -> AsyncIterator[RestClient]:
    """As a library user gets it."""
    async with open_rest_client(sandbox.base_url, sandbox.key, attempt_timeout=5) as made:
        yield made


async def test_every_documented_call(sandbox: Sandbox, client: RestClient) -> None:
    """All of the table in the API's description, under the documented names."""
    run = sandbox.account.add_run(lora_rank=16)
    path = str(sandbox.account.add(run, "000020").path)
    external = str(sandbox.account.add(run, "out", "external").path)
    assert (await client.list_user_checkpoints(limit=1, offset=0)).cursor.total_count == 2  # type: ignore[union-attr]
    assert len((await client.list_checkpoints(run)).checkpoints) == 2
    assert (await client.list_training_runs()).training_runs[0].training_run_id == run
    assert (await client.get_training_run(run)).lora_rank == 16
    assert (await client.get_training_run_by_tinker_path(path)).training_run_id == run
    assert (await client.get_weights_info_by_tinker_path(path)).base_model == "Qwen/Qwen3-8B"
    signed = await client.get_checkpoint_archive_url_from_tinker_path(path)
    assert signed.url.startswith(sandbox.storage_url)
    assert signed.expires is not None
    assert (await client.get_checkpoint_archive_url(run, "weights/000020")).url != signed.url
    urls = await client.get_external_weights_urls(external)
    assert sorted(urls.urls) == ["adapter_config.json", "adapter_model.safetensors"]
    await client.publish_checkpoint_from_tinker_path(path)
    assert (await client.list_checkpoints(run)).checkpoints[1].public
    await client.unpublish_checkpoint_from_tinker_path(path)
    await client.set_checkpoint_ttl_from_tinker_path(path, 3600)
    assert (await client.list_checkpoints(run)).checkpoints[1].expires_at is not None
    await client.set_checkpoint_ttl_from_tinker_path(path, None)
    assert (await client.list_checkpoints(run)).checkpoints[1].expires_at is None
    assert (await client.list_sessions()).sessions == []
    with pytest.raises(NotFound):
        await client.get_session("none")
    assert (await client.get_sampler("s:sample:0")).sampler_id == "s:sample:0"
    assert (await client.get_server_capabilities()).supported_models[0].model_name == "Qwen/Qwen3-8B"
    usage = await client.get_current_checkpoint_storage_usage()
    assert usage.effective_rate_usd_per_gigabyte_month == 0.31
    upload = await client.start_external_weights_upload("Qwen/Qwen3-8B", {"rank": 8})
    assert (await client.finish_external_weights_upload(upload.upload_id)).tinker_path.startswith("tinker://")
    await client.delete_checkpoint_from_tinker_path(path)
    await client.delete_checkpoint(run, "external_weights/out")
    with pytest.raises(NotFound):
        await client.delete_checkpoint_from_tinker_path(path)


async def test_answers_do_not_show_their_urls(sandbox: Sandbox, client: RestClient) -> None:
    """A signed URL in an object's repr would be in somebody's log."""
    path = str(sandbox.account.add(sandbox.account.add_run(), "a").path)
    signed = await client.get_checkpoint_archive_url_from_tinker_path(path)
    assert "X-Sig" not in repr(signed)
    assert "X-Sig" in signed.url


@pytest.mark.parametrize("status", [503, 425, 409])
async def test_an_archive_that_is_being_made_says_so_at_once(sandbox: Sandbox, client: RestClient, status: int) -> None:
    """All three statuses mean the same, and the transport does not wait for it."""
    path = str(sandbox.account.add(sandbox.account.add_run(), "a").path)
    sandbox.faults.append(Fault("archive", "status", status=status))
    with pytest.raises(BeingMade):
        await client.get_checkpoint_archive_url_from_tinker_path(path)
    assert sum(1 for _, raw in sandbox.requests if raw.endswith("/archive")) == 1


@pytest.mark.parametrize("seconds", [0, 3599, 10 * 365 * 86400 + 1, -1])
async def test_a_ttl_out_of_bounds_is_refused_here(client: RestClient, seconds: int) -> None:
    """One hour to ten years, or none."""
    with pytest.raises(BadIdentifier, match="3600"):
        await client.set_checkpoint_ttl_from_tinker_path("tinker://r/weights/a", seconds)


async def test_a_path_that_is_none_is_refused_here(client: RestClient) -> None:
    """In words, without asking."""
    with pytest.raises(BadIdentifier, match="three parts"):
        await client.get_weights_info_by_tinker_path("tinker://r/weights")


# Credentials


def jwt(**claims: Any) -> str:
    """An unsigned token."""
    parts = [{"alg": "none"}, claims]
    encoded = (base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts)
    return ".".join(encoded) + "."


async def header(sandbox: Sandbox, sources: CredentialSources) -> str:
    """What would be sent."""
    async with ApiTransport(sandbox.base_url, None, timeout=2) as transport:
        return (await Credentials(sources, transport, sdk_version="0").headers())["X-API-Key"]


async def test_sources_in_their_order(sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Explicit, environment, command, credentials.json; then words about what to set."""
    sandbox.quirks = Quirks(no_config_route=True)
    with pytest.raises(CredentialMissing, match="TINKER_API_KEY"):
        await header(sandbox, CredentialSources.from_environment())
    stored = Path.home() / ".tinker" / "credentials.json"
    stored.parent.mkdir()
    keys = {"7": {"type": "manual", "key": sandbox.key, "name": "n"}}
    stored.write_text(json.dumps({"version": 1, "default": "7", "keys": keys}))
    assert await header(sandbox, CredentialSources.from_environment()) == sandbox.key
    stored.write_text("{}")
    with pytest.raises(CredentialMissing, match="tinker auth login"):
        await header(sandbox, CredentialSources.from_environment())
    monkeypatch.setenv("TINKER_CREDENTIAL_CMD", f"echo ' {sandbox.key} '")
    assert await header(sandbox, CredentialSources.from_environment()) == sandbox.key
    monkeypatch.setenv("TINKER_CREDENTIAL_CMD", "echo s3cret >&2; exit 3")
    with pytest.raises(CredentialMissing, match="exit code 3") as caught:
        await header(sandbox, CredentialSources.from_environment())
    assert "s3cret" not in str(caught.value)
    monkeypatch.setenv("TINKER_API_KEY", sandbox.key)
    assert await header(sandbox, CredentialSources.from_environment()) == sandbox.key
    file = tmp_path / "key"
    file.write_text("two words")
    with pytest.raises(CredentialMissing, match="no credential") as caught:
        await header(sandbox, CredentialSources.from_environment(key_file=file))
    assert "two words" not in str(caught.value)
    with pytest.raises(CredentialMissing, match="cannot be read"):
        await header(sandbox, CredentialSources.from_environment(key_file=tmp_path / "none"))


async def test_a_jwt_is_exchanged_used_and_replaced_when_refused(sandbox: Sandbox) -> None:
    """The key goes to /client/config and /auth/token alone; a refused JWT is replaced, and the request replayed once."""
    sandbox.quirks.jwt = True
    async with ApiTransport(sandbox.base_url, None, timeout=5) as transport:
        credentials = Credentials(CredentialSources.from_environment(key=sandbox.key), transport, sdk_version="0")
        transport.use(credentials)
        client = RestClient(transport)
        await client.list_user_checkpoints()
        await client.list_user_checkpoints()
        assert [raw for _, raw in sandbox.requests].count("/api/v1/auth/token") == 1
        assert credentials.account == "user-sandbox"
        sandbox.expire_tokens()
        await client.list_user_checkpoints()
        assert [raw for _, raw in sandbox.requests].count("/api/v1/auth/token") == 2
        sandbox.key = "tml-changed"
        sandbox.expire_tokens()
        with pytest.raises(CredentialRefused):
            await client.list_user_checkpoints()


async def test_a_jwt_is_replaced_at_half_of_its_life(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before half: kept. After: another one; if that cannot be had, the old one works on."""
    sandbox.quirks.jwt = True
    now = time.time()
    monkeypatch.setattr("tinker_sync.api.credentials.time.time", lambda: now)
    async with ApiTransport(sandbox.base_url, None, timeout=1) as transport:
        credentials = Credentials(CredentialSources.from_environment(key=sandbox.key), transport, sdk_version="0")
        first = await credentials.headers()
        now += 1500
        assert await credentials.headers() == first
        now += 600
        sandbox.faults.append(Fault("any", "status", match="auth/token", status=400, times=1))
        assert await credentials.headers() == first
        now += 60
        assert await credentials.headers() != first


async def test_a_commands_credential_is_asked_for_again_when_it_ends(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A JWT from the command lives until its `exp`; a plain key until it is refused."""
    sandbox.quirks = Quirks(no_config_route=True)
    counter, output = tmp_path / "count", tmp_path / "out"
    counter.write_text("")
    output.write_text(jwt(exp=time.time() + 3600))
    sources = CredentialSources.from_environment(command=f"echo x >> {counter}; cat {output}")
    async with ApiTransport(sandbox.base_url, None, timeout=2) as transport:
        sandbox.key = output.read_text()
        credentials = Credentials(sources, transport, sdk_version="0")
        transport.use(credentials)
        for _ in range(3):
            await RestClient(transport).list_user_checkpoints()
        assert counter.read_text().count("x") == 1
        sandbox.key = "tml-new"
        output.write_text("tml-new")
        await RestClient(transport).list_user_checkpoints()
        assert counter.read_text().count("x") == 2


async def test_a_server_can_insist_on_the_command(sandbox: Sandbox) -> None:
    """`credential_default_source: credential_cmd`: a key alone does not do."""
    body = b'{"credential_default_source": "credential_cmd"}'
    sandbox.faults.append(Fault("any", "body", match="client/config", status=200, body=body))
    with pytest.raises(CredentialMissing, match="credential_cmd"):
        await header(sandbox, CredentialSources.from_environment(key=sandbox.key))
    sources = CredentialSources.from_environment(key=sandbox.key, command="echo tml-from-command")
    assert await header(sandbox, sources) == "tml-from-command"


async def test_a_rotated_key_file_is_read_again_when_the_exchange_refuses(sandbox: Sandbox, tmp_path: Path) -> None:
    """The key was changed on both sides: the next refusal finds the new one."""
    sandbox.quirks.jwt = True
    file = tmp_path / "key"
    file.write_text(sandbox.key)
    async with ApiTransport(sandbox.base_url, None, timeout=2) as transport:
        credentials = Credentials(CredentialSources.from_environment(key_file=file), transport, sdk_version="0")
        transport.use(credentials)
        await RestClient(transport).list_user_checkpoints()
        sandbox.key = "tml-rotated"
        sandbox.expire_tokens()
        file.write_text(sandbox.key)
        await RestClient(transport).list_user_checkpoints()


async def test_a_command_that_hangs_or_fails(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended with its children after its time; output beside a failure is no credential."""
    monkeypatch.setattr("tinker_sync.api.credentials._COMMAND_TIMEOUT", 0.5)
    begun = time.monotonic()
    with pytest.raises(CredentialMissing, match="nothing within"):
        await header(sandbox, CredentialSources.from_environment(command="sleep 30; echo x"))
    assert time.monotonic() - begun < 10
    with pytest.raises(CredentialMissing, match="exit code 1"):
        await header(sandbox, CredentialSources.from_environment(command="echo Unauthorized; exit 1"))


@pytest.mark.parametrize("claims", [{"exp": "soon"}, {"exp": None, "iat": None}, {"exp": float("nan")}, {"exp": True}])
async def test_a_jwt_with_odd_times_is_used_all_the_same(sandbox: Sandbox, claims: dict[str, Any]) -> None:
    """Times that are none count as absent."""
    token = jwt(**claims)
    body = json.dumps({"jwt": token}).encode()
    sandbox.quirks.jwt = True
    sandbox.faults.append(Fault("any", "body", match="auth/token", status=200, body=body))
    assert await header(sandbox, CredentialSources.from_environment(key=sandbox.key)) == token


async def test_cloudflare_headers_go_to_the_api_alone(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both variables become headers; the storage never sees them."""
    monkeypatch.setenv("CLOUDFLARE_ACCESS_CLIENT_ID", "cf-id")
    monkeypatch.setenv("CLOUDFLARE_ACCESS_CLIENT_SECRET", "cf-secret")
    from tinker_sync.api.client import access_headers

    assert access_headers() == {"CF-Access-Client-Id": "cf-id", "CF-Access-Client-Secret": "cf-secret"}
    monkeypatch.delenv("CLOUDFLARE_ACCESS_CLIENT_ID")
    assert access_headers() == {}
