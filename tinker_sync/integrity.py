"""Judges what was seen while a checkpoint was written: paths, sizes, digests, first bytes. Never a `Path`, no I/O.

All defects are collected before anything is said, because "truncated" alone hides "and it is the wrong file".
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from typing import TYPE_CHECKING, Any, Final

from tinker_sync.model.evidence import Claim, Defect, Kind, SeenFile, Span
from tinker_sync.model.paths import MANIFEST_NAME

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tinker_sync.model.evidence import SeenBody
    from tinker_sync.model.manifest import Manifest
    from tinker_sync.model.paths import PayloadPath
    from tinker_sync.model.work import ReadBack, Replica

MARKER: Final = "checkpoint_complete"
ADAPTER_CONFIG: Final = "adapter_config.json"

_SAFETENSORS_HEADER_LIMIT: Final = 100_000_000
"""The format's own limit (safetensors, `MAX_HEADER_SIZE`)."""
_EXAMINED_HEADER_LIMIT: Final = 16 * 1024 * 1024
"""Larger headers are only checked for their length: memory stays bounded."""
_NO_SIZE: Final = 1 << 63
"""Larger than any file; numbers of a header are not computed with beyond it."""
_JSON_LIMIT: Final = 1024 * 1024
_WEIGHTS: Final = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|distcp|gguf|npz|age)$")
_OPTIMIZER: Final = re.compile(r"optim", re.IGNORECASE)
_DTYPE_BYTES: Final = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}


def head_wanted(path: PayloadPath, size: int, first: bytes) -> int:
    """How many of a file's first bytes `judge_file` needs, given at least the first 8 of them (or all)."""
    if path.name.endswith(".safetensors"):
        if len(first) < 8:
            return 8
        length = int.from_bytes(first[:8], "little")
        return 8 + length if length <= min(_EXAMINED_HEADER_LIMIT, size) else 8
    if path.name == ADAPTER_CONFIG:
        return min(size, _JSON_LIMIT)
    return 0


def read_claim(headers: Mapping[str, str]) -> tuple[Claim, list[Defect]]:
    """What a storage response promises about its body. Header names are in lower case.

    Sources: GCS `x-goog-hash` (void where GCS decompresses on the way), RFC 1864 `Content-MD5`, S3
    `x-amz-checksum-*` (not the composite ones of multipart uploads), and an S3 ETag of a single part
    without KMS, which is the MD5.
    """
    digests: dict[str, bytes] = {}
    defects: list[Defect] = []

    def take(algorithm: str, encoded: str, where: str) -> None:
        try:
            value = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError):
            return
        if algorithm not in _DIGEST_BYTES or len(value) != _DIGEST_BYTES[algorithm]:
            return
        if digests.setdefault(algorithm, value) != value:
            defects.append(Defect(Kind.TRANSPORT, f"two different {algorithm} digests were promised", where))

    stored = headers.get("x-goog-stored-content-encoding", "identity")
    if stored in ("identity", headers.get("content-encoding", "identity")):
        for part in headers.get("x-goog-hash", "").split(","):
            algorithm, _, encoded = part.strip().partition("=")
            take(algorithm, encoded, "x-goog-hash")
    if "content-md5" in headers:
        take("md5", headers["content-md5"], "Content-MD5")
    if headers.get("x-amz-checksum-type", "").upper() != "COMPOSITE":
        for name, value in headers.items():
            if name.startswith("x-amz-checksum-"):
                take(name.removeprefix("x-amz-checksum-"), value, name)
    if "x-amz-request-id" in headers and headers.get("x-amz-server-side-encryption", "AES256") == "AES256":
        tag = headers.get("etag", "").strip('"')
        if re.fullmatch(r"[0-9a-f]{32}", tag):
            take("md5", base64.b64encode(bytes.fromhex(tag)).decode(), "ETag")
    length = headers.get("content-length", "")
    return Claim(int(length) if re.fullmatch(r"[0-9]{1,18}", length) else None, digests), defects


