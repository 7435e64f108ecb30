"""Body → gzip → tar → stage: written once, hashed as it is written, in constant memory.

Blocking; runs in the transfer's writing thread, fed with what the network brought. tar or gzip is told by the bytes:
names and content types of archives lie.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Final

from tinker_sync.acquire.meter import BodyMeter
from tinker_sync.acquire.tar import DirectoryMember, FileBegins, FileData, FileEnds, Framing, Limits, TarReader
from tinker_sync.integrity import judge_body
from tinker_sync.model.evidence import Defect, Kind

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tinker_sync.model.evidence import Claim, SeenFile
    from tinker_sync.ports import FileWriter, StagedObject

_GZIP: Final = b"\x1f\x8b"
_INFLATED_PIECE: Final = 1024 * 1024
_RATIO: Final = 100
_FREE_OF_RATIO: Final = 256 * 1024 * 1024
"""Zeros compress a thousandfold; a few hundred MB of them are a fresh optimizer, more is a bomb."""
_FIRST_LOOK: Final = 512


class Gunzip:
    """Gzip that is fed, with its trailer checked and members concatenated, bounded in what it gives per step."""

    def __init__(self, expected: int | None = None) -> None:
        """`expected` is what it should unpack to, as listed; a few times of that is no bomb."""
        self._free = max(_FREE_OF_RATIO, 4 * (expected or 0))
        self._inflate = zlib.decompressobj(31)
        self._fed = 0
        self._given = 0
        self._between = False
        self.fault: str | None = None

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Give the plain bytes piece by piece; after a fault nothing more comes."""
        self._fed += len(data)
        while data and self.fault is None:
            if self._between:
                data = data.lstrip(b"\0")
                if not data:
                    return
                self._inflate, self._between = zlib.decompressobj(31), False
            try:
                piece = self._inflate.decompress(data, _INFLATED_PIECE)
            except zlib.error as error:
                self.fault = f"its gzip does not unpack ({error})"
                return
            self._given += len(piece)
            if self._given > self._free + _RATIO * self._fed:
                self.fault = f"its gzip unpacks to more than {_RATIO} times its size"
                return
            if piece:
                yield piece
            if self._inflate.eof:
                data, self._between = self._inflate.unused_data, True
            else:
                data = self._inflate.unconsumed_tail

    @property
    def ended(self) -> bool:
        """Whether it stands behind a whole gzip member, trailer checked."""
        return self._between and self.fault is None

    def finish(self) -> str | None:
        """What is wrong, now that the body is over."""
        if self.fault is None and not self._between:
            self.fault = "its gzip is cut"
        return self.fault


class Unpacker:
    """One archive's way into one stage. `feed` and `finish` are blocking."""

    def __init__(
        self, staged: StagedObject, limits: Limits, expected: int | None = None, odd: Sequence[Defect] = ()
    ) -> None:
        """`expected` is the size that the service lists; `odd` what is wrong with the claim itself."""
        self._odd = tuple(odd)
        self._expected = expected
        self._claim = staged.claim
        self._meter = BodyMeter(staged.claim)
        self._staged = staged
        self._limits = limits
        self._first = b""
        self._gunzip: Gunzip | None = None
        self._tar: TarReader | None = None
        self._writer: FileWriter | None = None
        self._defects: list[Defect] = []
        self._files: list[SeenFile] = []

    @property
    def claim(self) -> Claim:
        """What the storage promised."""
        return self._claim

    @property
    def received(self) -> int:
        """Bytes of the body so far."""
        return self._meter.length

    @property
    def hopeless(self) -> bool:
        """Whether only length and digests of the rest still matter."""
        return bool(self._defects) or (self._tar is not None and self._tar.broken)

    @property
    def complete(self) -> bool:
        """Whether the end of the archive was seen, which proves the end of a body that has no other proof."""
        tar_ended = self._tar is not None and self._tar.ended
        return tar_ended and (self._gunzip is None or self._gunzip.ended)

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the body. Raises NoSpace, DiskTrouble."""
        self._meter.update(data)
        if self.hopeless:
            return
        if self._tar is None:
            self._first += data
            if len(self._first) < _FIRST_LOOK:
                return
            data, self._first = self._first, b""
            self._recognise(data)
        self._unpack(data)

    def finish(self, *, cut: bool = False) -> tuple[list[SeenFile], list[Defect]]:
        """The body is over: the files, and every defect of body and archive.

        A wrong length or digest comes first and makes the others its consequence. `cut` says that the body may have
        ended early without a sign, so that a missing end is the transport's fault.
        """
        if self._tar is None and self._first and not self._defects:
            data, self._first = self._first, b""
            self._recognise(data)
            self._unpack(data)
        body_defects = judge_body(self._claim, self._meter.seen(), "archive")
        defects = [*body_defects, *self._archive_defects()]
        if cut and defects and not body_defects:
            defects = [Defect(Kind.TRANSPORT, defect.what, defect.where) for defect in defects]
        return self._files, [*self._odd, *defects]

    def _recognise(self, data: bytes) -> None:
        limits = self._limits
        if data.startswith(_GZIP):
            self._gunzip = Gunzip(self._expected)
            self._staged.cannot_resume("a gzip archive cannot be gone on with in the middle")
        elif not data.strip(b"\0"):
            pass
        elif data[257:262] != b"ustar" and not _is_old_tar(data):
            looks = "HTML or XML" if data.lstrip()[:1] == b"<" else "JSON" if data.lstrip()[:1] == b"{" else "neither"
            what = f"not an archive: neither tar nor gzip{'' if looks == 'neither' else f' but {looks}'}"
            self._defects.append(Defect(Kind.STRUCTURE, what))
        elif self._claim.length is not None:
            limits = Limits(limits.files, limits.total_bytes, self._claim.length)
        self._tar = TarReader(limits)

    def _unpack(self, data: bytes) -> None:
        if self._defects or self._tar is None:
            return
        if self._gunzip is None:
            self._write(self._tar, data)
            return
        for piece in self._gunzip.feed(data):
            self._write(self._tar, piece)
            if self._tar.broken:
                return

    def _write(self, tar: TarReader, data: bytes) -> None:
        for event in tar.feed(data):
            match event:
                case FileData(piece):
                    if self._writer is not None:
                        self._writer.write(piece)
                case FileBegins(path, size):
                    if tar.defects:  # files are passed over from here on: a note would have a hole
                        self._staged.cannot_resume("its archive is defective")
                    self._writer = None if tar.defects else self._staged.write(path, size)
                case FileEnds():
                    if self._writer is not None:
                        self._files.append(self._writer.close())
                    self._writer = None
                case DirectoryMember(path):
                    self._staged.make_directory(path)
                case Framing(piece):
                    self._staged.framing(piece)

    def _archive_defects(self) -> list[Defect]:
        if self._defects:
            return self._defects
        if not self._meter.length:
            return [Defect(Kind.STRUCTURE, "an empty body")]
        if self._tar is None:
            return [Defect(Kind.STRUCTURE, f"not an archive: {self._meter.length} bytes are too few")]
        defects = list(self._tar.finish())
        if self._gunzip is not None and not self._tar.broken and (fault := self._gunzip.finish()) is not None:
            defects.insert(0, Defect(Kind.STRUCTURE, fault))
        return defects


def _is_old_tar(data: bytes) -> bool:
    """Whether a block without magic is a header all the same (pre-POSIX tar): its checksum says so."""
    if len(data) < 512:
        return False
    try:
        stored = int(data[148:156].strip(b" \0") or b"x", 8)
    except ValueError:
        return False
    return stored == sum(data[:148]) + 256 + sum(data[156:512])
