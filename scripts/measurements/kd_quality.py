"""What distillation gains over training on the text alone, on a real model and a pruned student.

Teacher: stories260K. Student: four of its five layers, judged at its best validation. Peer: cross-entropy alone (SFT).
Both sides have their rate chosen by the first seed, on text that is not reported. ``on_policy_gain_ratio`` is that of
``scripts/measure kd-free-running``, which it runs.
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
RATES: dict[str, tuple[float, ...]] = {"sft": (2.5e-4, 5e-4, 1e-3), "kd": (1e-3, 2e-3, 3e-3)}
# What was tried beside them, with the first seed.
TRIES = {
    "forward_kl alone, rate 1e-3": Run({"forward_kl": 1.0}, 1e-3, STEPS),
    "kd without hidden states, rate 3e-3": Run(BOTH, 3e-3, STEPS),
    "a third without hidden states, rate 3e-3": Run(BOTH, 3e-3, STEPS // 3),
}


def _run(side: str, rate: float, steps: int = STEPS) -> Run:
    return Run(SFT, rate, steps) if side == "sft" else Run(BOTH, rate, steps, STATES)


def measure(quick: bool) -> dict[str, Metric]:
    """Figures over three seeds, one row per rate and per try; ``quick`` takes one seed and neither."""
    if not DATA.is_dir():
        raise UserError("the real model and text are not here", where=str(DATA))
    seeds = SEEDS[:1] if quick else SEEDS
    rates = {side: middle if quick else _best_rate(side) for side, (_, middle, _) in RATES.items()}
    runs = {side: _run(side, rate) for side, rate in rates.items()}
    runs["kd, a third of the tokens"] = _run("kd", rates["kd"], STEPS // 3)
    found = {name: [finish(name, run, seed) for seed in seeds] for name, run in runs.items()}
    searched = {f"{side}, rate {rate:g}": _run(side, rate) for side, tried in RATES.items() for rate in tried}
    tries = {} if quick else {name: [finish(name, run, 0)] for name, run in (searched | TRIES).items()}
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


def _best_rate(side: str) -> float:
    """The rate whose first seed ends best on the text that chooses."""
    return min(RATES[side], key=lambda rate: float(finish(f"{side}, rate {rate:g}", _run(side, rate), 0)["select"]))


def _tokens_to(sft: dict[str, Any], runs: Sequence[dict[str, Any]]) -> float:
    """Fewest tokens, as a share of the SFT run's, with which one of ``runs`` is at its final loss; inf if none is."""
    tokens, final = sft["curve"][-1]
    reached = [t for run in runs for t, loss in run["curve"] if loss <= final]
    return min(reached, default=float("inf")) / tokens
