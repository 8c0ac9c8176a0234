"""What distillation gains over training on the text alone, on a real model and a pruned student.

Teacher: stories260K. Student: four of its five layers. Text: TinyStories in windows of 128 tokens, the last fifth for
validation. Every run is an ordinary recipe, judged at its best validation. Peer: cross-entropy alone (SFT) at the best
of its rates. Free-running text: the student continues the first 16 tokens of every validation window by 112 at
temperature 1, judged by KL(student || teacher) per token. Finished runs are kept in the user's cache
(``mlxkd/kd-quality``), so that an interrupted measurement goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxkd.data.batching import build
from mlxkd.errors import UserError
from mlxkd.evaluation.agreement import agreement, log_probabilities, supervised_hidden
from mlxkd.files import file_hash, write_json
from mlxkd.metric import Metric
from mlxkd.recipe import parse_recipe
from mlxkd.runtime import device_name
from mlxkd.students.split import Split
from mlxkd.teachers.onpolicy import Rollouts, complete
from mlxkd.training.callbacks import Values
from mlxkd.training.run import STUDENT, make_trainer, terms_of
from mlxkd.training.setup import Setup, prepare

DATA = Path(__file__).parents[3] / "shared" / "data"
REVISION = 1  # to be raised when a change of the training code makes kept runs worthless
SHAPE = (8, 128)
PROMPT = 16
LAYERS = (0, 1, 2, 4)
SEEDS = (0, 1, 2)
STEPS = 300


@dataclass(frozen=True)
class Run:
    """What distinguishes one training run, in the words of a recipe."""

    loss: Mapping[str, float]
    rate: float
    steps: int
    hidden: Mapping[str, Any] | None = None

    def recipe(self, seed: int) -> dict[str, Any]:
        """The recipe as a mapping."""
        return {
            "name": "kd-quality",
            "seed": seed,
            "teacher": {"model": str(DATA / "stories260K")},
            "student": {"start": "prune", "layers": list(LAYERS)},
            "data": {
                "train": str(DATA / "tinystories" / "stories.txt"),
                "valid_share": 0.2,
                "shapes": [list(SHAPE)],
            },
            "loss": [{"name": name, "weight": weight} for name, weight in self.loss.items()],
            "hidden": self.hidden,
            "optimizer": {"learning_rate": self.rate},
            "quantisation": {"grid": "float"},
            "training": {
                "steps": self.steps,
                "evaluate_every": max(1, self.steps // 8),
                "evaluate_batches": 64,
                "save_every": self.steps,
            },
            "evaluation": {"baseline": False, "batches": 64},
        }


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


class Curve:
    """Validation loss over trained tokens."""

    def __init__(self) -> None:
        self.tokens = 0.0
        self.points: list[tuple[float, float]] = []

    def on_step(self, step: int, values: Values) -> None:
        self.tokens = values["tokens"]

    def on_validation(self, step: int, values: Values) -> None:
        self.points.append((self.tokens, float(values["loss"])))


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
    device, missing = device_name(), "not measured: no run on the student's own text was made"
    figures = {
        "gap_closed": _over_seeds(closed, "share"),
        "tokens_to_sft_loss_ratio": _over_seeds(ratios, "ratio"),
        "on_policy_gain_ratio": Metric(None, "ratio", "measured", device, note=missing),
        "teacher_nll": Metric(teacher, "nats/token", "measured", device),
    }
    for name, cells in (found | tries).items():
        figures[f"{name}: nll"] = _over_seeds([c["nll"] for c in cells], "nats/token")
        figures[f"{name}: kl"] = _over_seeds([c["kl"] for c in cells], "nats/token")
        figures[f"{name}: free_kl"] = _over_seeds([c["free_kl"] for c in cells], "nats/token")
    return figures


def _over_seeds(values: Sequence[float], unit: str) -> Metric:
    spread = ", ".join(f"{value:.3f}" for value in values)
    note = f"seeds: {spread}" if len(values) > 1 else ""
    return Metric(float(np.mean(values)), unit, "measured", device_name(), n=len(values), note=note)


def _tokens_to(sft: dict[str, Any], runs: Sequence[dict[str, Any]]) -> float:
    """Fewest tokens, as a share of the SFT run's, with which one of ``runs`` is at its final loss; inf if none is."""
    tokens, final = sft["curve"][-1]
    reached = [t for run in runs for t, loss in run["curve"] if loss <= final]
    return min(reached, default=float("inf")) / tokens


def cache_folder() -> Path:
    """Where finished runs live."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlxkd" / "kd-quality"


def finish(name: str, run: Run, seed: int) -> dict[str, Any]:
    """Train and judge, or read what an earlier call found."""
    sources = [file_hash(DATA / p) for p in ("stories260K/model.safetensors", "tinystories/stories.txt")]
    said = asdict(run) | {"seed": seed, "revision": REVISION, "sources": sources, "layers": LAYERS}
    key = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]
    kept = cache_folder() / f"{key}.json"
    if kept.is_file():
        return dict(json.loads(kept.read_text(encoding="utf-8")))
    kept.parent.mkdir(parents=True, exist_ok=True)
    started = time.process_time()
    setup = prepare(parse_recipe(run.recipe(seed), "kd-quality"))
    curve = Curve()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(setup, setup.student, STUDENT, terms_of(setup.recipe.loss), Path(folder))
        trainer.callbacks = (curve,)
        trainer.run()
        trainer.restore_best()
    found = judge(setup.student, setup) | {"curve": curve.points, "said": said}
    write_json(kept, found)
    print(f"{name}, seed {seed}: nll {found['nll']:.3f}, {time.process_time() - started:.0f} CPU s", file=sys.stderr)
    return found


def judge(model: nn.Module, setup: Setup) -> dict[str, float]:
    """Validation NLL of both, KL(teacher || model), and on the model's own text KL(model || teacher)."""
    model.eval()
    ours, theirs = (agreement(m, setup.teacher, setup.valid, device_name()) for m in (model, setup.teacher))
    held = {"nll": ours["nll"].value, "kl": ours["kl"].value, "teacher_nll": theirs["nll"].value}
    return {name: float(value or 0) for name, value in held.items()} | {"free_kl": free_running(model, setup)}


def free_running(model: nn.Module, setup: Setup) -> float:
    """Nats per written token; the KL sums over the whole vocabulary, so only the prefixes are sampled."""
    prompts = [row[:PROMPT] for batch in setup.valid for row in batch.inputs[: len(batch.rows)]]
    texts = complete(model, prompts, Rollouts(SHAPE[1] - PROMPT, 1.0, rows=64), seed=1)
    ours, theirs = Split(model), Split(setup.teacher)
    total, count = 0.0, 0
    for start in range(0, len(texts), SHAPE[0]):
        batch = build(texts, range(start, min(start + SHAPE[0], len(texts))), SHAPE)
        q, p = (log_probabilities(split, supervised_hidden(split, batch)) for split in (ours, theirs))
        total += float(mx.sum(mx.sum(mx.exp(q) * (q - p), axis=-1)))
        count += len(batch.supervised)
    return total / count
