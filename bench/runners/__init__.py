"""Runners: each module measures one kind of target and is named after it."""

from bench.runners._job import Job, Outcome

__all__ = ["Job", "Outcome"]