def served_span(headers: Mapping[str, str]) -> tuple[Span, int] | None:
    """`Content-Range` of a 206: which bytes came, and how long the whole is; None where that cannot be told.

    Source: RFC 9110, 14.4. Header names are in lower case.
    """
    found = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", headers.get("content-range", "").strip())
    if found is None:
        return None
    first, last, total = map(int, found.groups())
    return (Span(first, last + 1), total) if first <= last < total else None


def strong_validator(headers: Mapping[str, str]) -> str | None:
    """The ETag, where it is one that promises the same bytes (RFC 9110, 8.8.1: not `W/`)."""
    tag = headers.get("etag", "").strip()
    return tag if re.fullmatch(r'"[\x21\x23-\x7e]*"', tag) else None


def headers_of_whole(headers: Mapping[str, str], span: Span, total: int) -> dict[str, str]:
    """A 206's headers as they would be of the whole: its length, and no digest that can be of the part alone.

    (`x-goog-hash` is of the whole object also where a part is sent.)
    """
    if span == Span(0, total):
        return dict(headers)
    of_part = {"content-md5", "content-digest", "content-length"}
    kept = {
        name: value for name, value in headers.items() if name not in of_part and not name.startswith("x-amz-checksum-")
    }
    return {**kept, "content-length": str(total)}


_DIGEST_BYTES: Final = {"md5": 16, "sha1": 20, "sha256": 32, "crc32": 4, "crc32c": 4}


def judge_body(claim: Claim, seen: SeenBody, where: str = "") -> list[Defect]:
    """Length and digests of one body against what was promised."""
    defects: list[Defect] = []
    if claim.length is not None and claim.length != seen.length:
        defects.append(
            Defect(Kind.TRANSPORT, f"{seen.length:,} bytes came, Content-Length promised {claim.length:,}", where)
        )
    for algorithm, promised in claim.digests.items():
        computed = seen.digests.get(algorithm)
        if computed is not None and computed != promised:
            what = f"{algorithm} is {computed.hex()}, the storage promised {promised.hex()}"
            defects.append(Defect(Kind.TRANSPORT, what, where))
    return defects


def judge_content(
    files: Sequence[SeenFile],
    *,
    marker_required: bool,
    weights_expected: bool,
    optimizer_expected: bool,
) -> list[Defect]:
    """Whether whole, safe files are a checkpoint.

    `weights_expected` is off for the directory of a server that keeps facts only; `optimizer_expected` is on when
    a training checkpoint came by a way that can hand out the sampler of the same name instead.
    """
    defects: list[Defect] = []
    if not files:
        return [Defect(Kind.STRUCTURE, "no file in it at all")]
    names = {seen.path.name for seen in files}
    if marker_required and MARKER not in names:
        defects.append(Defect(Kind.CONTENT, f"the marker {MARKER} is missing: the checkpoint may be half-saved"))
    if weights_expected and not any(_WEIGHTS.search(seen.path.name) for seen in files):
        shown = ", ".join(sorted(names)[:5])
        defects.append(Defect(Kind.CONTENT, f"unknown layout: no file of weights among {len(files)} ({shown})"))
    if optimizer_expected and not any(_OPTIMIZER.search(str(seen.path)) for seen in files):
        what = "no optimizer state: the server gave the sampler checkpoint of the same name"
        defects.append(Defect(Kind.CONTENT, what))
    for seen in files:
        defects += seen.findings
    return defects


def judge_file(path: PayloadPath, size: int, head: bytes) -> tuple[Defect, ...]:
    """What a file's first bytes (as many as `head_wanted` asked for) say about the whole."""
    where = str(path)
    if path.name.endswith(".safetensors"):
        faults = _safetensors_faults(size, head)
    elif path.name == ADAPTER_CONFIG:
        faults = _configuration_faults(size, head)
    else:
        faults = []
    return tuple(Defect(Kind.CONTENT, fault, where) for fault in faults)


def _configuration_faults(size: int, head: bytes) -> list[str]:
    if size > len(head):
        return [f"{size:,} bytes are too many for a configuration"]
    try:
        document = json.loads(head)
    except (ValueError, RecursionError) as error:
        return [f"does not parse as JSON: {error}"]
    return [] if isinstance(document, dict) else ["is JSON, but not an object"]


