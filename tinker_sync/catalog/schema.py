"""Tables. Times are integer microseconds UTC; keys are tinker paths, and directories as encoded on disk."""

from __future__ import annotations

from typing import Final

from sqlalchemy import BigInteger, Boolean, Column, Integer, MetaData, String, Table, Text

SCHEMA_VERSION: Final = 2
"""Another version in the file means: rebuild from the tree."""

metadata = MetaData()

facts = Table(
    "facts",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("value", Text, nullable=False),
)
"""Single values as JSON: schema version, last pass, what was learnt about the server."""

replicas = Table(
    "replicas",
    metadata,
    Column("directory", String(700), primary_key=True),
    Column("tinker_path", String(700), nullable=False, index=True),
    Column("time", BigInteger, nullable=False),
    Column("size_bytes", BigInteger),
    Column("total_bytes", BigInteger, nullable=False),
    Column("files", Integer, nullable=False),
    Column("fidelity", String(16), nullable=False),
    Column("source", String(16), nullable=False),
    Column("committed_at", BigInteger, nullable=False),
    Column("verified_at", BigInteger, nullable=False),
    Column("manifest_sha256", String(64), nullable=False),
    Column("expires_at", BigInteger),
    Column("first_expires_at", BigInteger),
    Column("superseded", Boolean, nullable=False),
    Column("user_metadata", Text),
    Column("damaged", Text, nullable=False),
)

upstream = Table(
    "upstream",
    metadata,
    Column("tinker_path", String(700), primary_key=True),
    Column("time", BigInteger, nullable=False),
    Column("size_bytes", BigInteger),
    Column("public", Boolean, nullable=False),
    Column("expires_at", BigInteger),
    Column("first_expires_at", BigInteger),
    Column("user_metadata", Text),
    Column("listed_id", String(700), nullable=False),
    Column("first_seen_at", BigInteger, nullable=False),
)
"""What the service showed last, less what a proven listing no longer has."""

deeds = Table(
    "deeds",
    metadata,
    Column("tinker_path", String(700), primary_key=True),
    Column("second", BigInteger, primary_key=True),
    Column("time", BigInteger, nullable=False),
    Column("size_bytes", BigInteger),
    Column("state", String(16), nullable=False),
    Column("action", String(16), nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("retry_at", BigInteger),
    Column("former_expires_at", BigInteger),
    Column("ends_at", BigInteger),
    Column("detail", Text, nullable=False),
)
"""What was last done to an object upstream, one row for each path and second: the journal's events, folded."""

standing = Table(
    "standing",
    metadata,
    Column("tinker_path", String(700), primary_key=True),
    Column("time", BigInteger, nullable=False),
    Column("since", BigInteger, nullable=False),
)
"""Since when each checkpoint has had a verdict that lets it go upstream. Lost with the catalog: that only delays."""

failures = Table(
    "failures",
    metadata,
    Column("tinker_path", String(700), primary_key=True),
    Column("time", BigInteger, nullable=False),
    Column("size_bytes", BigInteger),
    Column("trouble", String(16), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("error", Text, nullable=False),
    Column("failed_at", BigInteger, nullable=False),
    Column("retry_at", BigInteger, nullable=False),
    Column("defects", Text, nullable=False),
    Column("quarantine", Text, nullable=False),
)
