"""Figures of a student: during training on the kernels that ship, at the end beside teacher and twin."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from rich.console import Console
from rich.progress import Progress

from mlxkd import quant
from mlxkd.evaluation.agreement import agreement
from mlxkd.evaluation.answers import Answer, answer_all
from mlxkd.evaluation.clocks import Summary
from mlxkd.evaluation.speed import time_answers
from mlxkd.evaluation.toolcalls.scoring import aggregate
from mlxkd.metric import Metric
from mlxkd.runtime import device_name
from mlxkd.students import lora
from mlxkd.training.callbacks import Values
from mlxkd.training.result import Contender
from mlxkd.training.setup import Setup
from mlxkd.trees import leaves


def validate(setup: Setup, model: nn.Module) -> Values:
    """Validation figures on the kernels that ship: packed as soon as the model lies on its grid."""
    judged = quant.pack(model, setup.config).model if quant.attached(model) else model
    batches = setup.valid[: setup.recipe.training.evaluate_batches]
    was_training = model.training
    judged.eval()
    found = agreement(judged, setup.reference, batches, device_name())
    seen: Values = {"loss" if name == "nll" else name: metric.value for name, metric in found.items()}
    for name, metric in _clocks(setup, judged, setup.tokenizer).items():
        if name in ("ttft", "tpot", "ttfa_ms", "ttfa_tokens"):
            # JSON knows no infinity: a median that falls on a request without a valid call is missing.
            seen[name] = metric.value if metric.value is not None and math.isfinite(metric.value) else None
            seen[f"{name}_censored"] = metric.censored
    model.train(was_training)
    return seen


def _clocks(setup: Setup, model: nn.Module, tokenizer: Any) -> dict[str, Metric]:
    """Latencies of lone requests after a warm-up, where the recipe wants them."""
    wanted = setup.recipe.evaluation
    cases = [case for part in setup.cases.values() for case in part][: wanted.timed]
    if not cases:
        return {}
    timed = time_answers(model, tokenizer, [cases[0], *cases], max_tokens=wanted.max_tokens)
    return Summary(1, [timing for timing, _ in timed]).metrics(device_name())


def judge(setup: Setup, twin: nn.Module | None, console: Console) -> dict[str, Contender]:
    """Judge teacher, float student, packed student and packed twin on the same held-out inputs.

    A teacher with another tokenizer is judged by its answers alone: its likelihoods are of other tokens.
    """
    student = setup.student
    models: dict[str, tuple[str, nn.Module]] = {}
    if setup.reference or setup.cases:
        models["teacher"] = ("teacher", setup.teacher)
    models["float"] = ("student, unpacked", deployed(quant.detach(quant.clone(student)), setup.config).model)
    models["student"] = ("student", deployed(student, setup.config).model)
    for target in setup.further_targets:
        models[f"student@{target}"] = (f"student, {target}", deployed(student, setup.config, target).model)
    if twin is not None:
        models["baseline"] = ("twin without teacher", deployed(twin, setup.config).model)
    answers = sum(len(cases) for cases in setup.cases.values())
    steps = len(models) * (answers + 1)
    with Progress(console=console) as progress:
        task = progress.add_task("judging", total=steps)

        def tick() -> None:
            progress.advance(task)

        return {key: _contender(setup, key, title, model, tick) for key, (title, model) in models.items()}


def deployed(model: nn.Module, config: dict[str, Any], target: str | None = None) -> quant.Packed:
    """What ships: the layers on their grids, if there are any, and adapters merged into the weights.

    Args:
        model: the student in training; it stays as it is.
        config: its config.json.
        target: whose grids to pack; the active ones when None.
    """
    if quant.attached(model):
        packed = quant.pack(model, config, target=target)
    else:
        plain = {**config, "torch_dtype": "float32"}
        packed = quant.Packed(quant.clone(model), plain, {}, {}, mx.float32)
    if lora.adapted(packed.model):
        merged, merged_config = lora.merge(packed.model, packed.config)
        packed = replace(packed, model=merged, config=merged_config)
    packed.model.eval()
    mx.eval(packed.model.parameters())
    return packed


def _contender(setup: Setup, key: str, title: str, model: nn.Module, tick: Any) -> Contender:
    device = device_name()
    tokenizer = setup.foreign.get(key, setup.tokenizer)
    metrics = {} if key in setup.foreign else agreement(model, setup.reference, setup.valid, device)
    tick()
    answers: dict[str, list[Answer]] = {}
    options = setup.recipe.evaluation
    for name, cases in setup.cases.items():
        answers[name] = answer_all(
            model, tokenizer, cases, max_tokens=options.max_tokens, rows=options.rows, on_answer=tick
        )
        scores = aggregate([a.score for a in answers[name]], device)
        metrics |= {f"{name}/{key}": metric for key, metric in scores.items()}
    if answers:
        everything = aggregate([a.score for part in answers.values() for a in part], device)
        metrics |= {f"all/{key}": metric for key, metric in everything.items()}
    metrics |= {f"speed/{name}": metric for name, metric in _clocks(setup, model, tokenizer).items()}
    weights = leaves(model.parameters())
    return Contender(title, _count(model), sum(w.nbytes for _, w in weights), metrics, answers)


def _count(model: nn.Module) -> int:
    """Weights of a model; packed ones count as the weights they stand for."""
    total = 0
    modules = dict(model.named_modules())
    for path, value in leaves(model.parameters()):
        module = modules.get(path.rpartition(".")[0])
        bits = getattr(module, "bits", None)
        if bits and path.endswith(".weight"):
            total += value.size * 32 // bits
        elif not (bits and path.endswith((".scales", ".biases"))):
            total += value.size
    return total
