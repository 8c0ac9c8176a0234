"""Training runs of the distillation measurements, judged, and kept once finished.

Teacher: stories260K. Text: TinyStories in windows of 128 tokens, the last fifth for validation. Every run is an
ordinary recipe. Of the validation batches every other one chooses (settings, and the weights of a run), the rest are
reported. Free-running text: the student continues the first 16 tokens of 64 validation windows by 112 at
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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxkd.compat import save_model_folder
from mlxkd.data.batching import build
from mlxkd.evaluation.agreement import agreement, log_probabilities, supervised_hidden
from mlxkd.files import file_hash, write_json
from mlxkd.metric import Metric
from mlxkd.recipe import parse_recipe
from mlxkd.runtime import device_name
from mlxkd.students.split import Split
from mlxkd.teachers.onpolicy import Rollouts, complete
from mlxkd.training.callbacks import Values
from mlxkd.training.judging import validate
from mlxkd.training.run import STUDENT, make_trainer
from mlxkd.training.setup import Setup, prepare
from mlxkd.training.terms import terms_of

DATA = Path(__file__).parents[3] / "shared" / "data"
REVISION = 2  # to be raised when a change of the training code makes kept runs worthless
SHAPE = (8, 128)
PROMPT = 16
ROWS = 64  # texts that a student writes to be judged
FOUR_LAYERS: Mapping[str, Any] = {"layers": [0, 1, 2, 4]}
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Run:
    """What distinguishes one training run, in the words of a recipe.

    Args:
        loss: weights by name.
        rate: peak learning rate.
        steps: updates.
        hidden, on_policy: those sections of the recipe.
        options: of its one loss.
        student: how it is cut out of the teacher, when ``after`` is None.
        after: the run that it continues, with the same seed. Such a run is judged as it ends, because the text's loss
            may rise while the student comes closer to its teacher; others at their best validation.
    """

    loss: Mapping[str, float]
    rate: float
    steps: int
    hidden: Mapping[str, Any] | None = None
    on_policy: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    student: Mapping[str, Any] = field(default_factory=lambda: dict(FOUR_LAYERS))
    after: Run | None = None

    def recipe(self, seed: int) -> dict[str, Any]:
        """The recipe as a mapping."""
        start = {"start": "folder", "model": str(model_folder(self.after, seed))} if self.after else None
        return {
            "name": "kd-quality",
            "seed": seed,
            "teacher": {"model": str(DATA / "stories260K")},
            "student": start or {"start": "prune", **self.student},
            "data": {
                "train": str(DATA / "tinystories" / "stories.txt"),
                "valid_share": 0.2,
                "shapes": [list(SHAPE)],
            },
            "loss": [{"name": name, "weight": w, "options": dict(self.options)} for name, w in self.loss.items()],
            "hidden": self.hidden,
            "on_policy": self.on_policy,
            "optimizer": {"learning_rate": self.rate},
            "quantisation": {"grid": "float"},
            "training": {
                "steps": self.steps,
                "evaluate_every": self.steps if self.after else max(1, self.steps // 8),
                "evaluate_batches": 64,
                "save_every": self.steps,
            },
            "evaluation": {"baseline": False, "batches": 64},
        }


class Curve:
    """Reported loss over trained tokens."""

    def __init__(self) -> None:
        self.tokens = 0.0
        self.points: list[tuple[float, float]] = []

    def on_step(self, step: int, values: Values) -> None:
        self.tokens = values["tokens"]

    def on_validation(self, step: int, values: Values) -> None:
        self.points.append((self.tokens, float(values["reported"])))


def over_seeds(values: Sequence[float], unit: str) -> Metric:
    spread = ", ".join(f"{value:.3f}" for value in values)
    note = f"seeds: {spread}" if len(values) > 1 else ""
    return Metric(float(np.mean(values)), unit, "measured", device_name(), n=len(values), note=note)


def cache_folder() -> Path:
    """Where finished runs live."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlxkd" / "kd-quality"


def key_of(run: Run, seed: int) -> str:
    """Names a finished run: everything that shapes it, the real inputs included."""
    sources = [file_hash(DATA / p) for p in ("stories260K/model.safetensors", "tinystories/stories.txt")]
    said = asdict(run) | {"seed": seed, "revision": REVISION, "sources": sources}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def model_folder(run: Run, seed: int) -> Path:
    """Where a finished run's student lies."""
    return cache_folder() / f"{key_of(run, seed)}-student"


def finish(name: str, run: Run, seed: int) -> dict[str, Any]:
    """Train and judge, or read what an earlier call found."""
    key = key_of(run, seed)
    kept = cache_folder() / f"{key}.json"
    if kept.is_file():
        return dict(json.loads(kept.read_text(encoding="utf-8")))
    if run.after:
        finish(f"{name}, its start", run.after, seed)
    kept.parent.mkdir(parents=True, exist_ok=True)
    started = time.process_time()
    setup = prepare(parse_recipe(run.recipe(seed), "kd-quality"))
    select, report = (replace(setup, valid=setup.valid[i::2]) for i in range(2))
    curve = Curve()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(setup, setup.student, STUDENT, terms_of(setup.recipe.loss), Path(folder))
        trainer.callbacks = (curve,)
        trainer.validate = lambda model: validate(select, model) | {"reported": validate(report, model)["loss"]}
        trainer.run()
        if run.after is None:
            trainer.restore_best()
    chooses = agreement(setup.student, setup.teacher, select.valid, device_name())["nll"].value
    found = judge(setup.student, report) | {
        "select": chooses,
        "curve": curve.points,
        "said": asdict(run) | {"seed": seed},
    }
    save_model_folder(model_folder(run, seed), setup.student, setup.config, setup.tokenizer_folder)
    write_json(kept, found)
    print(f"{name}, seed {seed}: nll {found['nll']:.3f}, {time.process_time() - started:.0f} CPU s", file=sys.stderr)
    return found


def judge(model: nn.Module, setup: Setup) -> dict[str, float]:
    """On the setup's validation text NLL of both and KL(teacher || model); on the model's own KL(model || teacher)."""
    model.eval()
    ours, theirs = (agreement(m, setup.teacher, setup.valid, device_name()) for m in (model, setup.teacher))
    held = {"nll": ours["nll"].value, "kl": ours["kl"].value, "teacher_nll": theirs["nll"].value}
    return {name: float(value or 0) for name, value in held.items()} | {"free_kl": free_running(model, setup)}


def free_running(model: nn.Module, setup: Setup) -> float:
    """Nats per written token; the KL sums over the whole vocabulary, so only the prefixes are sampled."""
    prompts = [row[:PROMPT] for batch in setup.valid for row in batch.inputs[: len(batch.rows)]][:ROWS]
    texts = complete(model, prompts, Rollouts(SHAPE[1] - PROMPT, 1.0, rows=ROWS), seed=1)
    ours, theirs = Split(model), Split(setup.teacher)
    total, count = 0.0, 0
    for start in range(0, len(texts), SHAPE[0]):
        batch = build(texts, range(start, min(start + SHAPE[0], len(texts))), SHAPE)
        q, p = (log_probabilities(split, supervised_hidden(split, batch)) for split in (ours, theirs))
        total += float(mx.sum(mx.sum(mx.exp(q) * (q - p), axis=-1)))
        count += len(batch.supervised)
    return total / count
