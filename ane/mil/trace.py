"""A record of every intermediate of one prediction, for finding where two runs part or a value overflows."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from ane.mil.plan import Step
from ane.mil.types import TensorType

FP16_MAX = 65504.0


@dataclass(frozen=True)
class Entry:
    """One intermediate.

    Args:
        name: the value's name in the program; in a loop it occurs once per turn.
        operation: the operation that made it.
        dtype: declared dtype.
        low, high: least and greatest finite value, None when there is none.
        nan, inf: how many there are.
        overflow: values declared fp16 that lie beyond its range (in "exact" mode they are carried on regardless).
        value: the array, when the trace keeps values.
    """

    name: str
    operation: str
    dtype: str
    shape: tuple[int, ...]
    low: float | None
    high: float | None
    nan: int
    inf: int
    overflow: int
    value: np.ndarray | None = None

    @property
    def suspect(self) -> bool:
        """Whether it holds NaN, Inf or a value beyond fp16."""
        return bool(self.nan or self.inf or self.overflow)


class Trace:
    """Entries in the order they were computed, and the outputs."""

    def __init__(self, keep: bool = True):
        self.keep = keep
        self.entries: list[Entry] = []
        self.outputs: dict[str, Any] = {}

    def observe(self, step: Step, results: tuple[Any, ...]) -> None:
        """Note the results of one operation; lists and other non-arrays are left out."""
        for (name, declared), value in zip(step.outputs, results, strict=True):
            if isinstance(declared, TensorType) and isinstance(value, np.ndarray):
                self.entries.append(_entry(name, step.operation.name, declared, value, self.keep))

    def __getitem__(self, name: str) -> np.ndarray:
        """The last value called ``name``; raises KeyError."""
        for entry in reversed(self.entries):
            if entry.name == name and entry.value is not None:
                return entry.value
        raise KeyError(name)

    def suspects(self) -> list[Entry]:
        """Entries with NaN, Inf or overflow, first ones first."""
        return [entry for entry in self.entries if entry.suspect]


class Profile:
    """Seconds by operation, each with the executor's own work around it."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.last = time.perf_counter()

    def start(self) -> None:
        """Begin to count; what happened before belongs to no operation."""
        self.last = time.perf_counter()

    def observe(self, step: Step, results: tuple[Any, ...]) -> None:
        """Charge the time since the last operation to this one."""
        now = time.perf_counter()
        self.seconds[step.operation.name] += now - self.last
        self.last = now


def _entry(name: str, operation: str, declared: TensorType, value: np.ndarray, keep: bool) -> Entry:
    nan = inf = overflow = 0
    finite = value
    if value.dtype.kind == "f":
        nan, inf = int(np.isnan(value).sum()), int(np.isinf(value).sum())
        finite = value[np.isfinite(value)] if nan or inf else value
        if declared.dtype == "fp16":
            overflow = int((np.abs(finite) > FP16_MAX).sum())
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (None, None)
    # An in-place update may overwrite the array later.
    kept = value.copy() if keep else None
    return Entry(name, operation, declared.dtype, value.shape, low, high, nan, inf, overflow, kept)
