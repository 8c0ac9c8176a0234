"""Activations. Formulas as documented for each MIL operation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ane.mil.ops import _functions
from ane.mil.ops._arguments import along
from ane.mil.ops.registry import OpContext, op

Array = np.ndarray


@op("relu", versions=("ios15",))
def relu(ctx: OpContext, *, x: Array) -> Array:
    """max(x, 0)."""
    return np.maximum(x, 0)


@op("relu6", versions=("ios15",))
def relu6(ctx: OpContext, *, x: Array) -> Array:
    """min(max(x, 0), 6)."""
    return np.clip(x, 0, 6)


@op("sigmoid", versions=("ios15",))
def sigmoid(ctx: OpContext, *, x: Array) -> Array:
    """1 / (1 + e^-x)."""
    return _functions.sigmoid(x)


@op("silu", versions=("ios15",))
def silu(ctx: OpContext, *, x: Array) -> Array:
    """x sigmoid(x)."""
    return x * _functions.sigmoid(x)


@op("softplus", versions=("ios15",))
def softplus(ctx: OpContext, *, x: Array) -> Array:
    """log(1 + e^x)."""
    return _functions.softplus(x)


@op("softsign", versions=("ios15",))
def softsign(ctx: OpContext, *, x: Array) -> Array:
    """x / (1 + |x|)."""
    return x / (1 + np.abs(x))


@op("softmax", versions=("ios15",))
def softmax(ctx: OpContext, *, x: Array, axis: Any = -1) -> Array:
    """exp(x) / sum(exp(x)) along ``axis``."""
    return _functions.softmax(x, int(axis))


@op("gelu", versions=("ios15",))
def gelu(ctx: OpContext, *, x: Array, mode: str = "EXACT") -> Array:
    """x Phi(x), exactly or by its tanh or sigmoid approximation."""
    if mode == "EXACT":
        return 0.5 * x * (1 + _functions.erf(x / np.float32(math.sqrt(2))))
    if mode == "TANH_APPROXIMATION":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if mode == "SIGMOID_APPROXIMATION":
        return x * _functions.sigmoid(1.702 * x)
    raise ctx.fault(f"gelu mode {mode!r} is not one of EXACT, TANH_APPROXIMATION, SIGMOID_APPROXIMATION")


@op("elu", versions=("ios15", "ios17"))
def elu(ctx: OpContext, *, x: Array, alpha: Any) -> Array:
    """x where positive, else alpha (e^x - 1)."""
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


@op("leaky_relu", versions=("ios15", "ios17"))
def leaky_relu(ctx: OpContext, *, x: Array, alpha: Any) -> Array:
    """x where x >= 0, else alpha x."""
    return np.where(x >= 0, x, alpha * x)


@op("prelu", versions=("ios15", "ios17"))
def prelu(ctx: OpContext, *, x: Array, alpha: Any) -> Array:
    """leaky_relu with one slope per channel (axis 1)."""
    return np.where(x > 0, x, along(alpha, 1, x.ndim) * x)


@op("clamped_relu", versions=("ios15", "ios17"))
def clamped_relu(ctx: OpContext, *, x: Array, alpha: Any, beta: Any) -> Array:
    """min(beta, leaky_relu(x, alpha))."""
    return np.minimum(beta, np.where(x >= 0, x, alpha * x))


@op("thresholded_relu", versions=("ios15", "ios17"))
def thresholded_relu(ctx: OpContext, *, x: Array, alpha: Any) -> Array:
    """x where x >= alpha, else 0."""
    return np.where(x >= alpha, x, np.zeros((), x.dtype))


@op("linear_activation", versions=("ios15", "ios17"))
def linear_activation(ctx: OpContext, *, x: Array, alpha: Any, beta: Any) -> Array:
    """alpha x + beta."""
    return alpha * x + beta


@op("scaled_tanh", versions=("ios15", "ios17"))
def scaled_tanh(ctx: OpContext, *, x: Array, alpha: Any, beta: Any) -> Array:
    """alpha tanh(beta x)."""
    return alpha * np.tanh(beta * x)


@op("sigmoid_hard", versions=("ios15", "ios17"))
def sigmoid_hard(ctx: OpContext, *, x: Array, alpha: Any, beta: Any) -> Array:
    """min(max(alpha x + beta, 0), 1)."""
    return _functions.hard_sigmoid(x, alpha, beta)


@op("softplus_parametric", versions=("ios15", "ios17"))
def softplus_parametric(ctx: OpContext, *, x: Array, alpha: Any, beta: Any) -> Array:
    """alpha_c log(1 + e^(beta_c x)) with one pair per channel (axis 1)."""
    return along(alpha, 1, x.ndim) * _functions.softplus(along(beta, 1, x.ndim) * x)
