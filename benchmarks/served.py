"""What is served in the transfer benchmarks: checkpoints on nginx, and an API that lists them and signs its URLs."""

from __future__ import annotations

import asyncio
import hashlib
import multiprocessing
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Self

from tinker_sync.sandbox import Payload, PayloadFile, Sandbox, SandboxAccount, SandboxCheckpoint, adapter
from tinker_sync.sandbox.adapters import safetensors

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from multiprocessing.connection import Connection

    from origin import Origin

RUN = "39aa5eb2-e234-5a95-ab68-896e4cac8c45:train:0"


@dataclass(frozen=True, slots=True)
class Piece:
    """One checkpoint: what the API says of it, where its bytes are, and what must be on the disk in the end."""

    name: str
    kind: str
    time: datetime
    files: tuple[tuple[str, int, str], ...]
    """Name, size and SHA-256 of each."""
    urls: dict[str, str]
    """By file name; the archive's under the empty one."""

    @property
    def size(self) -> int:
        """The sum of the files."""
        return sum(size for _, size, _ in self.files)

    @property
    def run(self) -> str:
        """Two hundred share one."""
        return f"run-{int(self.name) // 200}:train:0" if self.name.isdigit() else RUN

    @property
    def path(self) -> str:
        """As a tinker path."""
        return f"tinker://{self.run}/{'external_weights' if self.kind == 'external' else 'weights'}/{self.name}"


# The server: an API in a process of its own, bytes from nginx alone


class _StillAccount(SandboxAccount):
    """One whose listing is sorted once, so that the server is not what a pass over 10^5 rows waits for."""

    __slots__ = ("_sorted",)

    def living(self) -> list[SandboxCheckpoint]:
        kept = getattr(self, "_sorted", [])
        if len(kept) != len(self.checkpoints):
            kept = self._sorted = super().living()
        return kept


class _Api(Sandbox):
    """Signs URLs of the origin."""

    def __init__(self) -> None:
        super().__init__(_StillAccount())
        self._urls: dict[str, dict[str, str]] = {}

    def learn(self, pieces: Sequence[Piece]) -> None:
        """List these too."""
        for piece in pieces:
            payload = Payload(tuple(PayloadFile(name, size, _nothing) for name, size, _ in piece.files))
            made = self.account.add(piece.run, piece.name, piece.kind, payload=payload, time=piece.time)
            self._urls[str(made.path)] = piece.urls

    def _sign(self, checkpoint: SandboxCheckpoint, file: PayloadFile | None) -> tuple[str, float]:
        return self._urls[str(checkpoint.path)]["" if file is None else file.name], time.time() + 3600


def _nothing() -> Iterator[bytes]:
    message = "the API sends no bytes in these benchmarks"
    raise RuntimeError(message)


def _serve(pipe: Connection) -> None:
    async def forever() -> None:
        sandbox = _Api()
        async with sandbox.running():
            pipe.send((sandbox.base_url, sandbox.key))
            while True:
                sandbox.learn(await asyncio.to_thread(pipe.recv))
                pipe.send(len(sandbox.account.checkpoints))

    asyncio.run(forever())


class Api:
    """The API; `with` it."""

    def __enter__(self) -> Self:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()  # so that its death is an end here, and no wait
        self.base_url, self.key = self._pipe.recv()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.join()

    def add(self, pieces: Sequence[Piece]) -> None:
        """List these too."""
        self._pipe.send(pieces)
        self._pipe.recv()


# What is served


def archives(origin: Origin, count: int, size: int) -> list[Piece]:
    """So many archives of about so many bytes: configuration, weights, twice as much optimizer state, marker."""
    now, made = datetime.now(UTC), []
    for n in range(count):
        weights = adapter(3 * n, marker=False, pad_to=size // 3).files
        state = safetensors("optimizer_state.safetensors", {"moments": ("U8", [size - size // 3])}, 3 * n + 1)
        payload = Payload((*weights, state, PayloadFile.of("checkpoint_complete", b"")))
        name = f"{n:06}"
        with (origin.content / f"{name}.tar").open("wb") as file:
            file.writelines(payload.archive())
        url = {"": f"{origin.url}/{name}.tar"}
        made.append(Piece(name, "training", now - timedelta(seconds=n), _described(payload), url))
    return made


def external(origin: Origin, count: int, size: int) -> list[Piece]:
    """One external checkpoint of so many files of so many bytes, and its configuration."""
    files = [adapter(0).files[0]]
    files += [
        safetensors(f"adapter_model-{n + 1:05}-of-{count:05}.safetensors", {"x": ("U8", [size])}, n)
        for n in range(count)
    ]
    for file in files:
        with (origin.content / file.name).open("wb") as target:
            target.writelines(file.chunks())
    urls = {file.name: f"{origin.url}/{file.name}" for file in files}
    return [Piece("final", "external", datetime.now(UTC), _described(Payload(tuple(files))), urls)]


def _described(payload: Payload) -> tuple[tuple[str, int, str], ...]:
    return tuple((file.name, file.size, _sha256(file)) for file in payload.files)


def _sha256(file: PayloadFile) -> str:
    digest = hashlib.sha256()
    for chunk in file.chunks():
        digest.update(chunk)
    return digest.hexdigest()
