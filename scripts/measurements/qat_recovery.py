"""How much of the loss that rounding costs quantisation-aware training wins back, on a real model.

Model: stories260K (5 layers, width 64; its 172-wide down projection stays float on group-32 grids). Text:
TinyStories, the last fifth of the stories for validation, deployed kernels in every evaluation. Teacher: the
float model alone, so float training continues at zero gradient and its validation NLL is the ceiling.
Peers: rounding (mx.quantize), k-means palettes, and mlx-lm's own DWQ loop on the same batches at the best of
several learning rates, chosen in its favour on the validation text.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from mlxkd import compat, quant
from mlxkd.errors import UserError
from mlxkd.metric import Metric
from mlxkd.quant.baselines import post_training
from mlxkd.runtime import device_name

ROOT = Path(__file__).parents[2]
TRAIN_WIDTH, VALID_WIDTH = 64, 256  # tokens per row: attention over long rows dominates a step of so small a model
ROWS = 16
DWQ_RATES = (1e-4, 3e-4, 1e-3)


@dataclass(frozen=True)
class Try:
    """One training run: everything that was searched over."""

    grid: str
    steps: int = 1200
    rate: float = 1e-3
    warmup: float = 0.05
    range_rate: float = 0.0  # relative to ``rate``; 0 takes ranges from the weights
    beta2: float = 0.99
    average: float = 0.0  # decay of an exponential average of the masters; 0 ships the last
    seed: int = 0


# The best settings found so far; docs/quantisation.md has the search and says which of them were run.
CHOSEN = {
    "recovered_4bit": Try("mlx-affine4-g32", 300, 1e-3, range_rate=0.1),
    "recovered_3bit": Try("mlx-affine3-g32", 1200, 1e-3, range_rate=0.1),
    "recovered_2bit": Try("mlx-affine2-g32", 1200, 2e-3, range_rate=0.1),
    "recovered_lut4": Try("ane-lut4", 300, 1e-3, range_rate=0.1),
    "recovered_int8": Try("ane-int8", 300, 3e-4, range_rate=0.1),
}


@dataclass
class Bench:
    """The float model, its config, one stream of training tokens, validation rows [n, VALID_WIDTH + 1], its NLL."""

    folder: Path
    config: dict[str, object]
    teacher: nn.Module
    train: np.ndarray
    valid: np.ndarray
    ceiling: float


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
    return Bench(folder / "stories260K", config, model, train, valid, loss_on(model, valid))


def rows_at(stream: np.ndarray, starts: np.ndarray, width: int) -> np.ndarray:
    """Rows [n, width + 1] of a stream."""
    return stream[starts[:, None] + np.arange(width + 1)]


def batches(bench: Bench, tried: Try) -> np.ndarray:
    """The rows of a run, int32 [steps, ROWS, TRAIN_WIDTH + 1]; the same for every method."""
    starts = np.random.default_rng(tried.seed).integers(0, len(bench.train) - TRAIN_WIDTH - 1, (tried.steps, ROWS))
    return rows_at(bench.train, starts.reshape(-1), TRAIN_WIDTH).reshape(tried.steps, ROWS, -1)


def loss_on(model: nn.Module, rows: np.ndarray) -> float:
    """Mean NLL in nats per token, each row summed first."""
    total = 0.0
    for start in range(0, len(rows), ROWS):
        part = mx.array(rows[start : start + ROWS])
        losses = nn.losses.cross_entropy(model(part[:, :-1]), part[:, 1:])
        total += float(mx.sum(mx.sum(losses, axis=-1)))
    return total / (rows.shape[0] * (rows.shape[1] - 1))


def distil(bench: Bench, tried: Try) -> quant.Packed:
    """Train one student against the float model on one grid; returns what ships."""
    student, _ = compat.load_model(bench.folder)
    quant.attach(student, quant.plan_for(student, f"{tried.grid}|float"), learned_ranges=tried.range_rate > 0)
    step, state = _step(student, bench.teacher, tried)
    average = student.trainable_parameters()
    for i, rows in enumerate(batches(bench, tried)):
        mx.eval(step(mx.array(rows)), state)
        if tried.average:
            decay = min(tried.average, (i + 1) / (i + 10))
            blend = partial(_blend, decay)
            average = tree_map(blend, average, student.trainable_parameters())
            mx.eval(average)
    if tried.average:
        student.update(average)
    return quant.pack(student, bench.config)


def _blend(decay: float, old: mx.array, new: mx.array) -> mx.array:
    return decay * old + (1 - decay) * new


def _step(student: nn.Module, teacher: nn.Module, tried: Try) -> tuple[Callable[[mx.array], mx.array], list[object]]:
    """A compiled step: KL to the float model, Adam, linear warm-up, cosine to zero."""
    warmup = max(1, int(tried.warmup * tried.steps))

    def rate(relative: float) -> Callable[[mx.array], mx.array]:
        peak = tried.rate * relative
        rise, fall = optim.linear_schedule(0, peak, warmup), optim.cosine_decay(peak, tried.steps - warmup)
        return optim.join_schedules([rise, fall], [warmup])

    adam = partial(optim.Adam, betas=[0.9, tried.beta2], bias_correction=True)
    optimizer = optim.MultiOptimizer(
        [adam(rate(tried.range_rate)), adam(rate(1.0))], [lambda path, _: path.rpartition(".")[2].startswith("qat_")]
    )

    def loss_of(rows: mx.array) -> mx.array:
        theirs = nn.log_softmax(teacher(rows[:, :-1]), axis=-1)
        ours = nn.log_softmax(student(rows[:, :-1]), axis=-1)
        return mx.mean(mx.sum(mx.exp(theirs) * (theirs - ours), axis=-1))

    state = [student.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(rows: mx.array) -> mx.array:
        loss, gradients = nn.value_and_grad(student, loss_of)(rows)
        optimizer.update(student, gradients)
        return loss

    return step, state


def changed_after_reload(bench: Bench, packed: quant.Packed) -> int:
    """Codes that differ between the evaluated student and the saved and reloaded one."""
    with tempfile.TemporaryDirectory() as folder:
        quant.save_student(Path(folder) / "student", packed, bench.folder)
        return quant.changed_codes(packed, quant.load_student(Path(folder) / "student"))


def best_dwq(bench: Bench, tried: Try, rates: tuple[float, ...]) -> float:
    """Validation NLL of mlx-lm's DWQ on the run's own batches, at the best rate."""
    rows = batches(bench, tried).reshape(-1, TRAIN_WIDTH + 1)
    losses = []
    for rate in rates:
        packed = post_training(
            bench.teacher, bench.config, f"{tried.grid}|float", "dwq",
            rows=rows, held_out=rows[:ROWS], rate=rate, batch_size=ROWS,
        )  # fmt: skip
        losses.append(loss_on(packed.model, bench.valid))
    return min(losses)


def measure(quick: bool) -> dict[str, Metric]:
    """Shares of the float-to-rounded NLL gap recovered, residual gaps over DWQ's, and codes changed by reloading."""
    bench, device = open_bench(shared_data()), device_name()
    found: dict[str, Metric] = {}
    changed = 0
    for key, chosen in CHOSEN.items():
        tried = replace(chosen, steps=20) if quick else chosen
        rounded = post_training(bench.teacher, bench.config, f"{tried.grid}|float")
        packed = distil(bench, tried)
        changed += changed_after_reload(bench, packed)
        start, end = loss_on(rounded.model, bench.valid), loss_on(packed.model, bench.valid)
        gap = start - bench.ceiling
        note = f"NLL float {bench.ceiling:.4f}, rounded {start:.4f}, trained {end:.4f}; {tried.steps} steps"
        found[key] = Metric((start - end) / gap, "share", "measured", device, bench.valid.size, note=note)
        if key in ("recovered_4bit", "recovered_3bit"):
            dwq = best_dwq(bench, tried, DWQ_RATES[1:2] if quick else DWQ_RATES)
            ratio = (end - bench.ceiling) / (dwq - bench.ceiling)
            note = f"NLL after DWQ {dwq:.4f}, best of its rates {DWQ_RATES}"
            found[key.replace("recovered", "residual_over_dwq")] = Metric(ratio, "ratio", "measured", device, note=note)
    found["changed_codes"] = Metric(float(changed), "codes", "measured", device, len(CHOSEN))
    return found
