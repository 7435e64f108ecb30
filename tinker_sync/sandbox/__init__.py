"""A local server that speaks the Tinker API, for the demo and the tests: loopback only, all state in memory.

- `adapters`: generated PEFT adapters with valid safetensors, and archives of them, made while they are sent.
- `account`: runs and checkpoints, with TTLs that expire.
- `faults`: what the server can be told to do wrong.
- `server`: the API and, on another origin, the storage with its signed URLs.

It knows nothing of the rest of the package but `model` and `errors`: what it says is what the API says, not what the
mirror expects.
"""

from tinker_sync.sandbox.account import SandboxAccount, SandboxCheckpoint
from tinker_sync.sandbox.adapters import Payload, PayloadFile, adapter
from tinker_sync.sandbox.faults import Fault, Quirks
from tinker_sync.sandbox.server import Sandbox

__all__ = ["Fault", "Payload", "PayloadFile", "Quirks", "Sandbox", "SandboxAccount", "SandboxCheckpoint", "adapter"]
