"""An MLX model folder or Hugging Face repository, on MLX's default device."""

from __future__ import annotations

import time

from bench.runners._job import Job, Outcome
from bench.runners._local import Local, measure


def run(job: Job) -> Outcome:
    """Load the model and measure one round."""
    import mlx.core as mx

    from mlxkd import compat
    from mlxkd.decode.mlx_session import MlxSession
    from mlxkd.runtime import device_name

    started = time.perf_counter()
    model, tokenizer, config = compat.load(job.location)
    mx.eval(model.parameters())
    seconds = time.perf_counter() - started
    local = Local(tokenizer, lambda batch: MlxSession(model, config, batch_size=batch))
    backend = f"mlx {mx.default_device().type.name}"
    found = measure(local, job, load_seconds=seconds, device=device_name(), backend=backend)
    found.counters["mlx_peak_bytes"] = float(mx.get_peak_memory())
    return found
