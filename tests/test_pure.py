"""The pure modules: names, paths, integrity, planning."""

from __future__ import annotations

import base64
import hashlib
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import NOW, hours, minutes
from tinker_sync.integrity import head_wanted, judge_body, judge_content, judge_file, read_claim
from tinker_sync.model.checkpoint import Checkpoint, Identity
from tinker_sync.model.evidence import Claim, Kind, SeenBody, SeenFile
from tinker_sync.model.manifest import FileEntry, Manifest, ManifestInvalid
from tinker_sync.model.moments import from_micros, parse_time, rfc3339, to_micros
from tinker_sync.model.names import decode_component, encode_component, hashed_component
from tinker_sync.model.paths import PathInvalid, PayloadPath, SignedUrl, TinkerPath
from tinker_sync.model.work import Failure, Replica, Trouble
from tinker_sync.planning import Known, Selection, ServedRecord, plan_transfers, retry_delay

RUN = "39aa5eb2-e234-5a95-ab68-896e4cac8c45:train:0"
component = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=80)


# Names


@given(component, st.booleans())
def test_a_name_survives_encoding(name: str, portable: bool) -> None:
    """Encoding and decoding gives the name back, or is a hash that says so; the result is one safe component."""
    encoded = encode_component(name, portable=portable)
    assert decode_component(encoded) in (name, None)
    assert len(encoded.encode()) <= 200
    assert encoded not in (".", "..")
    assert not encoded.startswith(".")
    assert not set(encoded) & set("/\0@")
    if portable:
        assert not set(encoded) & set('<>:"\\|?*')
        assert not encoded.endswith((".", " "))


@pytest.mark.parametrize(
    ("name", "plain", "portable"),
    [
        ("000020", "000020", "000020"),
        (RUN, RUN, RUN.replace(":", "%3A")),
        ("x#y?z", "x#y?z", "x#y%3Fz"),
        ("%41", "%2541", "%2541"),
        (".hidden", "%2Ehidden", "%2Ehidden"),
        (".", "%2E", "%2E"),
        ("..", "%2E%2E", "%2E%2E"),
        ("a@b", "a%40b", "a%40b"),
        ("dot.", "dot.", "dot%2E"),
        ("new\nline", "new%0Aline", "new%0Aline"),
        ("aux", "aux", "%61ux"),
    ],
)
def test_names_on_disk(name: str, plain: str, portable: str) -> None:
    """The table of docs/ARCHITECTURE.md."""
    assert encode_component(name) == plain
    assert encode_component(name, portable=True) == portable


def test_long_names_become_150_bytes_and_a_hash() -> None:
    """Over 200 bytes: the first 150, `%~`, 16 hex digits of the true name's SHA-256."""
    name = "n" * 300
    assert encode_component(name) == "n" * 150 + "%~" + hashlib.sha256(name.encode()).hexdigest()[:16]
    wide = encode_component("\u00e9" * 300)
    assert len(wide.encode()) <= 200
    assert decode_component(wide) is None
    assert hashed_component("Short") != hashed_component("short")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tinker://",
        "tinker://a/weights",
        "tinker://a/weights/b/c",
        "http://a/b/c",
        "tinker://a//b",
        "Tinker://a/b/c",
    ],
)
def test_what_is_no_tinker_path_is_refused(text: str) -> None:
    """Exactly three parts after the scheme."""
    with pytest.raises(PathInvalid):
        TinkerPath.parse(text)


def test_a_tinker_path_knows_its_parts() -> None:
    """Run, segment, name and type, and back to the text."""
    path = TinkerPath.parse(f"tinker://{RUN}/sampler_weights/x#y")
    assert (path.run_id, path.name, path.checkpoint_type) == (RUN, "x#y", "sampler")
    assert str(path) == f"tinker://{RUN}/sampler_weights/x#y"
    assert TinkerPath.parse("tinker://r/future_weights/a").checkpoint_type == "future_weights"


