"""Ways to bring a checkpoint's bytes into a stage.

- `tar`: a tar reader that is fed bytes, and refuses what a mirror must not write.
- `unpack`: body → gzip → tar → stage, in constant memory, hashed on the way.
- `meter`: the digests that a storage promised, computed as bytes go by.
- `archive`, `files`, `directory`: the three ways; each tries once, `transfer` decides about another attempt.

None of them knows the API: a port signs a path, another opens a signed URL.
"""
