"""Conformance of ane.mil: coremltools' own operation tests (peer: the outputs those tests expect, coremltools 9.0).

Replays every case in the harvested cache (``python -m ane.mil.conformance harvest``); without one, or with --quick,
runs the sample of installed tests that CI repeats. Shares of cases claimed and passed; the note says what was run.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

from ane.mil.conformance import case, suite, table
from mlxkd.metric import Metric
from mlxkd.runtime import device_name


def measure(quick: bool) -> dict[str, Metric]:
    """fp32_claimed_share (non-recurrent), fp32_passed_share and fp16_passed_share (of claimed)."""
    root = case.cache_folder() / "cases"
    if not quick and any(True for _ in case.stored(root)):
        records, source = list(suite.replay(root)), "harvested cases"
    else:
        records, source = _sampled(), "the sample for CI"
    count = Counter(r["precision"] for r in table.compared(records))
    counts = ", ".join(f"{count[precision]} {precision}" for precision in table.PRECISIONS)
    note = f"{source}: {counts} of coremltools {suite.version()}'s tests"
    return {
        key: Metric(share, "share", "measured", device_name(), n=n, note=note if n else f"no case in {source}")
        for key, (share, n) in table.shares(records).items()
    }


def _sampled() -> list[table.Record]:
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.jsonl"
        suite.run(suite.sample(), results=results)
        return suite.read_results(results)
