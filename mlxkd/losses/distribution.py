"""A softmax distribution with its logarithm, from one exponential per element."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

# Stands for log 0: exp gives 0 and products with 0 stay 0, where -inf would give NaN.
LOG_ZERO = -1e30
TINY = 1e-38  # about the smallest normal float32


@dataclass(frozen=True)
class Distribution:
    """Probabilities over the last axis.

    Args:
        log: float32 [n, V], log-probabilities; LOG_ZERO where the probability is 0.
        p: float32 [n, V], probabilities.
    """

    log: mx.array
    p: mx.array


def softmax(logits: mx.array, temperature: float = 1.0) -> Distribution:
    """softmax(logits / temperature) over the last axis, in float32.

    The exponential is what costs on a CPU (30 times a product), so probabilities and logarithm share it.
    """
    z = logits.astype(mx.float32)
    if temperature != 1.0:
        z = z / temperature
    shifted = z - mx.max(z, axis=-1, keepdims=True)
    e = mx.exp(shifted)
    total = mx.sum(e, axis=-1, keepdims=True)
    return Distribution(shifted - mx.log(total), e / total)


def through_softmax(student: Distribution, v: mx.array) -> mx.array:
    """Gradient with respect to logits of a loss whose gradient with respect to probabilities is ``v`` [n, V]."""
    return student.p * (v - mx.sum(student.p * v, axis=-1, keepdims=True))


def mixture(first: Distribution, second: Distribution, share: mx.array | float) -> Distribution:
    """share * first + (1 - share) * second; ``share`` a scalar or [n, 1]."""
    p = share * first.p + (1 - share) * second.p
    # A logarithm of the sum costs one call where logaddexp costs two; below the smallest float both addends are 0.
    p = mx.maximum(p, TINY)
    return Distribution(mx.log(p), p)
