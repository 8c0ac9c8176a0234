"""Learning rate and optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.optimizers as optim

from mlxkd.recipe import Optimizer


def cosine(options: Optimizer, steps: int) -> Callable[[int], float]:
    """The rate of each step (0, 1, ...): linear warm-up, then a cosine to ``final`` times the peak.

    The quantised phase lies at the end of the run, so it is fused with the cool-down (arXiv 2509.22935).
    """
    warmup = max(1, round(options.warmup * steps))

    def rate(step: int) -> float:
        if step < warmup:
            return options.learning_rate * (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        floor = options.final
        return options.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))

    return rate


def adamw(options: Optimizer) -> optim.MultiOptimizer:
    """AdamW that decays matrices only; norms and ranges keep their scale. Bias-corrected."""
    decayed, plain = (
        optim.AdamW(options.learning_rate, betas=list(options.betas), weight_decay=decay, bias_correction=True)
        for decay in (options.weight_decay, 0.0)
    )
    return optim.MultiOptimizer([decayed, plain], [lambda _, weight: weight.ndim >= 2])


def set_rate(optimizer: optim.MultiOptimizer, rate: float) -> None:
    """Give every part the rate of this step."""
    for part in optimizer.optimizers:
        part.learning_rate = mx.array(rate, mx.float32)
