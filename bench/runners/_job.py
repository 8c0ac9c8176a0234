"""What a runner is told and what it answers; both travel between processes as JSON."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from bench.results import Strict
from bench.workloads import Load, load


class Job(Strict):
    """One round of one target."""

    kind: Literal["mlx", "bundle", "endpoint"]
    location: str
    workload: str
    max_tokens: int = 64
    requests: int | None = None
    records: str | None = None
    batch: int | Literal["auto"] = "auto"
    draft: Literal["none", "ngram"] = "none"
    model: str | None = None
    seed: int = 0
    passes: int = 1

    def load(self) -> Load:
        """The workload."""
        return load(self.workload, max_tokens=self.max_tokens, requests=self.requests, records=self.records)


class Outcome(Strict):
    """What a round brought.

    ``answers`` are texts by request; ``scores`` are per-case scores in [0, 1] by name; ``passes`` hold the answers of
    every pass of determinism mode.
    """

    samples: dict[str, list[float | None]]
    counters: dict[str, float | None] = Field(default_factory=dict)
    answers: list[str] = Field(default_factory=list)
    scores: dict[str, list[float]] = Field(default_factory=dict)
    passes: list[list[str]] = Field(default_factory=list)
    device: str
    backend: str
    details: dict[str, Any] = Field(default_factory=dict)
