"""How much of the loss that rounding costs quantisation-aware training wins back, on a real model.

Model: stories260K (5 layers, width 64; its 172-wide down projection stays float on group-32 grids). Text:
TinyStories; of the last fifth every other row of 256 tokens chose settings and DWQ's rate, the rest is reported,
on deployed kernels. Teacher: the float model alone. Ceiling: the float model, or the same float model trained on
with the same loss and steps, whichever is better. Peers: rounding (mx.quantize), k-means palettes, mlx-lm's GPTQ
(4 and 2 bits; it packs no 3, and mlx-lm's AWQ leaves no layer float), and mlx-lm's own DWQ loop on the same rows, those
that the float model continues included, at the best of rates that are widened until the best one is not at an end.
Three seeds each; measured cells are kept in the user's cache (mlxkd/qat-cells), so an interrupted run goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import mean

from mlxkd.metric import Metric
from mlxkd.runtime import device_name
from scripts.measurements._qat_cells import Bench, Cell, Try, kept, open_bench, shared_data

SEEDS = (0, 1, 2)
CONTROL = Try("control", "float", steps=300, rate=1e-3)
DWQ_RATES = (3e-4, 1e-3)
WIDER = 10**0.5  # factor between neighbouring rates
NARROWEST, WIDEST = 1e-6, 1.0

# Chosen on the selection rows, by KL; docs/quantisation.md has the search, `scripts/measure qat-search` measures it.
CHOSEN = {
    "4bit": Try("qat", "mlx-affine4-g32", 2400, 1e-3, fitted=True, continued=0.5, annealed=True),
    "3bit": Try("qat", "mlx-affine3-g32", 2400, 1e-3, fitted=True, continued=0.5),
    "2bit": Try("qat", "mlx-affine2-g32", 4800, 2e-3, fitted=True, continued=0.5),
    "lut4": Try("qat", "ane-lut4", 300, 1e-3),
    "lut3": Try("qat", "ane-lut3", 300, 1e-3),
    "int8": Try("qat", "ane-int8", 100, 3e-4),
}
GPTQ = {"4bit": Try("gptq", "mlx-affine4-g32", 1, rows=256), "2bit": Try("gptq", "mlx-affine2-g32", 1, rows=256)}
AGAINST_DWQ = ("4bit", "3bit", "2bit")


def best_rate(loss: Callable[[float], float], rates: Sequence[float]) -> tuple[float, float]:
    """The rate of the lowest loss and that loss; rates are added below and above until the best has neighbours."""
    found = {rate: loss(rate) for rate in rates}
    while True:
        best = min(found, key=lambda rate: found[rate])
        if best == min(found) and best > NARROWEST:
            new = best / WIDER
        elif best == max(found) and best < WIDEST:
            new = best * WIDER
        else:
            return best, found[best]
        found[new] = loss(new)


def share(rounded: Cell, trained: Cell, ceiling: Cell) -> float:
    """Recovered share of the gap on the report rows."""
    return (rounded.report.nll - trained.report.nll) / (rounded.report.nll - ceiling.report.nll)


def known(cells: Sequence[Cell]) -> float:
    """Mean NLL above the float model's on the report rows that are not strange to it."""
    return mean(cell.report.known for cell in cells)


def whole(bench: Bench, cell: Cell) -> float:
    """NLL over all rows of the last fifth."""
    a, b = len(bench.select), len(bench.report)
    return (a * cell.select.nll + b * cell.report.nll) / (a + b)


def measure(quick: bool) -> dict[str, Metric]:
    """Recovered shares (mean of the seeds; lowest and highest in the note), residuals over DWQ's, changed codes."""
    bench, device = open_bench(shared_data()), device_name()
    seeds = SEEDS[:1] if quick else SEEDS
    control = replace(CONTROL, steps=20) if quick else CONTROL
    ceiling = min((kept(bench, Try("control", "float")), kept(bench, control)), key=lambda cell: cell.report.nll)
    found: dict[str, Metric] = {}
    changed = 0
    for key, chosen in CHOSEN.items():
        tried = replace(chosen, steps=20) if quick else chosen
        rounded = kept(bench, Try("rounded", tried.grid))
        cells = [kept(bench, replace(tried, seed=seed)) for seed in seeds]
        changed += sum(cell.changed for cell in cells)
        shares = [share(rounded, cell, ceiling) for cell in cells]
        gap = whole(bench, rounded) - whole(bench, ceiling)
        everywhere = mean((whole(bench, rounded) - whole(bench, cell)) / gap for cell in cells)
        error = mean(cell.report.error for cell in cells) / (rounded.report.nll - ceiling.report.nll)
        note = (
            f"{min(shares):.3f} to {max(shares):.3f}, standard error of the rows {error:.3f}; NLL ceiling "
            f"{ceiling.report.nll:.4f}, rounded {rounded.report.nll:.4f}, trained "
            f"{mean(cell.report.nll for cell in cells):.4f}; KL to the float model rounded "
            f"{rounded.report.divergence:.4f}, trained {mean(cell.report.divergence for cell in cells):.4f}; "
            f"{tried.steps} steps of {tried.rows * tried.width} tokens; with the selection rows {everywhere:.3f}; "
            f"on the rows that the float model knows {1 - known(cells) / rounded.report.known:.3f} of its loss"
        )
        found[f"recovered_{key}"] = Metric(mean(shares), "share", "measured", device, len(seeds), note=note)
        if key in GPTQ:
            theirs = kept(bench, GPTQ[key])
            note = (
                f"NLL {theirs.report.nll:.4f}, KL {theirs.report.divergence:.4f}; {GPTQ[key].rows} rows of calibration"
            )
            found[f"gptq_{key}"] = Metric(share(rounded, theirs, ceiling), "share", "measured", device, note=note)
        if key in AGAINST_DWQ:
            found[f"residual_over_dwq_{key}"] = _against_dwq(bench, tried, cells, ceiling, quick)
    found["changed_codes"] = Metric(float(changed), "codes", "measured", device, len(CHOSEN) * len(seeds))
    return found


def _against_dwq(bench: Bench, tried: Try, cells: Sequence[Cell], ceiling: Cell, quick: bool) -> Metric:
    """Residual gap over the one that DWQ leaves after the same rows, at DWQ's best rate on the selection rows."""
    dwq = replace(tried, method="dwq", rate=DWQ_RATES[0], fitted=False, annealed=False)
    if not quick:
        best, _ = best_rate(lambda rate: kept(bench, replace(dwq, rate=rate)).select.nll, DWQ_RATES)
        dwq = replace(dwq, rate=best)
    theirs = [kept(bench, replace(dwq, seed=seed)).report for seed in range(len(cells))]
    after = mean(loss.nll for loss in theirs)
    ratio = (mean(cell.report.nll for cell in cells) - ceiling.report.nll) / (after - ceiling.report.nll)
    divergence = mean(loss.divergence for loss in theirs)
    familiar = known(cells) / mean(loss.known for loss in theirs)
    note = (
        f"after DWQ NLL {after:.4f}, KL {divergence:.4f}, at rate {dwq.rate:.3g}; over the float model's loss on the "
        f"rows that it knows {familiar:.3f}"
    )
    return Metric(ratio, "ratio", "measured", device_name(), len(cells), note=note)
