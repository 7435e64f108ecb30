"""The page, the metrics and the probes: they read and change nothing."""
