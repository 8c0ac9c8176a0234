"""Peak memory and time of the chunked head loss against the naive form, forward KL with both gradients.

Peers: the naive form (full logits of both models, automatic differentiation) and the same with mlx-lm's
``kl_div_loss`` (fused on Metal only). Random weights: vocabulary 131,072, 4,096 tokens, student width 64, teacher
width 96, fp32; ``--quick`` takes 512 tokens. Values and gradients are compared first. The peers hold eight to ten
arrays of tokens x vocabulary: where that does not fit into free memory their figures are missing, not guessed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlxkd import runtime
from mlxkd.losses.chunk import Chunk, Plan
from mlxkd.losses.head import chunk_rows, products, run
from mlxkd.losses.term import Term
from mlxkd.metric import Metric, from_samples
from mlxkd.students.split import Head
from mlxkd.teachers.targets import DenseTargets

VOCABULARY, WIDTH, TEACHER_WIDTH = 131072, 64, 96
ARRAYS = {"naive": 10.2, "mlx_lm": 8.2}  # of tokens x vocabulary at the peak, as measured at 512 tokens
Sides = dict[str, Callable[[], list[mx.array]]]


def measure(quick: bool) -> dict[str, Metric]:
    """memory_ratio and time_ratio (naive over ours), the same over mlx-lm's loss, and our peak."""
    tokens = 512 if quick else 4096
    need = {name: arrays * 4 * tokens * VOCABULARY for name, arrays in ARRAYS.items()}
    free = _available() - 2**30  # other programs need theirs
    sides = {name: side for name, side in _sides(tokens).items() if need.get(name, 0) <= free}
    notes = {
        name: f"{tokens} tokens, vocabulary {VOCABULARY}, fp32, random weights"
        if name in sides
        else f"needs about {need[name] / 2**30:.0f} GiB, {free / 2**30:.0f} are free"
        for name in need
    }
    first = {name: side() for name, side in sides.items()}
    differences = {name: _difference(value, first["ours"]) for name, value in first.items()}
    del first
    peaks, times = {}, {name: list[float]() for name in sides}
    for _ in range(2):
        for name, side in sides.items():
            peaks[name], seconds = _clocked(side)
            times[name].append(seconds)
    return _metrics(peaks, times, differences, notes, tokens)


def _sides(tokens: int) -> Sides:
    mx.random.seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=False)
    teacher = mx.random.normal((VOCABULARY, TEACHER_WIDTH)) * 0.1
    h, ht = mx.random.normal((tokens, WIDTH)), mx.random.normal((tokens, TEACHER_WIDTH))
    mx.eval(head.parameters(), teacher, h, ht)
    targets = DenseTargets(ht, lambda x: x @ teacher.T, VOCABULARY)
    plan = Plan((Term("forward_kl"),), (("teacher", targets.form),))
    data = Chunk(mx.zeros(tokens, mx.int32), mx.ones(tokens), {}, {})

    def ours() -> list[mx.array]:
        head_products = products(Head(head, tied=False), VOCABULARY)
        result = run(plan, head_products, h, data, {"teacher": targets}, chunk_rows(tokens, VOCABULARY))
        assert result.hidden is not None
        return [result.sums[0], result.hidden, result.variables[0]]

    def through(kl: Callable[[mx.array, mx.array], mx.array]) -> Callable[[], list[mx.array]]:
        def objective(hidden: mx.array, weight: mx.array) -> mx.array:
            return mx.sum(kl(hidden @ weight.T, ht @ teacher.T))

        def side() -> list[mx.array]:
            value, gradients = mx.value_and_grad(objective, argnums=(0, 1))(h, head.weight)
            return [value, *gradients]

        return side

    return {"ours": ours, "naive": through(_naive), "mlx_lm": through(_mlx_lm())}


def _naive(z: mx.array, zt: mx.array) -> mx.array:
    q, p = nn.log_softmax(z), nn.log_softmax(zt)
    return mx.sum(mx.exp(p) * (p - q), axis=-1)


def _mlx_lm() -> Callable[[mx.array, mx.array], mx.array]:
    with runtime.open_file_limit_kept():
        from mlx_lm.tuner.losses import kl_div_loss
    return lambda z, zt: kl_div_loss(z, zt)


def _difference(a: list[mx.array], b: list[mx.array]) -> float:
    return max(float(mx.abs(x - y).max() / mx.maximum(mx.abs(y).max(), 1e-6)) for x, y in zip(a, b, strict=True))


def _clocked(side: Callable[[], list[mx.array]]) -> tuple[int, float]:
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    start = time.perf_counter()
    mx.eval(side())
    return mx.get_peak_memory() - before, time.perf_counter() - start


def _available() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return runtime.total_memory() or 0


def _metrics(
    peaks: dict[str, int],
    times: dict[str, list[float]],
    differences: dict[str, float],
    notes: dict[str, str],
    tokens: int,
) -> dict[str, Metric]:
    device = runtime.device_name()
    found = {"peak_ours": Metric(float(peaks["ours"]), "bytes", "measured", device, note=f"{tokens} tokens")}
    found["seconds_ours"] = from_samples(times["ours"], "s", method="measured", device=device)
    for side, prefix in (("naive", ""), ("mlx_lm", "mlx_lm_")):
        for kind in ("memory", "time"):
            value = None
            if side in peaks:
                value = peaks[side] / peaks["ours"] if kind == "memory" else min(times[side]) / min(times["ours"])
            found[f"{prefix}{kind}_ratio"] = Metric(value, "ratio", "measured", device, note=notes[side])
        if side in differences:
            found[f"{prefix}difference"] = Metric(differences[side], "relative", "measured", device)
    return found
