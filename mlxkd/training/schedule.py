"""Learning rate and optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_unflatten

from mlxkd.recipe_sections import Optimizer
from mlxkd.trees import leaves


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
    """AdamW that decays matrices only; norms and ranges keep their scale. Learned ranges come first. Bias-corrected."""
    ranges, decayed, plain = (
        optim.AdamW(options.learning_rate, betas=list(options.betas), weight_decay=decay, bias_correction=True)
        for decay in (0.0, options.weight_decay, 0.0)
    )
    return optim.MultiOptimizer([ranges, decayed, plain], [_is_range, lambda _, weight: weight.ndim >= 2])


def _is_range(path: str, _: mx.array) -> bool:
    return path.rpartition(".")[2].startswith("qat_")


def set_rate(optimizer: optim.MultiOptimizer, rate: float, range_rate: float) -> None:
    """Give every part the rate of this step; learned ranges ``range_rate`` times as much."""
    for part, factor in zip(optimizer.optimizers, (range_rate, 1.0, 1.0), strict=True):
        part.learning_rate = mx.array(rate * factor, mx.float32)


def grown(optimizer: optim.MultiOptimizer, options: Optimizer, parameters: Any) -> optim.MultiOptimizer:
    """The optimiser with moments for ``parameters`` too; those that it has stay, also of what rests for now."""
    found = adamw(options)
    found.init(parameters)
    merged = dict(leaves(found.state)) | dict(leaves(optimizer.state))
    found.state = tree_unflatten(list(merged.items()))
    return found
