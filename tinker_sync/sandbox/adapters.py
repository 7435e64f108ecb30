"""Generated adapters: PEFT layout, valid safetensors, any size, the same bytes for the same seed, never all in memory."""

from __future__ import annotations

import gzip
import json
import random
import tarfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_BLOCK = 1024 * 1024


@dataclass(frozen=True, slots=True)
class PayloadFile:
    """One file: name, size, and a way to produce its bytes again and again."""

    name: str
    size: int
    chunks: Callable[[], Iterator[bytes]]

    @classmethod
    def of(cls, name: str, content: bytes) -> PayloadFile:
        """A small file from its bytes."""
        return cls(name, len(content), lambda: iter((content,)))

    def read(self) -> bytes:
        """All of it, for tests."""
        return b"".join(self.chunks())


@dataclass(frozen=True, slots=True)
class Payload:
    """A checkpoint's files, and its archive."""

    files: tuple[PayloadFile, ...]
    compressed: bool = False
    prefix: str = ""
    """Put before every name, as in `./` or `000020/`."""
    raw: bytes | None = field(default=None, repr=False)
    """Sent as the archive instead, for archives that are wrong."""

    @property
    def total_bytes(self) -> int:
        """The sum of the files."""
        return sum(file.size for file in self.files)

    def archive_length(self) -> int | None:
        """The archive's length, where it is known without making it."""
        if self.raw is not None:
            return len(self.raw)
        if self.compressed:
            return len(self.archive_bytes())
        size = sum(len(self._header(file)) + file.size + -file.size % 512 for file in self.files) + 1024
        return size + -size % tarfile.RECORDSIZE

    def archive(self) -> Iterator[bytes]:
        """The archive, piece by piece."""
        if self.raw is not None:
            yield self.raw
        elif self.compressed:
            yield self.archive_bytes()
        else:
            yield from self._tar()

    def archive_bytes(self) -> bytes:
        """The whole archive, for small ones."""
        if self.raw is not None:
            return self.raw
        plain = b"".join(self._tar())
        return gzip.compress(plain, mtime=0) if self.compressed else plain

    def _tar(self) -> Iterator[bytes]:
        sent = 0
        for file in self.files:
            header = self._header(file)
            yield header
            yield from file.chunks()
            padding = -file.size % 512
            yield bytes(padding)
            sent += len(header) + file.size + padding
        yield bytes(1024 + -(sent + 1024) % tarfile.RECORDSIZE)

    def _header(self, file: PayloadFile) -> bytes:
        info = tarfile.TarInfo(self.prefix + file.name)
        info.size, info.mtime, info.mode = file.size, 1_760_000_000, 0o644
        return info.tobuf(tarfile.PAX_FORMAT)


def adapter(
    seed: int = 0,
    *,
    rank: int = 8,
    hidden: int = 64,
    layers: int = 2,
    base_model: str = "Qwen/Qwen3-8B",
    optimizer: bool = False,
    marker: bool = True,
    compressed: bool = False,
    prefix: str = "",
    pad_to: int = 0,
) -> Payload:
    """A LoRA adapter as the service packs it: configuration, weights, marker, and optimizer state for training ones.

    `pad_to` grows the weights by one tensor to about so many bytes.
    """
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
    }
    tensors: dict[str, tuple[str, list[int]]] = {}
    for layer in range(layers):
        for module in ("q_proj", "v_proj"):
            base = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{base}.lora_A.weight"] = ("F32", [rank, hidden])
            tensors[f"{base}.lora_B.weight"] = ("F32", [hidden, rank])
    files = [
        PayloadFile.of("adapter_config.json", json.dumps(config, indent=2).encode()),
        safetensors("adapter_model.safetensors", tensors, seed, pad_to=pad_to),
    ]
    if optimizer:
        files.append(safetensors("optimizer_state.safetensors", tensors, seed + 1))
    if marker:
        files.append(PayloadFile.of("checkpoint_complete", b""))
    return Payload(tuple(files), compressed=compressed, prefix=prefix)


def safetensors(name: str, tensors: dict[str, tuple[str, list[int]]], seed: int, *, pad_to: int = 0) -> PayloadFile:
    """A valid safetensors file of pseudo-random bytes."""
    width = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    shapes = dict(tensors)
    planned = sum(_volume(shape) * width[dtype] for dtype, shape in shapes.values())
    if pad_to > planned:
        shapes["padding"] = ("U8", [pad_to - planned])
    for tensor, (dtype, shape) in shapes.items():
        size = _volume(shape) * width[dtype]
        header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    head = len(encoded).to_bytes(8, "little") + encoded
    data_bytes = position

    def chunks() -> Iterator[bytes]:
        yield head
        block = random.Random(seed).randbytes(min(_BLOCK, data_bytes))  # noqa: S311 - test data
        left = data_bytes
        while left > 0:
            yield block[:left] if left < len(block) else block
            left -= len(block)

    return PayloadFile(name, len(head) + data_bytes, chunks)


def _volume(shape: list[int]) -> int:
    volume = 1
    for dimension in shape:
        volume *= dimension
    return volume
