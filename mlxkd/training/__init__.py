"""The loop, its state on disk, its schedule, and what watches it."""
