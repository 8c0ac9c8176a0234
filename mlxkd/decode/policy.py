"""How many requests to decode together, by workload: measured on this hardware, remembered, explained."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from mlxkd.decode.engine import Engine
from mlxkd.decode.requests import Request
from mlxkd.errors import UserError, unknown
from mlxkd.files import write_json
from mlxkd.runtime import device_name, total_memory, versions

Workload = Literal["interactive", "offline"]

MIN_GAIN = 1.10
"""Queue throughput that a batch must reach over one row at a time."""
MAX_DELAY = 1.10
"""Completion time (95th percentile over the queue, waiting included) that a batch may reach over one row."""


@dataclass(frozen=True)
class QueueMeasurement:
    """One run of a whole queue.

    Args:
        batch: rows.
        throughput: new tokens per second of the queue.
        p95_completion: seconds from the start of the queue to the end of a request, 95th percentile.
    """

    batch: int
    throughput: float
    p95_completion: float


@dataclass(frozen=True)
class BatchChoice:
    """The rows to use and why."""

    batch: int
    explanation: str
    measurements: tuple[QueueMeasurement, ...] = ()


def choose(workload: str, measurements: Sequence[QueueMeasurement] = ()) -> BatchChoice:
    """Interactive is always 1; offline takes the fastest size that keeps both promises.

    Raises:
        UserError: an unknown workload, or offline without a measurement of one row.
    """
    if workload not in get_args(Workload):
        raise unknown("workload", workload, get_args(Workload))
    if workload == "interactive":
        return BatchChoice(1, "interactive: one request at a time, so that nobody waits for a batch mate")
    base = next((m for m in measurements if m.batch == 1), None)
    if base is None:
        raise UserError("a batch policy needs a measurement of one row", hint="measure the sizes 1, 2, 4")
    best, reasons = base, []
    for found in sorted(measurements, key=lambda m: m.batch):
        gain, delay = found.throughput / base.throughput, found.p95_completion / base.p95_completion
        said = f"batch {found.batch}: {found.throughput:.0f} tokens/s ({gain:.2f}x), p95 completion {delay:.2f}x"
        if found is base:
            reasons.append(f"batch 1: {found.throughput:.0f} tokens/s, p95 completion {found.p95_completion:.2f} s")
        elif gain < MIN_GAIN:
            reasons.append(f"{said}: gains less than {MIN_GAIN - 1:.0%}")
        elif delay > MAX_DELAY:
            reasons.append(f"{said}: delays more than {MAX_DELAY - 1:.0%}")
        else:
            reasons.append(said)
            best = found if found.throughput > best.throughput else best
    return BatchChoice(best.batch, f"offline: batch {best.batch}. " + "; ".join(reasons), tuple(measurements))


def measure_queue(engine: Engine, requests: Sequence[Request]) -> QueueMeasurement:
    """Run a queue to its end and time it."""
    started = time.perf_counter_ns()
    ends: dict[str, int] = {}
    tokens = 0
    for event in engine.run(requests):
        tokens += 1
        if event.finish:
            ends[event.request] = event.time_ns
    times = np.array([(end - started) / 1e9 for end in ends.values()])
    return QueueMeasurement(engine.session.batch_size, tokens / times.max(), float(np.quantile(times, 0.95)))


def measure_sizes(
    open_engine: Callable[[int], Engine], requests: Sequence[Request], sizes: Sequence[int], rounds: int = 2
) -> list[QueueMeasurement]:
    """The best of ``rounds`` alternating runs for each size, after one warm-up each.

    Raises:
        UserError: size 1 is missing; everything is judged against it.
    """
    if 1 not in sizes:
        raise UserError(f"the sizes {list(sizes)} leave out 1, which all others are judged against")
    engines = {size: open_engine(size) for size in sizes}
    for size in sizes:
        measure_queue(engines[size], list(requests)[: 2 * size])
    runs = [{size: measure_queue(engines[size], requests) for size in sizes} for _ in range(rounds)]
    return [max((run[size] for run in runs), key=lambda m: m.throughput) for size in sizes]


class PolicyCache:
    """Choices by hardware profile and model, in one JSON file."""

    def __init__(self, path: Path):
        self.path = path

    def get(self, profile: str) -> BatchChoice | None:
        """A remembered choice, or None.

        Raises:
            UserError: the file is no such record.
        """
        entry = self._read().get(profile)
        if entry is None:
            return None
        measurements = tuple(QueueMeasurement(**m) for m in entry["measurements"])
        return BatchChoice(entry["batch"], entry["explanation"], measurements)

    def put(self, profile: str, choice: BatchChoice) -> None:
        """Remember a choice."""
        write_json(self.path, {**self._read(), profile: asdict(choice)})

    def _read(self) -> dict[str, Any]:
        if not self.path.is_file():
            return {}
        try:
            return dict(json.loads(self.path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise UserError(f"no batch policy: {error}", where=str(self.path), hint="delete the file") from error


def hardware_profile(model: str, sizes: Sequence[int]) -> str:
    """What a choice depends on: device, memory, MLX's version, model and the sizes allowed."""
    memory = total_memory()
    gib = f"{memory / 2**30:.0f} GiB" if memory else "unknown memory"
    return f"{device_name()}; {gib}; mlx {versions()['mlx']}; {model}; sizes {','.join(map(str, sorted(sizes)))}"


def offline_choice(
    cache: PolicyCache,
    model: str,
    open_engine: Callable[[int], Engine],
    requests: Sequence[Request],
    sizes: Sequence[int] = (1, 2, 4),
) -> BatchChoice:
    """The remembered offline choice for this hardware and model, measured first if there is none."""
    profile = hardware_profile(model, sizes)
    known = cache.get(profile)
    if known is None:
        known = choose("offline", measure_sizes(open_engine, requests, sizes))
        cache.put(profile, known)
    return known
