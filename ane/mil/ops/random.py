"""Random tensors. A seed >= 0 gives the same draws at every prediction; Apple's own streams are not public."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ane.mil.ops._arguments import integers
from ane.mil.ops.registry import OpContext, op

Array = np.ndarray


def _sizes(ctx: OpContext, shape: Any) -> tuple[int, ...]:
    """The shape asked for, refused when it is beyond the memory bound."""
    sizes = integers(shape)
    ctx.reserve(math.prod(sizes))
    return sizes


@op("random_bernoulli", versions=("ios15",))
def random_bernoulli(ctx: OpContext, *, shape: Any, prob: Any = 0.5, seed: Any = -1) -> Array:
    """1 with probability ``prob``, else 0."""
    return ctx.random(seed).random(_sizes(ctx, shape)) < prob


@op("random_uniform", versions=("ios15",))
def random_uniform(ctx: OpContext, *, shape: Any, low: Any = 0.0, high: Any = 1.0, seed: Any = -1) -> Array:
    """Uniform in [low, high)."""
    return low + (high - low) * ctx.random(seed).random(_sizes(ctx, shape), dtype=np.float32)


@op("random_normal", versions=("ios15",))
def random_normal(ctx: OpContext, *, shape: Any, mean: Any = 0.0, stddev: Any = 1.0, seed: Any = -1) -> Array:
    """Normal with the given mean and standard deviation."""
    return mean + stddev * ctx.random(seed).standard_normal(_sizes(ctx, shape), dtype=np.float32)


@op("random_categorical", versions=("ios15",))
def random_categorical(ctx: OpContext, *, x: Array, mode: str = "logits", size: Any = 1, seed: Any = -1) -> Array:
    """``size`` draws with replacement from each distribution in the last axis of x (logits or probabilities).

    Gumbel's trick: argmax(logits + Gumbel noise) is distributed as softmax(logits).
    """
    if mode not in ("logits", "probs"):
        raise ctx.fault(f"random_categorical mode {mode!r} is not logits or probs")
    with np.errstate(divide="ignore"):
        logits = np.log(x.astype(np.float64)) if mode == "probs" else x.astype(np.float64)
    ctx.reserve(x.size * int(size))
    noise = ctx.random(seed).gumbel(size=(*x.shape[:-1], int(size), x.shape[-1]))
    return np.argmax(logits[..., None, :] + noise, axis=-1)
