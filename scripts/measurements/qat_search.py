"""The search behind qat-recovery: recovered share on the rows that choose, one seed, one change at a time.

Same model, text, loss and cells as qat-recovery; nothing here is seen on the rows that qat-recovery reports.
"""

from __future__ import annotations

import dataclasses
from dataclasses import replace

from mlxkd.metric import Metric
from mlxkd.runtime import device_name
from scripts.measurements._qat_cells import Try, kept, open_bench, shared_data

FOUR = Try("qat", "mlx-affine4-g32", 300, 1e-3)
THREE = Try("qat", "mlx-affine3-g32", 300, 1e-3)
SHORT = replace(THREE, steps=60)
SEARCH = (
    replace(FOUR, steps=60),
    replace(FOUR, steps=60, rate=3e-4),
    replace(FOUR, steps=60, rate=3e-4, width=256, rows=4),
    replace(FOUR, steps=60, hidden=5.0),
    replace(FOUR, steps=60, rate=3e-4, hidden=5.0),
    FOUR,
    replace(FOUR, rate=3e-4),
    replace(FOUR, steps=1200, annealed=True),
    replace(FOUR, steps=1200, rate=5e-4, annealed=True),
    replace(FOUR, steps=2400, annealed=True),
    replace(FOUR, steps=2400, annealed=True, continued=0.5, fitted=True),
    replace(FOUR, method="dwq"),
    replace(FOUR, method="dwq", rate=3e-3),
    SHORT,
    replace(SHORT, hidden=1.0),
    replace(SHORT, hidden=5.0),
    replace(SHORT, rate=2e-3, hidden=1.0),
    replace(SHORT, temperature=2.0),
    replace(SHORT, ranges_first=0.3, range_rate=0.3),
    THREE,
    replace(THREE, rate=5e-4),
    replace(THREE, rows=8, steps=600),
    replace(THREE, average=0.97),
    replace(THREE, range_rate=0.3),
    replace(THREE, hidden=1.0),
    replace(THREE, steps=1200),
    replace(THREE, steps=1200, annealed=True),
    replace(THREE, steps=1200, continued=0.5),
    replace(THREE, steps=1200, continued=1.0),
    replace(THREE, steps=1200, continued=0.5, hidden=1.0),
    replace(THREE, steps=2400, continued=0.5),
    replace(THREE, steps=2400, continued=0.5, fitted=True),
    replace(THREE, method="dwq"),
    replace(THREE, method="dwq", rate=3e-3),
    Try("qat", "mlx-affine2-g32", 600, 2e-3, rows=8),
    Try("qat", "mlx-affine2-g32", 1200, 2e-3),
    Try("qat", "mlx-affine2-g32", 1200, 2e-3, annealed=True),
    Try("qat", "mlx-affine2-g32", 1200, 2e-3, continued=0.5),
    Try("qat", "mlx-affine2-g32", 2400, 2e-3, continued=0.5),
    Try("qat", "mlx-affine2-g32", 2400, 2e-3, continued=0.5, fitted=True),
    Try("qat", "mlx-affine2-g32", 4800, 2e-3, continued=0.5, fitted=True),
    Try("qat", "ane-lut4", 300, 1e-3),
    Try("qat", "ane-lut3", 300, 1e-3),
    Try("qat", "ane-int8", 100, 3e-4),
)


def label(tried: Try) -> str:
    """Grid and method, and everything that is not as it stands by itself."""
    plain = Try(tried.method, tried.grid)
    fields = [f.name for f in dataclasses.fields(tried) if f.name not in ("method", "grid")]
    words = [f"{n} {getattr(tried, n):g}" for n in fields if getattr(tried, n) != getattr(plain, n)]
    return ", ".join([f"{tried.grid} {tried.method}", *words])


def measure(quick: bool) -> dict[str, Metric]:
    """Recovered share of each try on the selection rows."""
    bench, device = open_bench(shared_data()), device_name()
    ceiling = kept(bench, Try("control", "float")).select.nll
    found = {}
    for tried in SEARCH:
        cell = kept(bench, replace(tried, steps=20) if quick else tried)
        rounded = kept(bench, Try("rounded", tried.grid)).select
        gap = rounded.nll - ceiling
        note = (
            f"standard error {cell.select.error / gap:.3f}; NLL {cell.select.nll:.4f} of {ceiling:.4f} to "
            f"{rounded.nll:.4f}; KL {cell.select.divergence:.4f} of {rounded.divergence:.4f}"
        ) + (", 20 steps" if quick else "")
        found[label(tried)] = Metric((rounded.nll - cell.select.nll) / gap, "share", "measured", device, note=note)
    return found
