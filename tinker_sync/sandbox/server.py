"""The API and the storage on two loopback ports, with the calls that the official SDK makes when it opens."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import json
import re
import secrets
import socket
import struct
import time as clock
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote

from aiohttp import web

from tinker_sync.model.moments import rfc3339, to_micros
from tinker_sync.model.paths import TYPE_OF_SEGMENT, PathInvalid, TinkerPath
from tinker_sync.sandbox.account import SandboxAccount, SandboxCheckpoint
from tinker_sync.sandbox.adapters import Payload, PayloadFile, adapter
from tinker_sync.sandbox.faults import Fault, Quirks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tinker_sync.sandbox.faults import Where

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
DEMO_KEY = "tml-sandbox-key"
_PREFIX = "/services/tinker-sandbox"


class Sandbox:
    """One server. Use `running()`; `base_url` and `key` are what a client needs."""

    def __init__(
        self, account: SandboxAccount | None = None, *, key: str = DEMO_KEY, quirks: Quirks | None = None
    ) -> None:
        self.account = account or SandboxAccount()
        self.key = key
        self.quirks = quirks or Quirks()
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        """(method, raw path below the prefix) of every API request."""
        self.storage_requests: list[dict[str, str]] = []
        """Headers of every storage request, names in lower case."""
        self.sent_bytes = 0
        """Of checkpoints, by the storage."""
        self.on_page: Callable[[int], None] = lambda _: None
        """Called with the offset before a page is made, to let the account change on the way."""
        self.base_url = ""
        self.storage_url = ""
        self._objects: dict[str, tuple[SandboxCheckpoint, PayloadFile | None, float]] = {}
        self._futures: dict[str, dict[str, Any]] = {}
        self._models: dict[str, TinkerPath] = {}
        self._sessions: dict[str, list[str]] = {}
        self._uploads: dict[str, dict[str, Any]] = {}
        self._jwts: set[str] = set()

    @asynccontextmanager
    async def running(self, port: int = 0, storage_port: int = 0) -> AsyncIterator[Sandbox]:
        """Serve on 127.0.0.1, on ports that the system chooses unless they are named."""
        runners = []
        try:
            for handler, wanted in ((self._api, port), (self._storage, storage_port)):
                app = web.Application(client_max_size=1 << 30)
                app.on_response_prepare.append(self._date)
                app.router.add_route("*", r"/{rest:[\s\S]*}", _unless_left(handler))
                runner = web.AppRunner(
                    app, access_log=None, handle_signals=False, handler_cancellation=True, shutdown_timeout=0.05
                )
                runners.append(runner)
                await runner.setup()
                await web.TCPSite(runner, "127.0.0.1", wanted).start()
            self.base_url = f"http://127.0.0.1:{runners[0].addresses[0][1]}{_PREFIX}"
            self.storage_url = f"http://127.0.0.1:{runners[1].addresses[0][1]}"
            yield self
        finally:
            for runner in runners:
                await runner.cleanup()

    async def _date(self, _: web.Request, response: web.StreamResponse) -> None:
        """Answers are dated by the account's clock."""
        response.headers["Date"] = format_datetime(
            self.account.now().astimezone(UTC).replace(microsecond=0), usegmt=True
        )

    def _fault(self, where: Where, subject: str) -> Fault | None:
        return next((fault for fault in self.faults if fault.applies(where, subject)), None)

    # The API

    async def _api(self, request: web.Request) -> web.StreamResponse:
        raw, _, query = request.raw_path.partition("?")
        raw = raw.removeprefix(_PREFIX)
        parts = [unquote(part) for part in raw.strip("/").split("/")]
        self.requests.append((request.method, raw))
        if parts[0] == "sandbox":
            return await self._control(request, parts[1:])
        if parts[0] == "hop":
            return web.Response(status=302, headers={"Location": f"{self.storage_url}/{parts[1]}?{query}"})
        if parts[:2] != ["api", "v1"]:
            return _problem(404, "Not Found")
        parts = parts[2:]
        subject = "/".join(parts)
        fault = self._fault("any", subject)
        if fault is not None:
            return await self._spoil(request, fault)
        if not self._authorised(request, parts):
            return _problem(401, "Invalid API key", {"WWW-Authenticate": 'Bearer error="invalid_token"'})
        body: Any = None
        if request.can_read_body:
            try:
                body = await request.json()
            except ValueError:
                return _problem(400, "body is no JSON")
        values = {name: items[-1] for name, items in parse_qs(query).items()}
        return await self._route(request, request.method, parts, values, body or {})

    def _authorised(self, request: web.Request, parts: list[str]) -> bool:
        given = request.headers.get("X-API-Key", "")
        if not self.quirks.jwt or parts in (["client", "config"], ["auth", "token"]):
            return given == self.key
        return given in self._jwts

    async def _route(
        self, request: web.Request, method: str, parts: list[str], values: dict[str, str], body: dict[str, Any]
    ) -> web.StreamResponse:
        match method, parts:
            case "GET", ["checkpoints"]:
                return await self._list_user(request, values)
            case "GET", ["training_runs"]:
                return self._list_runs(values)
            case "GET", ["training_runs", run]:
                found = self.account.runs.get(run)
                return (
                    web.json_response(self._run_json(found.training_run_id)) if found else _problem(404, "no such run")
                )
            case "GET", ["training_runs", run, "checkpoints"]:
                return self._list_run(run)
            case _, ["training_runs", run, "checkpoints", *rest]:
                return await self._checkpoint(request, method, run, rest, body)
            case "POST", ["weights_info"]:
                return self._weights_info(body)
            case _:
                return self._other(method, parts, values, body)

    def _other(self, method: str, parts: list[str], values: dict[str, str], body: dict[str, Any]) -> web.StreamResponse:
        match method, parts:
            case "POST", ["client", "config"]:
                if self.quirks.no_config_route:
                    return _problem(404, "Not Found")
                return web.json_response(
                    {
                        "pjwt_auth_enabled": self.quirks.jwt,
                        "credential_default_source": "api_key",
                        "use_pyqwest_transport": False,
                    }
                )
            case "POST", ["client", "dynamic_config"]:
                return web.json_response({"refresh_interval_sec": 300})
            case "POST", ["auth", "token"]:
                return web.json_response({"jwt": self._issue()})
            case "GET", ["healthz"]:
                return web.json_response({"status": "ok"})
            case "GET", ["get_server_capabilities"]:
                models = sorted({run.base_model for run in self.account.runs.values()} or {"Qwen/Qwen3-8B"})
                rows = [
                    {"model_name": name, "max_context_length": 32768, "trainable": True, "sampleable": True}
                    for name in models
                ]
                return web.json_response({"supported_models": rows})
            case "GET", ["billing", "usage", "checkpoints", "current"]:
                return self._usage()
            case "POST", ["telemetry"]:
                return web.json_response({"status": "accepted"})
            case "GET", ["samplers", sampler]:
                return web.json_response({"sampler_id": sampler, "base_model": "Qwen/Qwen3-8B", "model_path": None})
            case _:
                return self._sessions_and_futures(method, parts, values, body)

    def _sessions_and_futures(
        self, method: str, parts: list[str], values: dict[str, str], body: dict[str, Any]
    ) -> web.StreamResponse:
        match method, parts:
            case "POST", ["create_session"]:
                session = str(_uuid())
                self._sessions[session] = []
                return web.json_response({"session_id": session, "type": "create_session"})
            case "POST", ["session_heartbeat"] | ["sessions", _, "finish"]:
                return web.json_response({})
            case "GET", ["sessions"]:
                known = list(self._sessions)
                start = int(values.get("offset", "0"))
                return web.json_response({"sessions": known[start : start + int(values.get("limit", "20"))]})
            case "GET", ["sessions", session]:
                if session not in self._sessions:
                    return _problem(404, "no such session")
                return web.json_response({"training_run_ids": self._sessions[session], "sampler_ids": []})
            case "POST", ["load_weights"]:
                return self._load_weights(body)
            case "POST", ["get_info"]:
                model = body.get("model_id", "")
                return web.json_response({"model_data": {"model_name": "Qwen/Qwen3-8B"}, "model_id": model})
            case "POST", ["save_weights_external"]:
                return self._save_external(body)
            case "POST", ["retrieve_future"]:
                return web.json_response(
                    self._futures.get(body.get("request_id", ""), {"error": "unknown", "category": "user"})
                )
            case "POST", ["external_weights_upload_start"]:
                return self._upload_start(body)
            case "POST", ["external_weights_upload_finish"]:
                return self._upload_finish(body)
            case _:
                return _problem(404, "Not Found")

    def _issue(self) -> str:
        now = int(clock.time())
        claims = {
            "sub": "user-sandbox",
            "org_id": "org-sandbox",
            "iat": now,
            "exp": now + 3600,
            "n": secrets.token_hex(4),
        }
        parts = [{"alg": "none", "typ": "JWT"}, claims]
        token = (
            ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts) + "."
        )
        self._jwts.add(token)
        return token

    def expire_tokens(self) -> None:
        """Every JWT that was issued is refused from now on."""
        self._jwts.clear()

    def _checkpoint_json(self, checkpoint: SandboxCheckpoint) -> dict[str, Any]:
        path, quirks = checkpoint.path, self.quirks
        moment = rfc3339(checkpoint.time)
        row: dict[str, Any] = {
            "checkpoint_id": path.name if quirks.bare_ids else path.checkpoint_id,
            "checkpoint_type": TYPE_OF_SEGMENT.get(path.segment, path.segment),
            "time": moment.rstrip("Z") if quirks.naive_times else moment,
            "tinker_path": str(path),
            "size_bytes": checkpoint.size_bytes,
            "public": checkpoint.public,
            "user_metadata": checkpoint.user_metadata,
            "expires_at": None if checkpoint.expires_at is None else rfc3339(checkpoint.expires_at),
            "a_field_of_tomorrow": {"tolerate": "me"},
        }
        if quirks.no_sizes:
            for name in ("size_bytes", "public", "expires_at"):
                del row[name]
        return row

    def _run_json(self, run_id: str) -> dict[str, Any]:
        run = self.account.runs[run_id]
        return {
            "training_run_id": run.training_run_id,
            "base_model": run.base_model,
            "model_owner": "user-sandbox",
            "is_lora": True,
            "corrupted": False,
            "lora_rank": run.lora_rank,
            "last_request_time": rfc3339(run.last_request_time),
            "last_checkpoint": None,
            "last_sampler_checkpoint": None,
            "user_metadata": run.user_metadata,
        }

    async def _list_user(self, request: web.Request, values: dict[str, str]) -> web.StreamResponse:
        if self.quirks.no_user_listing:
            return _problem(404, "Not Found")
        limit, offset = int(values.get("limit", "100")), int(values.get("offset", "0"))
        self.on_page(offset)
        fault = self._fault("list", f"offset={offset};")
        if fault is not None:
            return await self._spoil(request, fault)
        rows = self.account.living()
        if self.quirks.training_only_listing:
            rows = [row for row in rows if row.path.segment == "weights"]
        page = rows[offset : offset + min(limit, self.quirks.page_cap)]
        document: dict[str, Any] = {"checkpoints": [self._checkpoint_json(row) for row in page]}
        if not self.quirks.no_cursor:
            document["cursor"] = {"offset": offset, "limit": limit, "total_count": len(rows)}
        return web.json_response(document)

    def _list_runs(self, values: dict[str, str]) -> web.StreamResponse:
        limit, offset = int(values.get("limit", "20")), int(values.get("offset", "0"))
        runs = list(self.account.runs)
        rows = [self._run_json(run) for run in runs[offset : offset + limit]]
        cursor = {"offset": offset, "limit": limit, "total_count": len(runs)}
        return web.json_response({"training_runs": rows, "cursor": cursor})

    def _list_run(self, run: str) -> web.StreamResponse:
        if run not in self.account.runs:
            return _problem(404, "no such run")
        fault = self._fault("run", run)
        if fault is not None:
            return _problem(fault.status, "told to fail")
        rows = [row for row in self.account.living() if row.path.run_id == run]
        return web.json_response({"checkpoints": [self._checkpoint_json(row) for row in rows], "cursor": None})

    def _weights_info(self, body: dict[str, Any]) -> web.StreamResponse:
        try:
            path = TinkerPath.parse(str(body.get("tinker_path")))
        except PathInvalid as error:
            return _problem(400, str(error))
        run = self.account.runs.get(path.run_id)
        if self.account.find(path) is None or run is None:
            return _problem(404, "no such checkpoint")
        return web.json_response(
            {
                "base_model": run.base_model,
                "is_lora": True,
                "lora_rank": run.lora_rank,
                "train_unembed": False,
                "train_mlp": True,
                "train_attn": True,
            }
        )

    def _usage(self) -> web.StreamResponse:
        total = sum(row.size_bytes or 0 for row in self.account.living())
        gigabytes = total / 1e9
        row = {
            "project_id": "project-sandbox",
            "user_email": "you@example.org",
            "checkpoint_count": len(self.account.checkpoints),
            "size_bytes": total,
            "size_gigabytes": gigabytes,
            "estimated_monthly_cost_usd": round(gigabytes * 0.31, 4),
        }
        return web.json_response({"effective_rate_usd_per_gigabyte_month": 0.31, "data": [row]})

    async def _checkpoint(
        self, request: web.Request, method: str, run: str, rest: list[str], body: dict[str, Any]
    ) -> web.StreamResponse:
        action = rest[-1] if rest and rest[-1] in ("archive", "publish", "ttl", "external_weights_urls") else ""
        identity = rest[:-1] if action else rest
        checkpoint = self._named(run, identity, for_archive=action == "archive")
        subject = f"{run}/{'/'.join(identity)}"
        where: dict[str, Where] = {
            "archive": "archive",
            "external_weights_urls": "urls",
            "": "delete",
            "ttl": "ttl",
        }
        fault = self._fault(where[action], subject) if action in where else None
        if fault is not None:
            return await self._spoil(request, fault)
        if action == "archive" and self.quirks.no_archives:
            return _problem(self.quirks.no_archives, "checkpoint archives are no longer offered")
        if checkpoint is not None and checkpoint.destroyed:
            return _problem(500, "its files are gone")
        if checkpoint is None:
            return _problem(405 if self.quirks.bare_ids and len(identity) == 2 else 404, "no such checkpoint")
        match method, action:
            case "GET", "archive":
                return await self._archive(request, checkpoint)
            case "GET", "external_weights_urls":
                return self._external_urls(checkpoint)
            case "DELETE", "":
                if not self.quirks.delete_forgets:
                    self._delete(checkpoint)
                fault = self._fault("deleted", subject)
                return web.Response(status=204) if fault is None else await self._spoil(request, fault)
            case (("POST" | "DELETE"), "publish"):
                wanted = method == "POST"
                if checkpoint.public == wanted:
                    return _problem(409, f"already {'public' if wanted else 'private'}")
                checkpoint.public = wanted
                return web.Response(status=204)
            case "PUT", "ttl":
                if self.quirks.no_ttl:
                    return _problem(405, "Method Not Allowed")
                return self._set_ttl(checkpoint, body)
            case _:
                return _problem(405, "Method Not Allowed")

    def _delete(self, checkpoint: SandboxCheckpoint) -> None:
        account = self.account
        del account.checkpoints[checkpoint.path]
        account.deleted.append(checkpoint.path)
        if not self.quirks.delete_takes_twin:
            return
        run, name = checkpoint.path.run_id, checkpoint.path.name
        for other in [path for path in account.checkpoints if (path.run_id, path.name) == (run, name)]:
            if self.quirks.twin_stays_listed:
                account.checkpoints[other].destroyed = True
            else:
                del account.checkpoints[other]

    def _named(self, run: str, identity: list[str], *, for_archive: bool) -> SandboxCheckpoint | None:
        if len(identity) == 2 and not (self.quirks.bare_ids and for_archive):
            return self.account.find(TinkerPath(run, identity[0], identity[1]))
        if len(identity) == 1 and self.quirks.bare_ids:
            for segment in ("sampler_weights", "weights", "external_weights"):
                found = self.account.find(TinkerPath(run, segment, identity[0]))
                if found is not None:
                    return found
        return None

    def _set_ttl(self, checkpoint: SandboxCheckpoint, body: dict[str, Any]) -> web.StreamResponse:
        seconds = body.get("ttl_seconds")
        if seconds is None:
            checkpoint.expires_at = None
        elif isinstance(seconds, int) and 3600 <= seconds <= 10 * 365 * 86400:
            checkpoint.expires_at = self.account.now() + timedelta(seconds=seconds)
        else:
            return _problem(400, "ttl_seconds must be 3600 to 315360000, or null")
        return web.Response(status=204)

    # Archives

    async def _archive(self, request: web.Request, checkpoint: SandboxCheckpoint) -> web.StreamResponse:
        quirks = self.quirks
        if quirks.building_seconds:
            now = clock.monotonic()
            if checkpoint.built_at is None:
                checkpoint.built_at = now + quirks.building_seconds
            if now < checkpoint.built_at:
                return _problem(503, "archive is being created", {"Retry-After": "1"})
        if quirks.archive_direct:
            return await self._send_direct(request, checkpoint)
        url, ends = self._sign(checkpoint, None)
        if quirks.archive_json:
            return web.json_response({"url": url, "expires": rfc3339(datetime.fromtimestamp(ends, UTC))})
        location = url
        if quirks.relative_location:
            location = f"{_PREFIX}/hop/{url.rpartition('/')[2]}"
        expires = format_datetime(datetime.fromtimestamp(ends, UTC), usegmt=True)
        return web.Response(status=302, headers={"Location": location, "Expires": expires})

    async def _send_direct(self, request: web.Request, checkpoint: SandboxCheckpoint) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/gzip"})
        await response.prepare(request)
        for piece in checkpoint.payload.archive():
            await response.write(piece)
        await response.write_eof()
        return response

    def _sign(self, checkpoint: SandboxCheckpoint, file: PayloadFile | None) -> tuple[str, float]:
        token = secrets.token_urlsafe(18)
        ends = clock.time() + self.quirks.url_life
        self._objects[token] = (checkpoint, file, ends)
        # A query as object storage signs it: `%20`, `+` and `%2F` must arrive as they are.
        return f"{self.storage_url}/{token}?X-Sig={token}%2Fa%20b+c&X-Expires={int(ends)}", ends

    def _external_urls(self, checkpoint: SandboxCheckpoint) -> web.StreamResponse:
        if checkpoint.path.segment != "external_weights":
            return _problem(400, "not an external checkpoint")
        urls: dict[str, str] = {}
        ends = clock.time()
        for file in checkpoint.payload.files:
            urls[file.name], ends = self._sign(checkpoint, file)
        return web.json_response({"urls": urls, "expires": rfc3339(datetime.fromtimestamp(ends, UTC))})

    # The storage

    async def _storage(self, request: web.Request) -> web.StreamResponse:
        self.storage_requests.append({name.lower(): value for name, value in request.headers.items()})
        raw, _, query = request.raw_path.partition("?")
        token = raw.strip("/")
        if request.method == "PUT":
            return await self._put(request, token)
        found = self._objects.get(token)
        if found is None:
            return web.Response(status=404, text="<Error>NoSuchKey</Error>", content_type="application/xml")
        checkpoint, file, ends = found
        if not query.startswith(f"X-Sig={token}%2Fa%20b+c&"):
            return web.Response(status=403, text="<Error>SignatureDoesNotMatch</Error>", content_type="application/xml")
        if clock.time() > ends:
            return web.Response(status=403, text="<Error>ExpiredToken</Error>", content_type="application/xml")
        subject = checkpoint.path.tail + ("" if file is None else f"#{file.name}")
        fault = self._fault("storage", subject)
        if fault is not None and fault.kind in ("status", "html", "drop"):
            return await self._spoil(request, fault)
        return await self._send(request, checkpoint, file, fault)

    async def _put(self, request: web.Request, token: str) -> web.StreamResponse:
        upload, _, name = token.partition("/")
        if upload not in self._uploads:
            return web.Response(status=404)
        self._uploads[upload]["files"][unquote(name)] = await request.read()
        return web.Response(status=200)

    async def _send(
        self, request: web.Request, checkpoint: SandboxCheckpoint, file: PayloadFile | None, fault: Fault | None
    ) -> web.StreamResponse:
        payload = checkpoint.payload
        pieces: Callable[[], Iterator[bytes]] = payload.archive if file is None else file.chunks
        length = payload.archive_length() if file is None else file.size
        if fault is not None and fault.kind == "body":
            body = fault.body
            pieces, length = lambda: iter((body,)), len(body)
        headers = {"Content-Type": "application/octet-stream", **self._digests(pieces, length)}
        if length is not None and self.quirks.etags and "ETag" not in headers:
            headers["ETag"] = f'"{to_micros(checkpoint.time):x}-{length:x}"'
        if fault is not None:
            headers |= fault.headers
            if fault.kind == "wrong-digest":
                headers["x-goog-hash"] = "md5=" + base64.b64encode(bytes(16)).decode()
        if fault is not None and fault.kind in ("close", "close-cut", "bad-chunk"):
            return await self._send_raw(request, pieces, fault)
        first, end = 0, length
        asked = self._asked_span(request, length, headers.get("ETag"))
        if asked is not None and length is not None and not (fault is not None and fault.kind == "whole"):
            first, end = asked
            if first >= length:
                return web.Response(status=416, headers={"Content-Range": f"bytes */{length}"})
            shift = 1 if fault is not None and fault.kind == "wrong-range" else 0
            headers["Content-Range"] = f"bytes {first + shift}-{end - 1 + shift}/{length + shift}"
        response = web.StreamResponse(headers=headers, status=206 if "Content-Range" in headers else 200)
        if end is not None:
            response.content_length = end - first
        await response.prepare(request)
        await self._send_pieces(request, response, _part(pieces(), first, end), first, fault)
        return response

    def _asked_span(self, request: web.Request, length: int | None, etag: str | None) -> tuple[int, int] | None:
        """`Range` as object storage takes it: one span, void when `If-Range` names another object."""
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if found is None or length is None or not self.quirks.ranges:
            return None
        if request.headers.get("If-Range", etag) != etag:
            return None
        first, last = found.groups()
        return int(first), min(length, int(last) + 1) if last else length

    async def _send_pieces(
        self,
        request: web.Request,
        response: web.StreamResponse,
        pieces: Iterator[bytes],
        position: int,
        fault: Fault | None,
    ) -> None:
        """The body, from that byte of the object on; a cut or a stall counts from the body's own first byte."""
        stop = position + fault.at if fault is not None and fault.kind in ("cut", "stall") else None
        for piece in pieces:
            chunk = piece
            if fault is not None and fault.kind == "corrupt" and position <= fault.at < position + len(chunk):
                place = fault.at - position
                chunk = chunk[:place] + bytes([chunk[place] ^ 0xFF]) + chunk[place + 1 :]
            if fault is not None and stop is not None and position + len(chunk) > stop:
                await response.write(chunk[: stop - position])
                self.sent_bytes += stop - position
                if fault.kind == "stall":
                    await asyncio.sleep(fault.seconds)
                _reset(request)
                return
            await response.write(chunk)
            position += len(chunk)
            self.sent_bytes += len(chunk)
            if fault is not None and fault.kind == "slow":
                await asyncio.sleep(fault.seconds)
        await response.write_eof()

    async def _send_raw(
        self, request: web.Request, pieces: Callable[[], Iterator[bytes]], fault: Fault
    ) -> web.StreamResponse:
        """A body that only the connection's end ends, or one whose chunking breaks."""
        transport = request.transport
        if transport is None:
            return web.Response()
        body = b"".join(pieces())
        if fault.kind == "close-cut":
            body = body[: fault.at]
        if fault.kind == "bad-chunk":
            transport.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            transport.write(b"%x\r\n%s\r\n" % (min(1000, len(body)), body[:1000]))
            await asyncio.sleep(0.05)
            transport.write(b"this is no chunk size\r\n")
            await asyncio.sleep(fault.seconds)
        else:
            transport.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + body)
        transport.close()
        return web.Response()

    def _digests(self, pieces: Callable[[], Iterator[bytes]], length: int | None) -> dict[str, str]:
        if not self.quirks.digests or length is None or length > 64 * 1024 * 1024:
            return {}
        digest = hashlib.md5(usedforsecurity=False)
        for piece in pieces():
            digest.update(piece)
        return {
            "x-goog-hash": "md5=" + binascii.b2a_base64(digest.digest(), newline=False).decode(),
            "ETag": f'"{digest.hexdigest()}"',
        }

    async def _spoil(self, request: web.Request, fault: Fault) -> web.StreamResponse:
        match fault.kind:
            case "drop":
                _reset(request)
                return web.Response()
            case "html":
                return web.Response(
                    text="<html><body>Bad gateway</body></html>", content_type="text/html", status=fault.status
                )
            case "stall":
                await asyncio.sleep(fault.seconds)
                return _problem(504, "timed out")
            case "body":
                return web.Response(
                    body=fault.body, status=fault.status, headers=fault.headers or {"Content-Type": "application/json"}
                )
            case _:
                return _problem(fault.status, "told to fail", fault.headers)

    # What the SDK's own download of training checkpoints needs

    def _load_weights(self, body: dict[str, Any]) -> web.StreamResponse:
        model = f"{body.get('session_id')}:train:{body.get('model_seq_id', 0)}"
        try:
            path = TinkerPath.parse(str(body.get("path")))
        except PathInvalid as error:
            return _problem(400, str(error))
        self._models[model] = path
        self._sessions.setdefault(str(body.get("session_id")), []).append(model)
        self.account.add_run(model)
        return web.json_response(
            {"request_id": self._future({"type": "load_weights", "path": str(path), "model_id": model})}
        )

    def _save_external(self, body: dict[str, Any]) -> web.StreamResponse:
        model = str(body.get("model_id"))
        origin = self.account.find(self._models[model]) if model in self._models else None
        payload = adapter(1, marker=False)
        if origin is not None:
            kept = [
                file
                for file in origin.payload.files
                if "optimizer" not in file.name and file.name != "checkpoint_complete"
            ]
            payload = Payload(tuple(kept))
        ttl = body.get("ttl_seconds")
        made = self.account.add(
            model,
            str(body.get("path")),
            "external",
            payload=payload,
            ttl=timedelta(seconds=ttl) if isinstance(ttl, int) else None,
        )
        future = {"type": "save_weights_external", "path": str(made.path), "size_bytes": payload.total_bytes}
        return web.json_response({"request_id": self._future(future)})

    def _future(self, answer: dict[str, Any]) -> str:
        request_id = secrets.token_hex(8)
        self._futures[request_id] = answer
        return request_id

    def _upload_start(self, body: dict[str, Any]) -> web.StreamResponse:
        upload = secrets.token_hex(8)
        self._uploads[upload] = {"base_model": body.get("base_model"), "files": {}}
        names = ("adapter_config.json", "adapter_model.safetensors")
        urls = {name: f"{self.storage_url}/{upload}/{name}" for name in names}
        return web.json_response(
            {"upload_id": upload, "urls": urls, "expires": rfc3339(self.account.now() + timedelta(hours=1))}
        )

    def _upload_finish(self, body: dict[str, Any]) -> web.StreamResponse:
        upload = self._uploads.pop(str(body.get("upload_id")), None)
        if upload is None:
            return _problem(404, "no such upload")
        files = tuple(PayloadFile.of(name, content) for name, content in upload["files"].items())
        made = self.account.add(self.account.add_run(), "uploaded", "external", payload=Payload(files))
        return web.json_response({"tinker_path": str(made.path)})

    # Being told what to do, over HTTP, for `demo --stay`

    async def _control(self, request: web.Request, parts: list[str]) -> web.StreamResponse:
        """`POST /sandbox/checkpoints {run?, name, type?, ttl_seconds?}`, `POST /sandbox/faults {where, kind, …}`."""
        if request.method != "POST":
            return web.json_response({"runs": list(self.account.runs), "checkpoints": len(self.account.living())})
        body = await request.json()
        if parts == ["checkpoints"]:
            run = body.get("run") or next(iter(self.account.runs), None) or self.account.add_run()
            ttl = body.get("ttl_seconds")
            made = self.account.add(
                run,
                str(body.get("name", f"{len(self.account.checkpoints):06}")),
                body.get("type", "training"),
                ttl=timedelta(seconds=ttl) if ttl else None,
            )
            return web.json_response({"tinker_path": str(made.path)})
        if parts == ["faults"]:
            self.faults.append(Fault(**body))
            return web.json_response({"faults": len(self.faults)})
        return _problem(404, "POST /sandbox/checkpoints or /sandbox/faults")


def _unless_left(handler: Handler) -> Handler:
    """A client that goes away in the middle is no error of the server's."""

    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except ConnectionResetError:
            return web.Response()

    return handle


def _part(pieces: Iterator[bytes], first: int, end: int | None) -> Iterator[bytes]:
    """Of a body, the bytes from `first` up to `end`."""
    position = 0
    for piece in pieces:
        if end is not None and position >= end:
            return
        chunk = piece[max(0, first - position) : None if end is None else end - position]
        position += len(piece)
        if chunk:
            yield chunk


def _uuid() -> str:
    import uuid  # noqa: PLC0415

    return str(uuid.uuid4())


def _problem(status: int, detail: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response({"detail": detail}, status=status, headers=headers)


def _reset(request: web.Request) -> None:
    """End the connection without ceremony."""
    transport = request.transport
    if transport is None:
        return
    raw = transport.get_extra_info("socket")
    if raw is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
