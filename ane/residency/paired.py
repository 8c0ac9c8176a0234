"""Paired latency: the same decode step on the CPU alone and with the Neural Engine allowed, in turns."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ane.residency.signals import paired_speedup

UNITS = ("cpu_only", "cpu_and_ne")
WARM_UP = 3  # steps of each side that are thrown away: the first ones load and specialise

Open = Callable[..., Any]


@dataclass(frozen=True)
class PairedLatency:
    """Seconds of one decode step on each side, in the order of the pairs."""

    cpu_only: tuple[float, ...]
    with_ane: tuple[float, ...]

    @property
    def speedup(self) -> float:
        """Median CPU-only time over median time with the Neural Engine; evidence of use, never a residency."""
        return paired_speedup(self.cpu_only, self.with_ane)

    def __str__(self) -> str:
        slow, fast = (1e3 * float(np.median(side)) for side in (self.cpu_only, self.with_ane))
        return (
            f"a decode step takes {slow:.2f} ms on the CPU alone, {fast:.2f} ms with the Neural Engine allowed "
            f"({self.speedup:.2f} times as fast; medians of {len(self.cpu_only)} pairs)"
        )


def measure(
    bundle: Path, *, pairs: int, open_session: Open | None = None, clock: Callable[[], float] = time.perf_counter
) -> PairedLatency:
    """Time single decode steps of a bundle, both sides on the same token, in random order within each pair.

    Args:
        bundle: what `mlxkd export --to coreml` wrote.
        pairs: timed pairs, three at least.
        open_session: ``ane.runtime.open_session`` or a stand-in that takes (bundle, backend, units=...).
        clock: seconds.

    Raises:
        UserError: this is not macOS, or Core ML refuses the bundle.
    """
    if open_session is None:
        from ane.runtime import open_session
    sides = {units: open_session(bundle, "coreml", units=units) for units in UNITS}
    times: dict[str, list[float]] = {units: [] for units in UNITS}
    order = random.Random(0)
    for number in range(WARM_UP + pairs):
        for units in order.sample(UNITS, 2):
            session = sides[units]
            if session.lengths[0] + 1 > session.max_context:
                session.rewind([0])
            started = clock()
            np.asarray(session.extend(np.array([[1 + number % 7]], dtype=np.int32)))
            if number >= WARM_UP:
                times[units].append(clock() - started)
    return PairedLatency(tuple(times["cpu_only"]), tuple(times["cpu_and_ne"]))
