"""What training on its own text gains a student on text that it writes itself, and how the divergences compare.

Teacher: stories260K. Student: two of its five layers with 64 of 172 MLP channels, trained on the text alone for 150
steps at 2e-3. All runs continue from there for 100 steps at 1e-3 and are judged as they end. The gain is how far
KL(student || teacher) on the student's own text falls below that of more training on the text alone (SFT); off-policy
is the better of forward and reverse KL on the data, by the first seed. On-policy steps have 48 positions a row, the
others 128.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxkd.errors import UserError
from mlxkd.metric import Metric
from scripts.measurements._kd_cells import DATA, SEEDS, Run, finish, over_seeds

RATE, STEPS = 1e-3, 100
SMALL = {"layers": [0, 4], "mlp_width": 64}
START = Run({"cross_entropy": 1.0}, 2e-3, 150, student=SMALL)
OWN = {"share": 1.0, "max_tokens": 48, "prompt": 16}


def _on(loss: str, own: Mapping[str, Any] | None = None, options: Mapping[str, Any] | None = None) -> Run:
    return Run({loss: 1.0}, RATE, STEPS, on_policy=own, options=options or {}, after=START)


SFT, OFF = _on("cross_entropy"), ("forward_kl", "reverse_kl")
# Over all seeds: SFT, both off-policy runs, and on-policy.
RUNS = {
    "sft": SFT,
    **{f"{loss}, off-policy": _on(loss) for loss in OFF},
    "reverse_kl, on-policy": _on("reverse_kl", OWN),
}
# With the first seed.
TRIES = {
    "jsd, off-policy": _on("jsd", options={"beta": 0.5}),
    "skew_kl, off-policy": _on("skew_kl"),
    "skew_reverse_kl, off-policy": _on("skew_reverse_kl"),
    "adaptive_kl, off-policy": _on("adaptive_kl"),
    "total_variation, off-policy": _on("total_variation"),
    "forward_kl, on-policy": _on("forward_kl", OWN),
}


def measure(quick: bool) -> dict[str, Metric]:
    """on_policy_gain_ratio and figures of every run, over three seeds; ``quick``: one, and no tries."""
    if not DATA.is_dir():
        raise UserError("the real model and text are not here", where=str(DATA))
    seeds = SEEDS[:1] if quick else SEEDS
    by_seed = [{name: finish(name, run, seed) for name, run in RUNS.items()} for seed in seeds]
    found = {name: [cells[name] for cells in by_seed] for name in RUNS}
    found |= {} if quick else {name: [finish(name, run, 0)] for name, run in TRIES.items()}
    free = {name: [cell["free_kl"] for cell in cells] for name, cells in found.items()}
    gains = {name: [s - x for s, x in zip(free["sft"], free[name], strict=True)] for name in RUNS if name != "sft"}
    off = min((f"{loss}, off-policy" for loss in OFF), key=lambda name: free[name][0])
    on = gains["reverse_kl, on-policy"]
    figures = {"on_policy_gain_ratio": over_seeds([b / a for a, b in zip(gains[off], on, strict=True)], "ratio")}
    over_forward = [b / a for a, b in zip(gains["forward_kl, off-policy"], on, strict=True)]
    figures["on_policy_gain_over_forward_kl"] = over_seeds(over_forward, "ratio")
    figures |= {f"{name}: gain": over_seeds(values, "nats/token") for name, values in gains.items()}
    start = finish("start", START, 0)
    for name, cells in ({"start": [start]} | found).items():
        for figure in ("nll", "kl", "free_kl"):
            figures[f"{name}: {figure}"] = over_seeds([cell[figure] for cell in cells], "nats/token")
    return figures
