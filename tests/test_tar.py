"""The fed tar reader: what it takes, what it refuses, and that no cut goes unnoticed."""

from __future__ import annotations

import gzip
import io
import tarfile
import tracemalloc
import unicodedata
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.archives import member, tar_of
from tinker_sync.acquire.tar import DirectoryMember, FileBegins, FileData, FileEnds, Limits, TarReader
from tinker_sync.acquire.unpack import Gunzip
from tinker_sync.sandbox import adapter

if TYPE_CHECKING:
    from tinker_sync.model.evidence import Defect


def read(data: bytes, step: int = 10_000, limits: Limits | None = None) -> tuple[dict[str, bytes], list[Defect]]:
    """Feed in steps; the files that were whole, and the defects."""
    reader = TarReader(limits or Limits())
    files: dict[str, bytes] = {}
    name, content = "", bytearray()
    for start in range(0, len(data), step):
        for event in reader.feed(data[start : start + step]):
            match event:
                case FileBegins(path, _):
                    name, content = str(path), bytearray()
                case FileData(piece):
                    content += piece
                case FileEnds():
                    files[name] = bytes(content)
                case DirectoryMember(path):
                    files[f"{path}/"] = b""
    return files, reader.finish()


names = st.text(
    st.characters(codec="utf-8", exclude_characters="/\\", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=40
)


@given(
    st.dictionaries(names.filter(lambda n: n not in (".", "..")), st.binary(max_size=2000), max_size=5),
    st.integers(1, 1500),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
@settings(max_examples=150, deadline=None)
def test_what_tarfile_writes_is_read_back_in_any_steps(files: dict[str, bytes], step: int, dialect: int) -> None:
    """Any regular files, either dialect, fed in steps of any length: the same files."""
    distinct = {unicodedata.normalize("NFC", name).casefold(): name for name in files}
    chosen = {name: files[name] for name in distinct.values() if name.casefold() != ".tinker-sync.json"}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=dialect) as archive:
        for name, content in chosen.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    found, defects = read(out.getvalue(), step)
    assert found == chosen
    assert [d.what for d in defects] == ([] if chosen else ["empty: it has no member"])


def test_no_truncation_goes_unnoticed() -> None:
    """An archive cut at any byte before its end-of-archive marker has a defect; at a member boundary too."""
    data = tar_of(member("a", b"x" * 700), member("dir/b", b"y" * 512), member("empty"))
    for cut in range(len(data) - 512):
        _, defects = read(data[:cut])
        assert defects, f"cut at {cut} of {len(data)} was taken for whole"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (tar_of(member("/etc/passwd", b"x")), "absolute name"),
        (tar_of(member("../up", b"x")), "'..'"),
        (tar_of(member("a/../../up", b"x")), "'..'"),
        (tar_of(member("a", type=tarfile.SYMTYPE, linkname="/etc")), "symbolic link"),
        (tar_of(member("a", type=tarfile.LNKTYPE, linkname="b")), "hard link"),
        (tar_of(member("a", type=tarfile.CHRTYPE)), "character device"),
        (tar_of(member("a", type=tarfile.BLKTYPE)), "block device"),
        (tar_of(member("a", type=tarfile.FIFOTYPE)), "FIFO"),
        (tar_of(member("a", type=tarfile.GNUTYPE_SPARSE)), "sparse"),
        (tar_of(member("a", pax_headers={"GNU.sparse.major": "1"})), "sparse"),
        (tar_of(member("a", type=b"Z")), "unknown type"),
        (tar_of(member("a", b"1"), member("a", b"2")), "twice"),
        (tar_of(member("a", b"1"), member("./a", b"2")), "twice"),
        (tar_of(member("Model", b"1"), member("model", b"2")), "case or Unicode"),
        (tar_of(member("caf\u00e9", b"1"), member("cafe\u0301", b"2")), "case or Unicode"),
        (tar_of(member("A/x", b"1"), member("a/y", b"2")), "case or Unicode"),
        (tar_of(member("a", b"1"), member("a/b", b"2")), "which is a file"),
        (tar_of(member("a/b", b"1"), member("a", b"2")), "file and a directory"),
        (tar_of(member(".tinker-sync.json", b"{}")), "reserved"),
        (tar_of(member(".Tinker-Sync.JSON", b"{}")), "reserved"),
        (tar_of(member("x/.tinker-sync.json", b"{}")), "reserved"),
        (tar_of(member("a\x1b[2J", b"1")), "control character"),
        (tar_of(member("a\\b", b"1")), "backslash"),
        (tar_of(member("n" * 300, b"1")), "300 bytes"),
        (tar_of(member("a/" * 1500 + "f", b"1")), "1,501 components"),
        (tar_of(member("", b"1")), "empty name"),
        (tar_of(member("a", pax_headers={"size": "-1"})), "size"),
        (tar_of(member("a", pax_headers={"comment": "x" * 2_000_000})), "extended header of"),
        (tar_of(), "empty"),
        (bytes(10240), "empty"),
        (tar_of(member("a", b"1")) + b"more", "follows the end"),
        (tar_of(member("a", b"1"))[:-1024] + bytes(512) + tar_of(member("b", b"2")), "single zero block"),
    ],
)
def test_what_a_mirror_must_not_write_is_a_defect(data: bytes, said: str) -> None:
    """Each is named in words, and gives no file of that member."""
    _, defects = read(data)
    assert any(said in str(defect) for defect in defects), [str(defect) for defect in defects]


