"""The Tinker REST API: usable as a library by itself.

```python
async with open_rest_client() as client:              # credential and base URL as the official SDK finds them
    page = await client.list_user_checkpoints(limit=100)
```

- `client`: `RestClient`, one coroutine per documented call, under the documented names.
- `wire`: the answers as Pydantic models that bear with unknown fields, types and naive times.
- `credentials`: where the credential comes from, and its exchange for a JWT.
- `listing`: offset pages into a `Listing` that is proven complete, or a `Sighting`.
- `account`: the same account as flow sees it (`ports.Account`, `ports.Signer`).
"""

from tinker_sync.api.client import RestClient, open_rest_client

__all__ = ["RestClient", "open_rest_client"]
