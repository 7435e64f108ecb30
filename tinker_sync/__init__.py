"""tinker-sync: a verified local copy of every checkpoint in a Tinker account.

Where things are, from the bottom up (a module imports only what stands below it; `lint-imports` checks it):

- `errors`, `model`: what can go wrong, sorted by what to do about it; the values everything else speaks of.
- `integrity`, `planning`: pure decisions. What is wrong with these bytes; what to transfer next.
- `ports`: the Protocols between decisions and effects, on one page.
- `transport`: the two HTTP clients, one with the credential and one without, and their retries.
- `api`, `acquire`, `destination`, `catalog`: the adapters: the service, a checkpoint's bytes, the disk, the index.
- `transfer`, `passes`, `scrub`: the order of effects, through ports only.
- `config`, `wiring`, `cli`: settings, the one place that puts everything together, commands.
- `sandbox`: a local server that speaks the same API, for the demo and the tests.

`docs/ARCHITECTURE.md` has the invariants and a table "to change X, touch Y".
"""

__version__ = "0.1.0"
