"""Cells of the quantisation-aware training measurements: one method, one grid, one seed; kept once measured.

Text: TinyStories. The first four fifths of the stories train; of the rows of the last fifth every other one chooses
settings (``select``) and the rest are reported (``report``). The teacher is the float model alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from mlxkd import compat, quant
from mlxkd.errors import UserError
from mlxkd.files import write_json
from mlxkd.quant import phases
from mlxkd.quant.baselines import post_training
from mlxkd.runtime import versions
from scripts.measurements._qat_text import rows_at, training_rows

ROOT = Path(__file__).parents[2]
VALID_WIDTH = 256  # tokens per validation row
STRANGE = 1.5  # a row with so many times the middle row's NLL is text that the float model does not know
FLOAT_LAYERS = "|float"  # the 172-wide down projection does not divide by 32 and stays float
METHOD = 3  # raise it when a change here or in mlxkd.quant changes what a cell measures


@dataclass(frozen=True)
class Try:
    """One cell: everything that was searched over.

    Args:
        method: "qat"; "dwq" and "gptq" (mlx-lm's own); "rounded" (k-means for palettes); "control" trains the float
            model on.
        grid: of every layer that it fits.
        steps, rows, width: updates, rows of text in each, tokens of a row.
        rate: peak; ``warmup`` of the steps rise to it, a cosine falls to zero.
        range_rate: of scales and palettes, relative to ``rate``; 0 takes ranges from the weights.
        fitted: learned ranges start where the squared error is small, not at the weights' extremes.
        ranges_first: share of the steps in which codes rest.
        average: decay of an exponential average of masters and ranges that ships; 0 ships the last.
        continued: share of each step's rows that the float model writes on from their beginning.
        cross_entropy: its weight; the KL to the float model has the rest.
        temperature: of the KL's softmaxes, without the usual square: Adam does not see it.
        hidden: weight of the relative squared error of every layer's output.
        annealed: rounding starts soft and sharpens; else straight through from the first step.
    """

    method: str
    grid: str
    steps: int = 0
    rate: float = 0.0
    range_rate: float = 0.1
    rows: int = 16
    width: int = 64
    warmup: float = 0.05
    beta2: float = 0.99
    fitted: bool = False
    ranges_first: float = 0.0
    average: float = 0.0
    continued: float = 0.0
    cross_entropy: float = 0.0
    temperature: float = 1.0
    hidden: float = 0.0
    annealed: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Loss:
    """A model on some rows, in nats per token.

    Args:
        nll: mean negative log-likelihood of the text.
        divergence: mean KL(float model, model) over the vocabulary.
        error: standard error of ``nll`` minus the float model's, from the differences of whole rows: a row's tokens
            hang together.
        known: mean of ``nll`` minus the float model's over the rows that are not STRANGE to it. In TinyStories those
            hold broken quotation marks: a student that is less sure of itself gains more there than rounding costs.
    """

    nll: float
    divergence: float
    error: float
    known: float


@dataclass(frozen=True)
class Cell:
    """What a try came to on the rows that choose and on those that are reported; codes that reloading changed."""

    select: Loss
    report: Loss
    changed: int
    seconds: float

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Cell:
        """What ``dataclasses.asdict`` gave."""
        return cls(**{**tree, "select": Loss(**tree["select"]), "report": Loss(**tree["report"])})


@dataclass
class Bench:
    """The float model and its text.

    Args:
        train: one stream of tokens.
        select, report: validation rows int [n, VALID_WIDTH + 1].
    """

    folder: Path
    config: dict[str, object]
    teacher: nn.Module
    train: np.ndarray
    select: np.ndarray
    report: np.ndarray
    _rows: dict[tuple[float, ...], np.ndarray] = dataclasses.field(default_factory=dict)

    def rows(self, tried: Try) -> np.ndarray:
        """What a try trains on, int32 [steps, rows, width + 1]; asked once, for the float model may write some."""
        facts = {"steps": tried.steps, "rows": tried.rows, "width": tried.width, "seed": tried.seed}
        key = (*facts.values(), tried.continued)
        if key not in self._rows:
            self._rows[key] = training_rows(self.train, self.teacher, **facts, continued=tried.continued)
        return self._rows[key]


def layer_states(model: nn.Module, tokens: mx.array) -> mx.array:
    """Outputs of every layer and of the last norm, float32 [rows, L + 1, positions, D]."""
    h, found = model.model.embed_tokens(tokens), []
    for layer in model.layers:
        h = layer(h, "causal", None)
        found.append(h)
    return mx.stack([*found, model.model.norm(h)], axis=1)


def shared_data() -> Path:
    """The folder of real inputs.

    Raises:
        UserError: it is not on this machine.
    """
    folder = Path(os.environ.get("MLXKD_TEST_DATA", ROOT / ".." / "shared" / "data"))
    if not (folder / "stories260K").is_dir():
        raise UserError("the real model stories260K is not here", where=str(folder), hint="set MLXKD_TEST_DATA")
    return folder


def open_bench(folder: Path) -> Bench:
    """Load the real model and its text; a start token stands before every story."""
    model, tokenizer, config = compat.load(folder / "stories260K")
    text = (folder / "tinystories" / "stories.txt").read_text(encoding="utf-8")
    stories = [np.array([1, *(t for t in tokenizer.encode(s) if t != 1)]) for s in text.split("\n\n") if s.strip()]
    cut = len(stories) * 4 // 5
    train, held_out = (np.concatenate(part).astype(np.int32) for part in (stories[:cut], stories[cut:]))
    valid = rows_at(held_out, np.arange(0, len(held_out) - VALID_WIDTH - 1, VALID_WIDTH), VALID_WIDTH)
    return Bench(folder / "stories260K", config, model, train, valid[::2], valid[1::2])


def loss_on(model: nn.Module, teacher: nn.Module, rows: np.ndarray) -> Loss:
    """A model and the float model on the same rows int [n, width + 1]."""
    found = []
    for start in range(0, len(rows), 16):
        part = mx.array(rows[start : start + 16])
        ours, theirs = (nn.log_softmax(m(part[:, :-1]), axis=-1) for m in (model, teacher))
        text = [-mx.take_along_axis(logs, part[:, 1:, None], axis=-1)[..., 0] for logs in (ours, theirs)]
        divergence = mx.sum(mx.exp(theirs) * (theirs - ours), axis=-1)
        found.append(np.array(mx.stack([mx.mean(x, axis=-1) for x in (*text, divergence)])))
    nll, floats, divergence = np.concatenate(found, axis=1).astype(np.float64)
    excess = nll - floats
    known = excess[floats <= STRANGE * np.median(floats)]
    error = excess.std(ddof=1) / len(rows) ** 0.5
    return Loss(float(nll.mean()), float(divergence.mean()), float(error), float(known.mean()))


def train(bench: Bench, tried: Try) -> nn.Module:
    """Train one student against the float model; returns its masters, on their grids unless it is the control."""
    student, _ = compat.load_model(bench.folder)
    student.train()  # it comes in evaluation mode, which rounds
    if tried.method == "qat":
        grids, learned = quant.plan_for(student, tried.grid + FLOAT_LAYERS), tried.range_rate > 0
        quant.attach(student, grids, learned_ranges=learned, fitted_ranges=tried.fitted)
    plan = phases.phases(tried.steps, share=1.0, ranges_first=tried.ranges_first)
    average = student.trainable_parameters()
    for i, rows in enumerate(bench.rows(tried)):
        if tried.method == "qat" and any(phase.start == i for phase in plan):
            phases.enter(student, phases.phase_at(plan, i))
        if i == 0 or any(phase.start == i for phase in plan):
            step, state = _step(student, bench.teacher, tried, i)  # a compiled step freezes what trains
        sharpness = mx.array(phases.sharpness_at(i / tried.steps))
        mx.eval(step(mx.array(rows), sharpness), state)
        if tried.average:
            blend = partial(_blend, min(tried.average, (i + 1) / (i + 10)))
            average = tree_map(blend, average, student.trainable_parameters())
            mx.eval(average)
    if tried.average:
        student.update(average)
    phases.anneal(student, None)  # what the compiled steps traced is no array
    return student


def _blend(decay: float, old: mx.array, new: mx.array) -> mx.array:
    return decay * old + (1 - decay) * new


def _step(
    student: nn.Module, teacher: nn.Module, tried: Try, first: int
) -> tuple[Callable[..., mx.array], list[object]]:
    """A compiled step: the loss, Adam, linear warm-up, cosine to zero."""
    warmup = max(1, int(tried.warmup * tried.steps))

    def rate(relative: float) -> Callable[[mx.array], mx.array]:
        peak = tried.rate * relative
        rise, fall = optim.linear_schedule(0, peak, warmup), optim.cosine_decay(peak, tried.steps - warmup)
        joined = optim.join_schedules([rise, fall], [warmup])
        return lambda step: joined(step + first)

    adam = partial(optim.Adam, betas=[0.9, tried.beta2], bias_correction=True)
    optimizer = optim.MultiOptimizer(
        [adam(rate(tried.range_rate)), adam(rate(1.0))], [lambda path, _: path.rpartition(".")[2].startswith("qat_")]
    )

    def loss_of(rows: mx.array, states: mx.array, sharpness: mx.array) -> mx.array:
        if tried.annealed:
            phases.anneal(student, sharpness)
        theirs = mx.softmax(teacher.model.embed_tokens.as_linear(states[:, -1]) / tried.temperature, axis=-1)
        ours = layer_states(student, rows[:, :-1])
        logits = student.model.embed_tokens.as_linear(ours[:, -1])
        soft = logits / tried.temperature
        # KL up to the teacher's entropy, which has no gradient.
        divergence = mx.mean(mx.logsumexp(soft, axis=-1) - mx.sum(theirs * soft, axis=-1))
        loss = (1 - tried.cross_entropy) * divergence
        if tried.cross_entropy:
            loss = loss + tried.cross_entropy * mx.mean(nn.losses.cross_entropy(logits, rows[:, 1:]))
        if tried.hidden:
            error, size = (mx.mean(mx.square(x[:, :-1]), axis=(0, 2, 3)) for x in (ours - states, states))
            loss = loss + tried.hidden * mx.mean(error / size)
        return loss

    state = [student.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(rows: mx.array, sharpness: mx.array) -> mx.array:
        states = layer_states(teacher, rows[:, :-1])
        loss, gradients = nn.value_and_grad(student, loss_of)(rows, states, sharpness)
        optimizer.update(student, gradients)
        return loss

    return step, state


def packed(bench: Bench, tried: Try) -> quant.Packed:
    """What a quantised try ships."""
    grid = tried.grid + FLOAT_LAYERS
    if tried.method == "rounded":
        return post_training(bench.teacher, bench.config, grid, fitted_ranges=tried.fitted)
    if tried.method in ("dwq", "gptq"):
        taken = bench.rows(tried).reshape(-1, tried.width + 1)
        if tried.method == "gptq":
            return post_training(bench.teacher, bench.config, grid, "gptq", rows=taken[:, :-1])
        options = {"rows": taken, "held_out": taken[: tried.rows], "rate": tried.rate, "batch_size": tried.rows}
        return post_training(bench.teacher, bench.config, grid, "dwq", fitted_ranges=tried.fitted, **options)
    return quant.pack(train(bench, tried), bench.config)


def run(bench: Bench, tried: Try) -> Cell:
    """Measure one cell, on deployed kernels."""
    begin, changed = time.perf_counter(), 0
    if tried.method == "control":
        model = train(bench, tried) if tried.steps else bench.teacher
    else:
        shipped = packed(bench, tried)
        model = shipped.model
        changed = changed_after_reload(bench, shipped)
    select, report = (loss_on(model, bench.teacher, rows) for rows in (bench.select, bench.report))
    return Cell(select, report, changed, time.perf_counter() - begin)


def changed_after_reload(bench: Bench, shipped: quant.Packed) -> int:
    """Codes that differ between the evaluated student and the saved and reloaded one."""
    with tempfile.TemporaryDirectory() as folder:
        quant.save_student(Path(folder) / "student", shipped, bench.folder)
        return quant.changed_codes(shipped, quant.load_student(Path(folder) / "student"))


def cache_folder() -> Path:
    """Where measured cells live: ``mlxkd/qat-cells`` in the user's cache."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "mlxkd" / "qat-cells"


def kept(bench: Bench, tried: Try) -> Cell:
    """The cell of a try, measured now or before, under this MLX and this METHOD."""
    plain = dataclasses.asdict(Try(tried.method, tried.grid))
    chosen = {name: value for name, value in dataclasses.asdict(tried).items() if value != plain[name]}
    facts = {"method": tried.method, "grid": tried.grid, **chosen, "mlx": versions()["mlx"], "version": METHOD}
    path = cache_folder() / f"{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]}.json"
    if path.is_file():
        return Cell.from_json(json.loads(path.read_text(encoding="utf-8"))["cell"])
    cell = run(bench, tried)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"try": facts, "cell": dataclasses.asdict(cell)})
    return cell
