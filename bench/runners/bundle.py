"""A converted bundle: on Core ML on a Mac, on the MIL reference runtime elsewhere."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from bench.runners._job import Job, Outcome
from bench.runners._local import Local, measure

REFERENCE = "reference runtime: says nothing about the speed of Core ML"


def run(job: Job) -> Outcome:
    """Open the bundle and measure one round."""
    from ane.convert.bundle import read_manifest
    from ane.runtime import open_session
    from mlxkd import compat
    from mlxkd.runtime import cpu_name, usable_cores

    started = time.perf_counter()
    open_session(Path(job.location), batch=1)
    seconds = time.perf_counter() - started
    tokenizer = compat.load_tokenizer(Path(job.location), {})
    batches = read_manifest(job.location).batches
    local = Local(tokenizer, lambda batch: open_session(Path(job.location), batch=batch), batches)
    mac = sys.platform == "darwin"
    device = f"{cpu_name()} ({'Core ML' if mac else f'MIL runtime, {usable_cores()} cores'})"
    found = measure(local, job, load_seconds=seconds, device=device, backend="coreml" if mac else "mil")
    if not mac:
        found.details["label"] = REFERENCE
    return found
