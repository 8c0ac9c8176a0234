"""What quantisation-aware training adds to a step: time and peak memory of the same step, with and without it.

A Llama with random weights in which matrix products dominate (width 512, 4 layers, 4,096 tokens a step), AdamW,
compiled; float and quantised steps alternate in one process. Peer: the float step itself. On a CPU the processor's
seconds are counted too: unlike the clock's they hardly change when other programs want the same cores.
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


def build(grid: str | None, rows: int) -> Callable[[], None]:
    """One training step as a function without arguments."""
    mx.random.seed(0)
    model = compat.build_model(CONFIG)
    if grid:
        quant.attach(model, quant.plan_for(model, grid))
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


def peak_over_base(run: Callable[[], None]) -> int:
    """Peak bytes of one step beyond what the other model holds is not separable: bytes at the peak of this step."""
    mx.clear_cache()
    mx.reset_peak_memory()
    run()
    return int(mx.get_peak_memory())


def measure(quick: bool) -> dict[str, Metric]:
    """time_ratio, processor_ratio (on a CPU) and memory_ratio, quantised step over float step."""
    rows, repeats = (8, 3) if quick else (32, 5)
    held = {}
    for name, grid in (("float", None), ("quantised", GRID)):
        run = build(grid, rows)
        run()
        held[name] = peak_over_base(run)
        del run
        mx.clear_cache()
    runs = {"float": build(None, rows), "quantised": build(GRID, rows)}
    clock: dict[str, list[float]] = {name: [] for name in runs}
    processor: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            begin, spent = time.perf_counter(), time.process_time()
            run()
            clock[name].append(time.perf_counter() - begin)
            processor[name].append(time.process_time() - spent)
    device = device_name()
    note = f"{GRID}, {rows * 128} tokens, width {CONFIG['hidden_size']}, random weights"
    found = {"time_ratio": _ratio(clock, device, note)}
    if mx.default_device().type == mx.DeviceType.cpu:
        found["processor_ratio"] = _ratio(processor, device, note)
    found["memory_ratio"] = Metric(held["quantised"] / held["float"], "ratio", "measured", device, 1, note=note)
    return found


def _ratio(seconds: dict[str, list[float]], device: str, note: str) -> Metric:
    """The median of the pairs, which alternated."""
    ratios = sorted(q / f for q, f in zip(seconds["quantised"], seconds["float"], strict=True))
    spread = f"pairs {ratios[0]:.3f} to {ratios[-1]:.3f}, float step {min(seconds['float']):.2f} s; {note}"
    return Metric(ratios[len(ratios) // 2], "ratio", "measured", device, len(ratios), note=spread)
