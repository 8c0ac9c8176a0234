"""What distillation gains over training on the text alone, on a real model and a pruned student.

Teacher: stories260K. Student: four of its five layers, judged at its best validation. Peer: cross-entropy alone (SFT)
at the best of its rates. ``on_policy_gain_ratio`` is that of ``scripts/measure kd-free-running``, which it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlxkd.errors import UserError
from mlxkd.metric import Metric
from mlxkd.runtime import device_name
from scripts.measurements import kd_free_running
from scripts.measurements._kd_cells import DATA, SEEDS, Run, finish, over_seeds

STEPS = 300
SFT = {"cross_entropy": 1.0}
BOTH = {"forward_kl": 0.5, "cross_entropy": 0.5}
STATES = {"layers": [[2, 3]], "kind": "mse", "weight": 1.0, "positions": "visible"}
# What the figures come from, over all seeds.
RUNS = {
    "sft": Run(SFT, 5e-4, STEPS),
    "kd": Run(BOTH, 2e-3, STEPS, STATES),
    "kd, a third of the tokens": Run(BOTH, 2e-3, STEPS // 3, STATES),
}
# What was tried beside it, with the first seed.
TRIES = {
    "sft, rate 1e-3": Run(SFT, 1e-3, STEPS),
    "forward_kl alone, rate 1e-3": Run({"forward_kl": 1.0}, 1e-3, STEPS),
    "kd without hidden states, rate 3e-3": Run(BOTH, 3e-3, STEPS),
    "a third without hidden states, rate 3e-3": Run(BOTH, 3e-3, STEPS // 3),
}


def measure(quick: bool) -> dict[str, Metric]:
    """Figures over three seeds, and one row per try; ``quick`` takes one seed and no tries."""
    if not DATA.is_dir():
        raise UserError("the real model and text are not here", where=str(DATA))
    seeds = SEEDS[:1] if quick else SEEDS
    found = {name: [finish(name, run, seed) for seed in seeds] for name, run in RUNS.items()}
    tries = {} if quick else {name: [finish(name, run, 0)] for name, run in TRIES.items()}
    teacher = found["sft"][0]["teacher_nll"]
    sft, kd, third = found.values()
    closed = [(s["nll"] - k["nll"]) / (s["nll"] - teacher) for s, k in zip(sft, kd, strict=True)]
    ratios = [_tokens_to(s, (t, k)) for s, k, t in zip(sft, kd, third, strict=True)]
    device = device_name()
    figures = {
        "gap_closed": over_seeds(closed, "share"),
        "tokens_to_sft_loss_ratio": over_seeds(ratios, "ratio"),
        "teacher_nll": Metric(teacher, "nats/token", "measured", device),
    }
    for name, cells in (found | tries).items():
        figures[f"{name}: nll"] = over_seeds([c["nll"] for c in cells], "nats/token")
        figures[f"{name}: kl"] = over_seeds([c["kl"] for c in cells], "nats/token")
        figures[f"{name}: free_kl"] = over_seeds([c["free_kl"] for c in cells], "nats/token")
    return figures | kd_free_running.measure(quick)


def _tokens_to(sft: dict[str, Any], runs: Sequence[dict[str, Any]]) -> float:
    """Fewest tokens, as a share of the SFT run's, with which one of ``runs`` is at its final loss; inf if none is."""
    tokens, final = sft["curve"][-1]
    reached = [t for run in runs for t, loss in run["curve"] if loss <= final]
    return min(reached, default=float("inf")) / tokens
