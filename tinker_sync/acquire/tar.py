"""A tar reader that is fed: bytes go in as they come, events come out, and no thread waits in a read.

`tarfile` as a stream takes an archive cut at a member boundary for a whole one, holds an extended header of any size
in memory, and would write links, devices and `..`. This reader wants the end-of-archive marker, bounds what it holds
(1 MiB of extended header, one open member), and passes on regular files and directories alone. Modes and owners are
ignored. Only the 512-byte header is `tarfile`'s (`TarInfo.frombuf`), with its three dialects of numbers and names.

What is wrong with one member becomes a defect and the member is passed over, so that all defects are known at the
end; after a header that cannot be read there is nothing more to find, and the rest is ignored.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from tinker_sync.acquire.names import NameRegister
from tinker_sync.model.evidence import Defect, Kind
from tinker_sync.model.paths import PathInvalid, PayloadPath

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK: Final = 512
EXTENDED_LIMIT: Final = 1024 * 1024
_EXTENDED_IN_ALL: Final = 64 * 1024 * 1024
_ZEROS: Final = bytes(BLOCK)

_REGULAR: Final = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_PAX: Final = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_WITHOUT_DATA: Final = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a character device",
    tarfile.BLKTYPE: "a block device",
    tarfile.FIFOTYPE: "a FIFO",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What one archive may unpack to."""

    files: int = 100_000
    total_bytes: int = 1 << 44
    member_bytes: int | None = None
    """The largest a member can truly be, where the archive's own length is known (a plain tar's)."""


@dataclass(frozen=True, slots=True)
class FileBegins:
    """A regular file starts; its data follows."""

    path: PayloadPath
    size: int


@dataclass(frozen=True, slots=True)
class FileData:
    """The next bytes of the file that began; valid until the next event is asked for."""

    data: memoryview


@dataclass(frozen=True, slots=True)
class FileEnds:
    """The file is whole."""


@dataclass(frozen=True, slots=True)
class DirectoryMember:
    """A directory; parents of files are implied and need none."""

    path: PayloadPath


@dataclass(frozen=True, slots=True)
class Framing:
    """Bytes of the archive that are in no file: headers, padding, members that are passed over."""

    data: memoryview


Event = FileBegins | FileData | FileEnds | DirectoryMember | Framing


@dataclass(slots=True)
class _Extended:
    """Extended headers that apply to the next member."""

    path: str | None = None
    size: int | None = None
    faults: list[str] = field(default_factory=list)


