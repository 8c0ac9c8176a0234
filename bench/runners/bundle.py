"""A converted bundle: on Core ML on a Mac, on the MIL reference runtime elsewhere."""

from __future__ import annotations

import sys
import time

from bench.runners._job import Job, Outcome
from bench.runners._local import measure

REFERENCE = "reference runtime: says nothing about the speed of Core ML"


def run(job: Job) -> Outcome:
    """Open the bundle and measure one round."""
    from mlxkd.decode.opening import open_worker
    from mlxkd.runtime import cpu_name, usable_cores

    worker = open_worker(job.location)
    started = time.perf_counter()
    worker.session(1)
    seconds = time.perf_counter() - started
    mac = sys.platform == "darwin"
    device = f"{cpu_name()} ({'Core ML' if mac else f'MIL runtime, {usable_cores()} cores'})"
    found = measure(worker, job, load_seconds=seconds, device=device, backend="coreml" if mac else "mil")
    if not mac:
        found.details["label"] = REFERENCE
    return found
