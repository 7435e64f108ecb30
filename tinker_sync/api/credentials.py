"""Where the credential comes from, and its exchange for a JWT.

Sources, in order, as in the official SDK: an explicit key (or key file) and `$TINKER_API_KEY`; a command that prints a
fresh credential; `~/.tinker/credentials.json`, as written by `tinker auth login`. A server can ask for the credential
to be exchanged (`pjwt_auth_enabled`): the JWT is replaced at half of its life, and at once when it is refused.

A credential is a `SecretStr` from where it is read to the header that carries it, and never in a message.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import os
import random
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import SecretStr, ValidationError

from tinker_sync.api.wire import ClientFlags
from tinker_sync.errors import CredentialMissing, CredentialRefused, NotFound, NotServed, ProtocolBroken

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tinker_sync.transport import Answer, ApiTransport

HEADER: Final = "X-API-Key"
_COMMAND_TIMEOUT: Final = 60.0
_SPARE: Final = 60.0
"""A JWT with less to live than this, in seconds, is not used any more."""


@dataclass(frozen=True, slots=True)
class CredentialSources:
    """Everywhere a credential may come from; None or empty where a source is not set."""

    key: SecretStr | None = None
    key_file: Path | None = None
    command: str | None = None
    credentials_file: Path | None = None

    @classmethod
    def from_environment(
        cls, *, key: str | None = None, key_file: Path | None = None, command: str | None = None
    ) -> CredentialSources:
        """What was given explicitly, then what the environment has."""
        environment_key = os.environ.get("TINKER_API_KEY", "").strip()
        chosen = key or (environment_key if key_file is None else None)
        return cls(
            key=SecretStr(chosen) if chosen else None,
            key_file=key_file,
            command=command or os.environ.get("TINKER_CREDENTIAL_CMD") or None,
            credentials_file=Path.home() / ".tinker" / "credentials.json",
        )

    def describe(self) -> str:
        """Which source counts, without the secret."""
        if self.key is not None:
            return "the key that was given, or $TINKER_API_KEY"
        if self.key_file is not None:
            return f"the key file {self.key_file}"
        if self.command is not None:
            return "the credential command"
        return f"{self.credentials_file}"


class Credentials:
    """A `transport.Authorizer`. Not thread-safe; one per event loop."""

    def __init__(self, sources: CredentialSources, transport: ApiTransport, *, sdk_version: str) -> None:
        self._sources = sources
        self._transport = transport
        self._sdk_version = sdk_version
        self._raw: SecretStr | None = None
        self._flags: ClientFlags | None = None
        self._jwt: SecretStr | None = None
        self._replace_at = 0.0
        self._jwt_ends = 0.0
        self._turn = asyncio.Lock()
        self.account: str | None = None
        """Whose credential it is, where a JWT told."""

    @property
    def sources(self) -> CredentialSources:
        """Where it comes from."""
        return self._sources

    def stamp(self) -> int | None:
        """Another number when the file that the credential comes from was changed; None where there is none."""
        sources = self._sources
        path = sources.key_file or sources.credentials_file
        if sources.key is not None or path is None or (sources.key_file is None and sources.command is not None):
            return None
        try:
            return path.stat().st_mtime_ns
        except OSError:
            return None

    def forget(self) -> None:
        """Read the credential again at the next call."""
        self._raw = self._jwt = None

    async def headers(self) -> Mapping[str, str]:
        """The header that authorises. Raises CredentialMissing, CredentialRefused, ServiceTrouble."""
        async with self._turn:
            return {HEADER: (await self._current()).get_secret_value()}

    async def renew(self, used: Mapping[str, str], challenge: str) -> bool:
        """After a 401: get another one, and say whether it differs from what was used."""
        async with self._turn:
            if self._jwt is not None:
                if 'error="invalid_token"' not in challenge:
                    return False
                if self._jwt.get_secret_value() == used.get(HEADER):
                    self._jwt = None
            else:
                self._raw = None
            return (await self._current()).get_secret_value() != used.get(HEADER)

    async def _current(self) -> SecretStr:
        now = time.time()
        if self._raw is not None and _expiry(self._raw) - _SPARE < now:
            self._raw = None
        if self._raw is None:
            self._raw = await self._read()
            self._note_account(self._raw)
        if self._flags is None:
            self._flags = await self._ask_flags(self._raw)
            if self._flags.credential_default_source == "credential_cmd":
                self._raw = await self._read()  # the source that was just used may not count
        if not self._flags.pjwt_auth_enabled:
            return self._raw
        if self._jwt is None or now >= self._jwt_ends - _SPARE:
            self._jwt = await self._exchange()
        elif now >= self._replace_at:
            self._jwt = await self._exchange_or_keep(self._jwt)
        return self._jwt

    async def _read(self) -> SecretStr:
        """The credential of the source that counts, by the server's flags where they are known."""
        command_only = self._flags is not None and self._flags.credential_default_source == "credential_cmd"
        if command_only and not (self._raw is not None and _is_jwt(self._raw)):
            return await self._only_command()
        sources = self._sources
        if sources.key is not None:
            return _clean(sources.key.get_secret_value(), sources.describe())
        if sources.key_file is not None:
            return _clean(await asyncio.to_thread(_read_text, sources.key_file), f"the key file {sources.key_file}")
        if sources.command is not None:
            return await self._run_command(sources.command)
        if sources.credentials_file is not None:
            found = await asyncio.to_thread(_default_of, sources.credentials_file)
            if found is not None:
                return _clean(found, f"{sources.credentials_file}")
        message = (
            "no Tinker credential: set $TINKER_API_KEY, or [tinker] api_key_file or credential_cmd in the "
            "configuration, or run `tinker auth login`"
        )
        raise CredentialMissing(message)

    async def _only_command(self) -> SecretStr:
        if self._sources.command is None:
            message = (
                "this server accepts only a credential command's credential: "
                "set [tinker] credential_cmd or $TINKER_CREDENTIAL_CMD"
            )
            raise CredentialMissing(message)
        return await self._run_command(self._sources.command)

    async def _run_command(self, command: str) -> SecretStr:
        process = await asyncio.create_subprocess_shell(
            command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(_COMMAND_TIMEOUT):
                output, _ = await process.communicate()
        except TimeoutError as error:
            message = f"the credential command gave nothing within {_COMMAND_TIMEOUT:.0f} s: try it in a shell"
            raise CredentialMissing(message) from error
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # the shell's children hold the pipe
                with suppress(TimeoutError):
                    async with asyncio.timeout(5):
                        await process.wait()
        if process.returncode != 0:
            message = f"the credential command failed with exit code {process.returncode}: try it in a shell"
            raise CredentialMissing(message)
        return _clean(output.decode(errors="replace"), "the credential command's output")

    async def _ask_flags(self, raw: SecretStr) -> ClientFlags:
        """`/client/config`; a server without this route has no flags."""
        try:
            answer = await self._transport.call(
                "POST",
                ("api", "v1", "client", "config"),
                body={"sdk_version": self._sdk_version},
                authorized=False,
                headers={HEADER: raw.get_secret_value()},
            )
            return ClientFlags.model_validate(answer.json())
        except (NotFound, NotServed):
            return ClientFlags()
        except ValidationError as error:
            message = "the service's client configuration is not the API's: is [tinker] base_url right?"
            raise ProtocolBroken(message) from error

    async def _exchange(self) -> SecretStr:
        """A JWT for the credential; one that is refused is read once more, since files and commands change."""
        used = self._raw if self._raw is not None else await self._read()
        try:
            answer = await self._ask_token(used)
        except CredentialRefused:
            self._raw = None
            fresh = await self._read()
            if fresh == used:
                raise
            answer = await self._ask_token(fresh)
            used = fresh
        self._raw = used
        token = answer.json().get("jwt") if isinstance(answer.json(), dict) else None
        if not isinstance(token, str) or not token or not token.isascii() or not token.isprintable():
            message = "the service gave no JWT for the credential"
            raise ProtocolBroken(message)
        secret = SecretStr(token)
        claims, now = _claims(secret), time.time()
        ends = _number(claims.get("exp"), now + 120)
        begins = _number(claims.get("iat"), now)
        spread = 0.45 + random.random() / 10  # noqa: S311 - spreading load, not a secret
        self._replace_at = now + max(ends - begins, 0.0) * spread
        self._jwt_ends = max(ends, self._replace_at)
        self._note_account(secret)
        return secret

    async def _ask_token(self, raw: SecretStr) -> Answer:
        return await self._transport.call(
            "POST",
            ("api", "v1", "auth", "token"),
            body={},
            authorized=False,
            headers={HEADER: raw.get_secret_value()},
        )

    async def _exchange_or_keep(self, current: SecretStr) -> SecretStr:
        """Early replacement: while the old one lives, a failure is no trouble yet."""
        try:
            return await self._exchange()
        except CredentialRefused:
            raise
        except Exception:  # noqa: BLE001 - whatever it is, the JWT in hand still works; asked again next time
            self._replace_at = time.time() + 15
            return current

    def _note_account(self, secret: SecretStr) -> None:
        subject = _claims(secret).get("sub")
        if isinstance(subject, str) and subject:
            self.account = subject


def _clean(text: str, whence: str) -> SecretStr:
    stripped = text.strip()
    if not stripped:
        message = f"{whence} is empty"
        raise CredentialMissing(message)
    if not stripped.isascii() or any(character.isspace() or not character.isprintable() for character in stripped):
        message = f"{whence} holds no credential: a Tinker key is one word that starts with tml-"
        raise CredentialMissing(message)
    return SecretStr(stripped)


def _read_text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            message = f"the key file {path} is no regular file"
            raise CredentialMissing(message)
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        message = f"the key file {path} cannot be read: {reason}"
        raise CredentialMissing(message) from error


def _default_of(path: Path) -> str | None:
    """The default key of `credentials.json`; None where there is no such file."""
    if not path.exists():
        return None
    try:
        document = json.loads(_read_text(path))
        return str(document["keys"][document["default"]]["key"])
    except (ValueError, KeyError, TypeError) as error:
        message = f"{path} has no default key: run `tinker auth login` again"
        raise CredentialMissing(message) from error


def _is_jwt(secret: SecretStr) -> bool:
    return secret.get_secret_value().startswith("eyJ")


def _expiry(secret: SecretStr) -> float:
    return _number(_claims(secret).get("exp"), float("inf"))


def _number(claim: object, otherwise: float) -> float:
    """A claim that should be a time; anything else counts as not there."""
    if isinstance(claim, bool) or not isinstance(claim, int | float):
        return otherwise
    return float(claim) if 0 <= claim < 1e12 else otherwise


def _claims(secret: SecretStr) -> Mapping[str, Any]:
    """A JWT's claims, unverified: only for its times and its subject."""
    if not _is_jwt(secret):
        return {}
    try:
        part = secret.get_secret_value().split(".")[1]
        document = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    except (IndexError, ValueError, binascii.Error):
        return {}
    return document if isinstance(document, dict) else {}