class TarReader:
    """Feed it a plain tar; ask `finish` for what is wrong with it.

    Not reusable; not thread-safe.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._header = bytearray()
        self._extended_kind = b""
        self._extended_body = bytearray()
        self._extended_left = 0
        self._extended_total = 0
        self._pending = _Extended()
        self._left = 0
        self._padding = 0
        self._passing = False
        self._zero_blocks = 0
        self._broken = False
        self._trailing = False
        self._names = NameRegister()
        self._total = 0
        self._members = 0
        self.defects: list[Defect] = []

    @property
    def broken(self) -> bool:
        """Whether nothing more can be learnt from further bytes."""
        return self._broken

    @property
    def ended(self) -> bool:
        """Whether the end-of-archive marker was seen."""
        return self._zero_blocks >= 2

    def feed(self, data: bytes | memoryview) -> Iterator[Event]:
        """Take the next bytes, of any length, and give what they complete."""
        view = memoryview(data)
        position, end = 0, len(view)
        while position < end and not self._broken:
            if self.ended:
                self._look_at_trailing(view[position:])
                return
            if self._left:
                piece = view[position : position + self._left]
                position += len(piece)
                self._left -= len(piece)
                if self._passing:
                    yield Framing(piece)
                else:
                    yield FileData(piece)
                    if not self._left:
                        yield FileEnds()
            elif self._extended_left:
                piece = view[position : position + self._extended_left]
                position += len(piece)
                self._extended_left -= len(piece)
                self._extended_body += piece
                yield Framing(piece)
                if not self._extended_left:
                    self._take_extended()
            elif self._padding:
                piece = view[position : position + self._padding]
                position += len(piece)
                self._padding -= len(piece)
                yield Framing(piece)
            else:
                piece = view[position : position + BLOCK - len(self._header)]
                position += len(piece)
                self._header += piece
                yield Framing(piece)
                if len(self._header) == BLOCK:
                    block = bytes(self._header)
                    self._header.clear()
                    yield from self._take_header(block)

    def finish(self) -> list[Defect]:
        """The body is over: everything that is wrong with the archive."""
        if not self._broken:
            if self._left or self._padding or self._extended_left or self._header:
                self._defect("cut in the middle of a member")
            elif not self.ended:
                self._defect("cut: the end-of-archive marker is missing")
            elif not self._members and not self.defects:
                self._defect("empty: it has no member")
        if self._trailing:
            self._defect("something follows the end of the archive")
        return self.defects

    def _defect(self, what: str, where: str = "") -> None:
        if len(self.defects) < 100:
            self.defects.append(Defect(Kind.STRUCTURE, what, where))

    def _give_up(self, what: str) -> None:
        self._defect(what)
        self._broken = True

    def _look_at_trailing(self, rest: memoryview) -> None:
        if not self._trailing and any(
            bytes(rest[at : at + 65536]).count(0) != len(rest[at : at + 65536]) for at in range(0, len(rest), 65536)
        ):
            self._trailing = True

    def _take_header(self, block: bytes) -> Iterator[Event]:
        if block == _ZEROS:
            self._zero_blocks += 1
            return
        if self._zero_blocks:
            self._give_up("a single zero block stands where a member or the end should be")
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            self._give_up(f"not a tar header at member {self._members + 1} ({error})")
            return
        if info.size < 0:
            self._give_up(f"a member of negative size at member {self._members + 1}")
            return
        if info.type in (*_PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            self._extended_total += info.size
            if info.size > EXTENDED_LIMIT or self._extended_total > _EXTENDED_IN_ALL:
                self._give_up(f"an extended header of {info.size:,} bytes (1 MiB is the most, and 64 MiB in all)")
                return
            self._extended_kind = info.type
            self._extended_body.clear()
            self._extended_left = info.size
            self._padding = -info.size % BLOCK
            return
        yield from self._take_member(info)

    def _take_extended(self) -> None:
        body, kind = bytes(self._extended_body), self._extended_kind
        self._extended_body.clear()
        if kind == tarfile.GNUTYPE_LONGNAME:
            self._pending.path = body.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
        elif kind == tarfile.GNUTYPE_LONGLINK:
            pass
        else:
            try:
                records = dict(_pax_records(body))
            except ValueError as error:
                self._give_up(f"an extended header that does not parse ({error})")
                return
            self._take_pax(records, everywhere=kind == tarfile.XGLTYPE)

    def _take_pax(self, records: dict[str, str], *, everywhere: bool) -> None:
        if everywhere:
            if "path" in records or "size" in records:
                self._give_up("a global header that renames or resizes every member")
            return
        if any(key.startswith("GNU.sparse") for key in records):
            self._pending.faults.append("a sparse file")
        if "path" in records:
            self._pending.path = records["path"]
        if "size" in records:
            text = records["size"]
            if not (text.isascii() and text.isdigit() and len(text) <= 18):
                self._give_up(f"an extended header with the size {text[:30]!r}")
                return
            self._pending.size = int(text)

    def _take_member(self, info: tarfile.TarInfo) -> Iterator[Event]:
        pending, self._pending = self._pending, _Extended()
        name = info.name if pending.path is None else pending.path
        size = info.size if pending.size is None else pending.size
        is_directory = info.type == tarfile.DIRTYPE or (info.type in _REGULAR and name.endswith("/"))
        self._members += 1
        if self._members > self._limits.files:
            self._give_up(f"more than {self._limits.files:,} members")
            return
        if info.type in _WITHOUT_DATA or is_directory:
            size = 0
        self._left, self._padding, self._passing = size, -size % BLOCK, True
        if not self._size_possible(name, size):
            return
        if is_directory and not name.strip("./"):
            if ".." in name.split("/"):
                self._defect("'..' in the name", repr(name))
            return
        fault = self._kind_fault(info, pending)
        try:
            path = PayloadPath.parse(name)
        except PathInvalid as error:
            self._defect(str(error))
            return
        if fault is not None:
            self._defect(f"is {fault}; only regular files and directories are taken", str(path))
            return
        clash = self._names.add(path, is_directory=is_directory)
        if clash is not None:
            self._defect(clash, str(path))
            return
        self._passing = False
        if is_directory:
            yield DirectoryMember(path)
            return
        yield FileBegins(path, size)
        if not size:
            yield FileEnds()

    def _size_possible(self, name: str, size: int) -> bool:
        self._total += size
        if self._limits.member_bytes is not None and size > self._limits.member_bytes:
            self._give_up(f"{name[:80]!a} claims {size:,} bytes, the whole archive has {self._limits.member_bytes:,}")
            return False
        if self._total > self._limits.total_bytes:
            self._give_up(f"unpacks to more than {self._limits.total_bytes:,} bytes")
            return False
        return True

    def _kind_fault(self, info: tarfile.TarInfo, pending: _Extended) -> str | None:
        if pending.faults:
            return pending.faults[0]
        if info.type in _WITHOUT_DATA:
            return _WITHOUT_DATA[info.type]
        if info.type == tarfile.GNUTYPE_SPARSE:
            return "a sparse file"
        if info.type not in _REGULAR and info.type != tarfile.DIRTYPE:
            return f"of the unknown type {info.type!r}"
        return None


def _pax_records(body: bytes) -> Iterator[tuple[str, str]]:
    """`<length> <key>=<value>` and a newline, repeated (POSIX.1-2001 pax).

    Raises ValueError.
    """
    body = body.rstrip(b"\0")
    position = 0
    while position < len(body):
        space = body.find(b" ", position, position + 12)
        if space < 0 or not body[position:space].isdigit():
            message = "a record without length"
            raise ValueError(message)
        end = position + int(body[position:space])
        record = body[space + 1 : end - 1]
        if end > len(body) or end <= space + 1 or body[end - 1 : end] != b"\n" or b"=" not in record:
            message = "a record of the wrong length"
            raise ValueError(message)
        key, _, value = record.partition(b"=")
        yield key.decode("utf-8", "replace"), value.decode("utf-8", "surrogateescape")
        position = end
