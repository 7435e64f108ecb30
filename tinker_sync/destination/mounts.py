"""What filesystem a path is on, from `/proc/self/mountinfo`; unknown where there is no such file."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

_NETWORK: Final = (
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "9p",
    "fuse.sshfs",
    "ceph",
    "glusterfs",
    "fuse.glusterfs",
    "afs",
)
_OCTAL: Final = re.compile(r"\\([0-7]{3})")


def _mounts() -> list[tuple[str, str]]:
    """(mount point, type) of every mount, later ones over earlier ones."""
    try:
        text = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) > 4 and kind:
            found.append((_OCTAL.sub(lambda match: chr(int(match.group(1), 8)), fields[4]), kind[0]))
    return found


def filesystem_type(path: Path) -> str:
    """`ext4`, `nfs4` …, or `unknown`."""
    resolved = os.path.realpath(path)
    best, answer = -1, "unknown"
    for point, kind in _mounts():
        inside = point in ("/", resolved) or resolved.startswith(point + "/")
        if inside and len(point) >= best:
            best, answer = len(point), kind
    return answer


def is_network(path: Path) -> bool:
    """Whether locks and WAL on that filesystem prove nothing."""
    return filesystem_type(path) in _NETWORK


def is_mount_point(path: Path) -> bool:
    """Whether something is mounted exactly there."""
    return any(point == os.path.realpath(path) for point, _ in _mounts()) or os.path.ismount(path)
