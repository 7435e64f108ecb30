"""An account: runs and checkpoints in memory, TTLs that expire by the clock that it was given."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from tinker_sync.model.paths import SEGMENT_OF_TYPE, TinkerPath
from tinker_sync.sandbox.adapters import Payload, adapter

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(slots=True)
class SandboxRun:
    """A training run."""

    training_run_id: str
    base_model: str
    lora_rank: int
    last_request_time: datetime
    user_metadata: dict[str, str] | None = None


@dataclass(slots=True)
class SandboxCheckpoint:
    """A checkpoint and its bytes."""

    path: TinkerPath
    time: datetime
    payload: Payload
    expires_at: datetime | None = None
    public: bool = False
    user_metadata: dict[str, str] | None = None
    size_bytes: int | None = None
    built_at: float | None = None
    destroyed: bool = False
    """Listed, but its bytes are gone."""


@dataclass(slots=True)
class SandboxAccount:
    """Everything that the server knows."""

    now: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))
    runs: dict[str, SandboxRun] = field(default_factory=dict)
    checkpoints: dict[TinkerPath, SandboxCheckpoint] = field(default_factory=dict)
    deleted: list[TinkerPath] = field(default_factory=list)

    def add_run(self, run_id: str | None = None, *, base_model: str = "Qwen/Qwen3-8B", lora_rank: int = 8) -> str:
        """A new run; its id looks like the service's."""
        chosen = run_id or f"{uuid.uuid4()}:train:0"
        self.runs[chosen] = SandboxRun(chosen, base_model, lora_rank, self.now())
        return chosen

    def add(
        self,
        run_id: str,
        name: str,
        kind: str = "training",
        *,
        payload: Payload | None = None,
        time: datetime | None = None,
        ttl: timedelta | None = None,
        user_metadata: dict[str, str] | None = None,
        size_bytes: int | None = None,
    ) -> SandboxCheckpoint:
        """A new checkpoint, or another object under the same path."""
        if run_id not in self.runs:
            self.add_run(run_id)
        path = TinkerPath(run_id, SEGMENT_OF_TYPE.get(kind, kind), name)
        at = time or self.now()
        chosen = payload or adapter(hash(str(path)) & 0xFFFF, optimizer=kind == "training", marker=kind != "external")
        made = SandboxCheckpoint(
            path,
            at,
            chosen,
            None if ttl is None else at + ttl,
            user_metadata=user_metadata,
            size_bytes=chosen.total_bytes if size_bytes is None else size_bytes,
        )
        self.checkpoints[path] = made
        return made

    def living(self) -> list[SandboxCheckpoint]:
        """What has not expired, newest first."""
        now = self.now()
        for path, checkpoint in list(self.checkpoints.items()):
            if checkpoint.expires_at is not None and checkpoint.expires_at <= now:
                del self.checkpoints[path]
        order = {path: index for index, path in enumerate(self.checkpoints)}
        return sorted(self.checkpoints.values(), key=lambda item: (item.time, order[item.path]), reverse=True)

    def find(self, path: TinkerPath) -> SandboxCheckpoint | None:
        """One that is alive."""
        found = self.checkpoints.get(path)
        if found is None or (found.expires_at is not None and found.expires_at <= self.now()):
            return None
        return found
