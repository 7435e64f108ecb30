"""Archives that no honest server makes."""

from __future__ import annotations

import io
import tarfile


def member(name: str, content: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    """One member with any header."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def tar_of(*members: tuple[tarfile.TarInfo, bytes], ended: bool = True, dialect: int = tarfile.PAX_FORMAT) -> bytes:
    """A plain tar of these; `ended` puts the end-of-archive marker."""
    out = io.BytesIO()
    for info, content in members:
        out.write(info.tobuf(dialect))  # type: ignore[arg-type]
        out.write(content + bytes(-len(content) % 512))
    if ended:
        out.write(bytes(1024))
    return out.getvalue()