def test_a_signed_url_shows_its_host_alone() -> None:
    """Neither str, repr nor format gives the secret away."""
    url = SignedUrl("https://user:pw@bucket.example.org/key?X-Signature=s3cret")
    for shown in (str(url), repr(url), f"{url}", f"{[url]}"):
        assert "s3cret" not in shown
        assert "pw" not in shown
        assert "bucket.example.org" in shown


def test_times_are_utc_and_exact() -> None:
    """Naive is UTC, offsets are converted, microseconds survive integers."""
    assert parse_time("2026-01-15T12:00:00") == NOW
    assert parse_time("2026-01-15T14:00:00+02:00") == NOW
    assert rfc3339(NOW) == "2026-01-15T12:00:00Z"
    odd = datetime(2026, 1, 1, 0, 0, 0, 123457, tzinfo=UTC)
    assert from_micros(to_micros(odd)) == odd


def test_identity_uses_the_size_only_where_both_know_it() -> None:
    """Same path and second: the same object, unless both sizes are known and differ."""
    path = TinkerPath(RUN, "weights", "a")
    assert Identity(path, NOW, 5).matches(Identity(path, NOW, None))
    assert not Identity(path, NOW, 5).matches(Identity(path, NOW, 6))
    assert not Identity(path, NOW, 5).matches(Identity(path, NOW + timedelta(seconds=1), 5))


# Manifests


def make_manifest(**changes: Any) -> Manifest:
    """A manifest with something in every field."""
    fields: dict[str, Any] = {
        "tinker_path": TinkerPath(RUN, "weights", "na\u00efve #1"),
        "checkpoint_type": "training",
        "time": NOW,
        "files": (FileEntry(PayloadPath.parse("a/b"), 3, "00" * 32),),
        "source": "archive",
        "fidelity": "exact",
        "committed_at": NOW,
        "tool_version": "0",
        "size_bytes": 3,
        "user_metadata": {"loss": "0.1"},
        "claims": {"archive": {"length": 3}},
    }
    return Manifest(**(fields | changes))


def test_a_manifest_is_read_back_as_it_was_written() -> None:
    """Every field survives, the keys are the contract's, and unknown keys are ignored."""
    manifest = make_manifest()
    document = json.loads(manifest.to_bytes())
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    assert document["format"] == 1
    assert document["total_bytes"] == 3
    assert Manifest.from_bytes(json.dumps({**document, "tomorrow": 1}).encode()) == manifest


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b'{"format": 2}', b"\xff", b"[" * 5000])
def test_what_is_no_manifest_is_said_to_be_none(content: bytes) -> None:
    """One error for all of them."""
    with pytest.raises(ManifestInvalid):
        Manifest.from_bytes(content)


def test_a_manifest_that_would_escape_is_invalid() -> None:
    """Paths in a manifest are as untrusted as in an archive."""
    document = json.loads(make_manifest().to_bytes())
    document["files"][0]["path"] = "../../x"
    with pytest.raises(ManifestInvalid):
        Manifest.from_bytes(json.dumps(document).encode())


# Integrity


def seen(name: str, content: bytes) -> SeenFile:
    """A file as the writer would have seen it."""
    path = PayloadPath.parse(name)
    head = content[: head_wanted(path, len(content), content[:8])]
    return SeenFile(path, len(content), hashlib.sha256(content).hexdigest(), judge_file(path, len(content), head))


