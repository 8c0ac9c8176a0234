"""Normalisations. Statistics run in float64: small variances of large values survive."""

from __future__ import annotations

from typing import Any

import numpy as np

from ane.mil.ops._arguments import along, axes_of
from ane.mil.ops.registry import OpContext, op

Array = np.ndarray
EPSILON = 1e-5


def _standardised(x: Array, axes: tuple[int, ...], epsilon: Any) -> Array:
    wide = x.astype(np.float64)
    centred = wide - wide.mean(axis=axes, keepdims=True)
    variance = np.square(centred).mean(axis=axes, keepdims=True)
    return centred / np.sqrt(variance + np.float64(epsilon))


@op("layer_norm", versions=("ios15", "ios17"))
def layer_norm(
    ctx: OpContext, *, x: Array, axes: Any = None, gamma: Any = None, beta: Any = None, epsilon: Any = EPSILON
) -> Array:
    """gamma (x - mean) / sqrt(var + epsilon) + beta over ``axes`` (default all); gamma, beta shaped x.shape[axes]."""
    at = tuple(sorted(axes_of(axes, x.ndim)))
    y = _standardised(x, at, epsilon)
    shape = [x.shape[i] if i in at else 1 for i in range(x.ndim)]
    if gamma is not None:
        y = y * np.reshape(gamma, shape)
    return y if beta is None else y + np.reshape(beta, shape)


def _per_channel(y: Array, gamma: Any, beta: Any) -> Array:
    if gamma is not None:
        y = y * along(gamma, 1, y.ndim)
    return y if beta is None else y + along(beta, 1, y.ndim)


@op("instance_norm", versions=("ios15", "ios17"))
def instance_norm(ctx: OpContext, *, x: Array, gamma: Any = None, beta: Any = None, epsilon: Any = EPSILON) -> Array:
    """Standardise each channel of each instance over its spatial axes."""
    return _per_channel(_standardised(x, tuple(range(2, x.ndim)), epsilon), gamma, beta)


@op("batch_norm", versions=("ios15", "ios17"))
def batch_norm(
    ctx: OpContext,
    *,
    x: Array,
    mean: Array,
    variance: Array,
    gamma: Any = None,
    beta: Any = None,
    epsilon: Any = EPSILON,
) -> Array:
    """gamma (x - mean) / sqrt(variance + epsilon) + beta with given statistics per channel (axis 1)."""
    deviation = np.sqrt(np.asarray(variance, np.float64) + np.float64(epsilon))
    y = (x - along(mean, 1, x.ndim)) / along(deviation, 1, x.ndim)
    return _per_channel(y, gamma, beta)


@op("l2_norm", versions=("ios15", "ios17"))
def l2_norm(ctx: OpContext, *, x: Array, epsilon: Any = 1e-6) -> Array:
    """x / sqrt(sum x^2 + epsilon) over the last three axes."""
    wide = x.astype(np.float64)
    return wide / np.sqrt(np.square(wide).sum(axis=(-3, -2, -1), keepdims=True) + np.float64(epsilon))


@op("local_response_norm", versions=("ios15", "ios17"))
def local_response_norm(
    ctx: OpContext,
    *,
    x: Array,
    size: Any,
    alpha: Any = 1e-4,
    beta: Any = 0.75,
    k: Any = 1.0,
) -> Array:
    """x / (k + alpha/size sum_j x_j^2)^beta over ``size`` neighbouring channels.

    An even window reaches one further back, as PyTorch's does (size // 2 before, (size - 1) // 2 after).
    """
    width = int(size)
    squares = np.square(x.astype(np.float64))
    edges = [(0, 0)] * x.ndim
    edges[1] = (width // 2, (width - 1) // 2)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(squares, edges), width, axis=1)
    return x / np.power(np.float64(k) + np.float64(alpha) / width * windows.sum(axis=-1), np.float64(beta))