def _safetensors_faults(size: int, head: bytes) -> list[str]:
    """Header, offsets contiguous and covering, total length, by the format's description.

    Source: https://github.com/huggingface/safetensors#format. Unknown dtypes pass: only their size is not checked.
    """
    if size < 8 or len(head) < 8:
        return [f"{size} bytes are too few for safetensors"]
    length = int.from_bytes(head[:8], "little")
    if length > _SAFETENSORS_HEADER_LIMIT or 8 + length > size:
        return [f"its header claims {length:,} bytes, the file has {size:,}"]
    if length > _EXAMINED_HEADER_LIMIT:
        return []
    try:
        header = json.loads(head[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        return [f"its header does not parse: {error}"]
    return _tensor_faults(header, size - 8 - length) if isinstance(header, dict) else ["its header is no object"]


def _tensor_faults(header: dict[str, Any], data_bytes: int) -> list[str]:
    spans: list[tuple[int, int, str]] = []
    faults: list[str] = []
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        span = _span(tensor)
        if span is None:
            faults.append(f"tensor {name!r} has no valid data_offsets")
            continue
        begin, end = span
        expected = _tensor_bytes(tensor)
        if expected is not None and expected != end - begin:
            faults.append(f"tensor {name!r} spans {end - begin:,} bytes, its shape and dtype need {expected:,}")
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            faults.append(f"tensor {name!r} begins at {begin:,}, the one before it ends at {position:,}")
            break
        position = end
    else:
        if position != data_bytes and not faults:
            faults.append(f"its tensors end at {position:,}, its data at {data_bytes:,}: cut or padded")
    return faults[:10]


def _span(tensor: object) -> tuple[int, int] | None:
    offsets = tensor.get("data_offsets") if isinstance(tensor, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(offset) is int for offset in offsets):
        return None
    begin, end = offsets
    return (begin, end) if 0 <= begin <= end < _NO_SIZE else None


def _tensor_bytes(tensor: dict[str, Any]) -> int | None:
    shape, width = tensor.get("shape"), _DTYPE_BYTES.get(str(tensor.get("dtype")))
    if width is None or not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        return None
    total = width
    for dimension in shape:
        total = min(total * dimension, _NO_SIZE)
    return total


def judge_read_back(replica: Replica, read: ReadBack) -> tuple[Defect, ...]:
    """What was read from a replica's directory, against the replica that should be there."""
    if read.manifest is not None and read.manifest.tinker_path != replica.path:
        what = f"the manifest is of {read.manifest.tinker_path}"
        return (*read.defects, Defect(Kind.CONTENT, what, MANIFEST_NAME))
    return read.defects


def judge_proof(replica: Replica, read: ReadBack) -> tuple[Defect, ...]:
    """The same, as strictly as a delete upstream needs it: the manifest must be the one that was committed."""
    defects = judge_read_back(replica, read)
    if read.manifest is None:
        return defects
    if not read.manifest.identity.matches(replica.identity):
        defects += (Defect(Kind.CONTENT, "the manifest is of another object under this path", MANIFEST_NAME),)
    elif read.manifest_sha256 != replica.manifest_sha256:
        what = "the manifest is not the one that was committed; `tinker-sync verify` and `reindex` tell more"
        defects += (Defect(Kind.CONTENT, what, MANIFEST_NAME),)
    return defects


def judge_replica(manifest: Manifest, seen: Sequence[SeenFile]) -> list[Defect]:
    """A replica as it was read back, against its manifest: missing, changed and surplus files."""
    defects: list[Defect] = []
    found = {entry.path: entry for entry in seen}
    for entry in manifest.files:
        where = str(entry.path)
        now = found.pop(entry.path, None)
        if now is None:
            defects.append(Defect(Kind.CONTENT, "is missing", where))
        elif now.size != entry.size:
            what = f"has {now.size:,} bytes, the manifest says {entry.size:,}"
            defects.append(Defect(Kind.CONTENT, what, where))
        elif now.sha256 != entry.sha256:
            defects.append(Defect(Kind.CONTENT, "its SHA-256 is not the manifest's", where))
    defects += [Defect(Kind.CONTENT, "is not in the manifest", str(path)) for path in sorted(found)]
    return defects