def safetensors(header: object, data: bytes) -> bytes:
    """A file of that format, right or wrong."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (safetensors({"a": TENSOR}, bytes(8)), ""),
        (safetensors({"__metadata__": {"x": "y"}, "a": TENSOR}, bytes(8)), ""),
        (safetensors({}, b""), ""),
        (safetensors({"a": {"dtype": "F4_TOMORROW", "shape": [3], "data_offsets": [0, 7]}}, bytes(7)), ""),
        (safetensors({"a": TENSOR}, bytes(7)), "cut or padded"),
        (safetensors({"a": TENSOR}, bytes(9)), "cut or padded"),
        (safetensors({"a": {**TENSOR, "data_offsets": [4, 12]}}, bytes(12)), "begins at 4"),
        (safetensors({"a": TENSOR, "b": {**TENSOR, "data_offsets": [4, 12]}}, bytes(12)), "begins at 4"),
        (safetensors({"a": {**TENSOR, "shape": [3]}}, bytes(8)), "need 12"),
        (safetensors({"a": {**TENSOR, "data_offsets": [8, 0]}}, bytes(8)), "no valid data_offsets"),
        (safetensors({"a": 5}, bytes(8)), "no valid data_offsets"),
        (safetensors({"a": {**TENSOR, "shape": [10**4200, 10**4200]}}, bytes(8)), "need"),
        (safetensors({"a": {**TENSOR, "data_offsets": [0, 10**4200]}}, bytes(8)), "no valid data_offsets"),
        (safetensors(b"{no json", bytes(8)), "does not parse"),
        (safetensors([1], bytes(8)), "no object"),
        ((10**6).to_bytes(8, "little") + b"{}", "claims 1,000,000"),
        (b"1234567", "too few"),
    ],
)
def test_safetensors_are_judged_by_the_format(content: bytes, said: str) -> None:
    """Header, offsets, shapes and length; unknown dtypes pass."""
    defects = judge_content(
        [seen("model.safetensors", content)], marker_required=False, weights_expected=True, optimizer_expected=False
    )
    if not said:
        assert not defects
    else:
        assert [defect.kind for defect in defects] == [Kind.CONTENT] * len(defects)
        assert said in "; ".join(map(str, defects))


def test_all_content_defects_come_at_once() -> None:
    """Marker, layout, configuration and optimizer state, in one answer."""
    files = [seen("adapter_config.json", b"{"), seen("notes.txt", b"hi")]
    said = " ".join(
        str(d) for d in judge_content(files, marker_required=True, weights_expected=True, optimizer_expected=True)
    )
    for part in ("marker", "unknown layout", "does not parse", "no optimizer state"):
        assert part in said


def test_storage_digests_are_read_where_they_mean_the_body() -> None:
    """GCS, RFC 1864 and S3; composite, transcoded and KMS ones say nothing about the body."""
    md5 = hashlib.md5(b"x").digest()
    encoded = base64.b64encode(md5).decode()
    crc = base64.b64encode(b"1234").decode()
    assert read_claim({"x-goog-hash": f"crc32c={crc},md5={encoded}"})[0].digests == {"crc32c": b"1234", "md5": md5}
    assert read_claim({"content-md5": encoded, "content-length": "1"})[0] == Claim(1, {"md5": md5})
    assert read_claim({"x-amz-checksum-crc32": crc})[0].digests == {"crc32": b"1234"}
    assert read_claim({"x-amz-request-id": "1", "etag": f'"{md5.hex()}"'})[0].digests == {"md5": md5}
    for silent in (
        {"x-goog-hash": f"md5={encoded}", "x-goog-stored-content-encoding": "gzip"},
        {"x-amz-checksum-crc32": f"{crc}-3", "x-amz-checksum-type": "COMPOSITE"},
        {"x-amz-request-id": "1", "etag": f'"{md5.hex()}-2"'},
        {"x-amz-request-id": "1", "etag": f'"{md5.hex()}"', "x-amz-server-side-encryption": "aws:kms"},
        {"etag": f'"{md5.hex()}"'},
        {"content-md5": "not base64 at all"},
        {"content-length": "-5"},
    ):
        assert read_claim(silent)[0] == Claim()
    _, defects = read_claim({"content-md5": encoded, "x-goog-hash": f"md5={base64.b64encode(bytes(16)).decode()}"})
    assert "two different md5" in str(defects[0])


def test_length_and_digest_of_a_body() -> None:
    """Both are defects of transport: worth another attempt."""
    claim = Claim(5, {"md5": bytes(16)})
    defects = judge_body(claim, SeenBody(4, {"md5": b"1" * 16}))
    assert len(defects) == 2
    assert all(defect.again_now for defect in defects)
    assert not judge_body(claim, SeenBody(5, {"md5": bytes(16)}))


# Planning


def checkpoint(
    name: str, age: timedelta, ttl: timedelta | None = None, kind: str = "weights", size: int = 1000
) -> Checkpoint:
    """One row."""
    born = NOW - age
    return Checkpoint(TinkerPath(RUN, kind, name), born, size, expires_at=None if ttl is None else born + ttl)


def replica_of(row: Checkpoint, **changes: Any) -> Replica:
    """Its copy."""
    fields: dict[str, Any] = {
        "path": row.path,
        "time": row.time,
        "size_bytes": row.size_bytes,
        "directory": row.path.tail,
        "total_bytes": 1,
        "files": 1,
        "fidelity": "exact",
        "source": "archive",
        "committed_at": NOW,
        "verified_at": NOW,
        "manifest_sha256": "",
    }
    return Replica(**(fields | changes))


def failure_of(row: Checkpoint, **changes: Any) -> Failure:
    """It failed."""
    fields: dict[str, Any] = {
        "path": row.path,
        "time": row.time,
        "size_bytes": row.size_bytes,
        "trouble": Trouble.FAILING,
        "attempts": 1,
        "error": "x",
        "failed_at": NOW,
        "retry_at": NOW + minutes(1),
    }
    return Failure(**(fields | changes))


def test_soonest_to_expire_first_then_newest_then_the_hopeless() -> None:
    """The order of the queue; what cannot finish in time goes last."""
    rows = [
        checkpoint("old", hours(50)),
        checkpoint("new", hours(1)),
        checkpoint("week", hours(24), timedelta(days=7)),
        checkpoint("soon", hours(160), timedelta(days=7)),
        checkpoint("hopeless", hours(167), timedelta(days=7), size=10**15),
    ]
    plan = plan_transfers(rows, Known(), Selection(), now=NOW, bytes_per_second=1e6)
    assert [transfer.path.name for transfer in plan.transfers] == ["soon", "week", "new", "old", "hopeless"]
    priorities = [transfer.priority for transfer in plan.transfers]
    assert priorities == sorted(priorities)
    assert all(0 < priority < 2**63 for priority in priorities)


def test_rolling_saves_are_copied_when_the_run_has_stopped() -> None:
    """Newest of its group and settled, or newest with under 45 minutes to live; else skipped."""

    def transferred(*rows: Checkpoint, known: Known | None = None) -> list[str]:
        plan = plan_transfers(rows, known or Known(), Selection(), now=NOW)
        assert len(plan.transfers) + len(plan.skipped) == len(rows)
        return [transfer.path.name for transfer in plan.transfers]

    two = hours(2)
    assert transferred(checkpoint("r", minutes(5), two)) == []
    assert transferred(checkpoint("r", minutes(16), two)) == ["r"]
    assert transferred(checkpoint("r", minutes(16), two), checkpoint("s", minutes(1), two)) == []
    assert transferred(checkpoint("r", minutes(16), two), checkpoint("000020", minutes(1), timedelta(days=7))) == [
        "000020"
    ]
    assert (
        transferred(checkpoint("r", minutes(16), two), checkpoint("x", minutes(1), kind="sampler_weights"))
        == ["x", "r"][::-1]
    )
    assert transferred(checkpoint("r", minutes(10), minutes(50))) == ["r"], "newest, 40 minutes to live: at once"
    # Born to live a week, now with one hour left: never short-lived.
    old = checkpoint("w", hours(167), timedelta(days=7))
    assert transferred(old) == ["w"]
    # Born with two hours, extended since: still a rolling save.
    extended = Checkpoint(old.path, NOW - minutes(5), 1, expires_at=NOW + hours(500))
    born = Known(first_expiry={old.path: (NOW - minutes(5), NOW + hours(1.9))})
    assert transferred(extended, known=born) == []


def test_what_is_here_or_waits_is_not_transferred() -> None:
    """A replica of the same identity; a back-off that is not over; another identity starts anew."""
    row = checkpoint("a", hours(5))
    known = Known({row.path: replica_of(row)})
    plan = plan_transfers([row], known, Selection(), now=NOW)
    assert [c.path for c in plan.mirrored] == [row.path]
    changed = checkpoint("a", hours(4))
    assert plan_transfers([changed], known, Selection(), now=NOW).transfers
    damaged = Known({row.path: replica_of(row, damaged=("x",))})
    assert plan_transfers([row], damaged, Selection(), now=NOW).transfers
    waiting = Known(failures={row.path: failure_of(row)})
    assert plan_transfers([row], waiting, Selection(), now=NOW).waiting
    assert plan_transfers([row], waiting, Selection(), now=NOW + minutes(2)).transfers
    assert plan_transfers([changed], waiting, Selection(), now=NOW).transfers
    refused = Known(failures={row.path: failure_of(row, trouble=Trouble.NOT_SERVED)})
    assert plan_transfers([row], refused, Selection(), now=NOW).skipped


def test_selection_by_type_and_globs() -> None:
    """Types, include, exclude; an unknown type is skipped with its reason; globs match part by part."""
    rows = [
        checkpoint("final", hours(5)),
        checkpoint("final", hours(5), kind="sampler_weights"),
        checkpoint("x", hours(5), kind="hologram"),
    ]
    chosen = Selection(types=("training", "sampler"), include=("*/*/fin*",), exclude=("*/sampler_weights/*",))
    plan = plan_transfers(rows, Known(), chosen, now=NOW)
    assert [t.path.segment for t in plan.transfers] == ["weights"]
    assert {skip.reason.split()[0] for skip in plan.skipped} == {"excluded", "its"}
    assert not rows[0].path.matches("*/final")
    assert not TinkerPath("r", "weights", "a/b").matches("r/weights/*x")


def test_back_off_doubles_to_six_hours_and_leaves_time() -> None:
    """1, 2, 4 minutes … 6 hours, a fifth of jitter at most, never beyond a quarter of the remaining life."""

    def delay(attempts: int, jitter: float = 0.0, expires_at: datetime | None = None) -> timedelta:
        return retry_delay(attempts, expires_at=expires_at, now=NOW, jitter=jitter)

    assert [delay(n) for n in (1, 2, 3, 30, 1000)] == [minutes(1), minutes(2), minutes(4), hours(6), hours(6)]
    assert minutes(0.8) <= delay(1, 0.999) < minutes(1)
    assert delay(30, expires_at=NOW + hours(2)) == minutes(30)
    assert delay(3, expires_at=NOW - hours(1)) == timedelta(0)


def test_five_refusals_are_the_servers_own() -> None:
    """Five different checkpoints and no success in 24 hours; probed after 6; one success ends it."""
    record = ServedRecord()
    for n in range(4):
        record.add_refusal(TinkerPath(RUN, "weights", str(n)), NOW)
    record.add_refusal(TinkerPath(RUN, "weights", "3"), NOW)
    assert not record.server_refuses(NOW)
    record.add_refusal(TinkerPath(RUN, "weights", "4"), NOW)
    assert record.server_refuses(NOW)
    assert not record.server_refuses(NOW + hours(6))
    record.add_success(NOW)
    assert not record.server_refuses(NOW)


def test_a_retry_that_a_wrong_clock_noted_is_due() -> None:
    """Further off than any back-off can be: a clock was ahead when it failed."""
    row = Checkpoint(TinkerPath("r", "weights", "a"), NOW, 1)

    def waits(trouble: Trouble, ahead: timedelta) -> bool:
        failed = Failure(row.path, row.time, 1, trouble, 1, "cut", NOW, NOW + ahead)
        plan = plan_transfers([row], Known(failures={row.path: failed}), Selection(), now=NOW)
        return not plan.transfers

    assert waits(Trouble.FAILING, timedelta(hours=6))
    assert not waits(Trouble.FAILING, timedelta(days=300))
    assert waits(Trouble.NOT_SERVED, timedelta(hours=24))
    assert not waits(Trouble.NOT_SERVED, timedelta(days=300))
