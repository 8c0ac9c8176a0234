"""What quantisation-aware training adds to a step: time and peak memory of the same step, with and without it.

A Llama with random weights in which matrix products dominate (width 512, 4 layers, 4,096 tokens a step), AdamW,
compiled; float and quantised steps (straight through, and annealed) alternate in one process. Peer: the float step
itself. On a CPU the processor's seconds are counted too: unlike the clock's they hardly change when other programs want
the same cores.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mlxkd import compat, quant
from mlxkd.metric import Metric
from mlxkd.quant import phases
from mlxkd.runtime import device_name

CONFIG = {
    "model_type": "llama",
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "vocab_size": 2048,
    "tie_word_embeddings": True,
}
GRID = "mlx-affine4-g64"
SHARPNESS = 10.0  # of annealed rounding, half way through a phase
SIDES = {"float": "", "quantised": "straight through", "annealed": "annealed rounding"}


def build(side: str, rows: int) -> Callable[[], None]:
    """One training step of a side as a function without arguments."""
    mx.random.seed(0)
    model = compat.build_model(CONFIG)
    if side != "float":
        quant.attach(model, quant.plan_for(model, GRID))
    if side == "annealed":
        phases.anneal(model, mx.array(SHARPNESS))
    tokens = mx.random.randint(0, int(CONFIG["vocab_size"]), (rows, 129))
    optimizer = optim.AdamW(1e-4)
    state = [model.state, optimizer.state]

    def loss() -> mx.array:
        return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]).mean()

    @partial(mx.compile, inputs=state, outputs=state)
    def step() -> mx.array:
        value, gradients = nn.value_and_grad(model, loss)()
        optimizer.update(model, gradients)
        return value

    def run() -> None:
        mx.eval(step(), state)

    return run


def peak(side: str, rows: int) -> int:
    """Peak bytes of a step, with nothing else held."""
    run = build(side, rows)
    run()
    mx.clear_cache()
    mx.reset_peak_memory()
    run()
    return int(mx.get_peak_memory())


def measure(quick: bool) -> dict[str, Metric]:
    """time_ratio, processor_ratio (on a CPU) and memory_ratio, quantised step over float step; annealed_ likewise."""
    rows, repeats = (8, 3) if quick else (32, 5)
    held = {}
    for side in SIDES:
        held[side] = peak(side, rows)
        mx.clear_cache()
    runs = {side: build(side, rows) for side in SIDES}
    clock: dict[str, list[float]] = {side: [] for side in runs}
    processor: dict[str, list[float]] = {side: [] for side in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for side, run in runs.items():
            begin, spent = time.perf_counter(), time.process_time()
            run()
            clock[side].append(time.perf_counter() - begin)
            processor[side].append(time.process_time() - spent)
    device, found = device_name(), {}
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    for side, prefix in (("quantised", ""), ("annealed", "annealed_")):
        note = f"{GRID}, {SIDES[side]}, {rows * 128} tokens, width {CONFIG['hidden_size']}, random weights"
        found[f"{prefix}time_ratio"] = _ratio(clock, side, device, note)
        if on_cpu:
            found[f"{prefix}processor_ratio"] = _ratio(processor, side, device, note)
        memory = held[side] / held["float"]
        found[f"{prefix}memory_ratio"] = Metric(memory, "ratio", "measured", device, 1, note=note)
    return found


def _ratio(seconds: dict[str, list[float]], side: str, device: str, note: str) -> Metric:
    """The median of the pairs, which alternated."""
    ratios = sorted(q / f for q, f in zip(seconds[side], seconds["float"], strict=True))
    spread = f"pairs {ratios[0]:.3f} to {ratios[-1]:.3f}, float step {min(seconds['float']):.2f} s; {note}"
    return Metric(ratios[len(ratios) // 2], "ratio", "measured", device, len(ratios), note=spread)
