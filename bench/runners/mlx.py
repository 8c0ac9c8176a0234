"""An MLX model folder or Hugging Face repository, on MLX's default device."""

from __future__ import annotations

import time

from bench.runners._job import Job, Outcome
from bench.runners._local import measure


def run(job: Job) -> Outcome:
    """Load the model and measure one round."""
    import mlx.core as mx

    from mlxkd.decode.opening import open_worker
    from mlxkd.runtime import device_name

    started = time.perf_counter()
    worker = open_worker(job.location)
    mx.eval(worker.model.parameters())
    seconds = time.perf_counter() - started
    backend = f"mlx {mx.default_device().type.name}"
    found = measure(worker, job, load_seconds=seconds, device=device_name(), backend=backend)
    found.counters["mlx_peak_bytes"] = float(mx.get_peak_memory())
    return found
