"""The values that everything else speaks of: frozen, parsed once, without I/O.

- `paths`: `TinkerPath`, `PayloadPath`, `SignedUrl`: strings that proved something when they were made.
- `checkpoint`: `Checkpoint`, `Identity`, `Sighting` and `Listing`.
- `manifest`: what a replica says about itself.
- `evidence`: `Claim`, `SeenFile`, `Defect`: what was promised, seen, and wrong.
- `names`: how a tinker path becomes a directory, and back.
- `work`: `Transfer` and what became of it.
- `documents`: JSON as it stands in files.
- `moments`: RFC 3339 and aware UTC.
"""
