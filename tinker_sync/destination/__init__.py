"""The local tree: stages, commits, replicas, quarantine, trash.

- `files`: durable writes, fsync, and OSError turned into words.
- `space`: free space, `min_free`, and what running transfers have reserved.
- `root`: what must hold before a root is used (`root.json`, owner, mount, probes) and what a dead process left.
- `lock`: one writer per root.
- `local`: the tree itself.
- `readback`: reading replicas to compare them with their manifests.
"""