def test_all_bad_members_are_named_not_only_the_first() -> None:
    """Three bad members among good ones: three defects."""
    data = tar_of(member("../a"), member("good", b"1"), member("l", type=tarfile.SYMTYPE), member("/b"))
    found, defects = read(data)
    assert len(defects) == 3
    assert found == {"good": b"1"}


def test_a_size_beyond_the_archive_is_refused_at_its_header() -> None:
    """A member that claims more than the whole archive has is refused before a byte of it is written."""
    info, _ = member("a")
    info.size = 10**12
    found, defects = read(info.tobuf(), limits=Limits(member_bytes=5000))
    assert not found
    assert "claims 1,000,000,000,000 bytes" in str(defects[0])


def test_more_than_the_limit_is_refused() -> None:
    """Unpacking stops at the limit of bytes and of members."""
    data = tar_of(*(member(f"f{n}", b"x" * 1000) for n in range(10)))
    assert "more than 5,000 bytes" in str(read(data, limits=Limits(total_bytes=5000))[1][0])
    assert "more than 3 members" in str(read(data, limits=Limits(files=3))[1][0])


def test_roots_without_a_name_and_leading_dots_mean_nothing() -> None:
    """An empty-named or `./` root member is normal, and `./a` is `a`."""
    data = tar_of(
        member("", type=tarfile.DIRTYPE, mode=0o700),
        member("./", type=tarfile.DIRTYPE),
        member("./a", b"1", mode=0o777, uid=12345),
        member("d", type=tarfile.DIRTYPE),
    )
    assert read(data) == ({"a": b"1", "d/": b""}, [])


def test_an_extended_header_does_not_grow_the_memory() -> None:
    """200 MB of PAX header, fed in pieces, are refused without being held."""
    info, _ = member("a")
    info.size, info.type = 200_000_000, tarfile.XHDTYPE
    header = info.tobuf(tarfile.USTAR_FORMAT)
    reader = TarReader(Limits())
    tracemalloc.start()
    list(reader.feed(header))
    for _ in range(50):
        list(reader.feed(bytes(100_000)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000
    assert "extended header" in str(reader.finish()[0])


def test_gzip_is_cut_wrong_and_a_bomb() -> None:
    """The trailer counts, a cut is seen at every byte, concatenated members are one stream, a bomb stops."""
    plain = adapter(1).archive_bytes()
    packed = gzip.compress(plain)

    def unpack(data: bytes) -> tuple[bytes, str | None]:
        gunzip = Gunzip()
        out = b"".join(gunzip.feed(data))
        return out, gunzip.finish()

    assert unpack(packed) == (plain, None)
    assert unpack(packed + packed) == (plain + plain, None)
    assert unpack(packed + bytes(100)) == (plain, None)
    assert unpack(packed[:-6] + b"\0\0\0\0" + packed[-2:])[1] is not None
    for cut in range(1, len(packed), 97):
        assert unpack(packed[:cut])[1] == "its gzip is cut"
    bomb = gzip.compress(bytes(400_000_000))
    assert "100 times" in (unpack(bomb)[1] or "")
