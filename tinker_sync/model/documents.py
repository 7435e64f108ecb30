"""JSON as it stands in files: readable, and writable whatever a server put into its strings."""

from __future__ import annotations

import json


def json_bytes(document: object, *, indent: int | None = 1) -> bytes:
    """UTF-8 with one newline at the end; escaped where a string is no valid Unicode (a lone surrogate).

    Without `indent` it is on one line, and made many times faster.
    """
    try:
        return (json.dumps(document, indent=indent, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(document, indent=indent) + "\n").encode()
