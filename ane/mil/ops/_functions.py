"""Special functions and activations that several operations share. All take and return float32."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np

_ERF_STEP = 1.0 / 256.0
_ERF_END = 6.0  # erf differs from 1 by less than 1e-16 beyond


@functools.cache
def _erf_table() -> np.ndarray:
    return np.array([math.erf(i * _ERF_STEP) for i in range(round(_ERF_END / _ERF_STEP) + 2)])


def erf(x: np.ndarray) -> np.ndarray:
    """The error function, to 1e-11: cubic Hermite interpolation of a table, with the exact derivative.

    NumPy has no erf and SciPy is not a dependency; d/dx erf = 2/sqrt(pi) exp(-x^2).
    """
    table = _erf_table()
    size = np.minimum(np.abs(np.asarray(x, np.float64)), _ERF_END)
    size = np.where(np.isnan(size), 0.0, size)
    cell = (size / _ERF_STEP).astype(np.intp)
    left = cell * _ERF_STEP
    t = (size - left) / _ERF_STEP
    slope = 2.0 / math.sqrt(math.pi) * _ERF_STEP
    low, high = slope * np.exp(-(left**2)), slope * np.exp(-((left + _ERF_STEP) ** 2))
    rise = table[cell + 1] - table[cell]
    value = table[cell] + t * (low + t * ((3 * rise - 2 * low - high) + t * (low + high - 2 * rise)))
    return np.where(np.isnan(x), np.nan, np.copysign(value, x)).astype(np.float32)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x) through tanh, which cannot overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def softplus(x: np.ndarray) -> np.ndarray:
    """log(1 + e^x) without overflow."""
    return np.logaddexp(x, np.zeros((), x.dtype))


def hard_sigmoid(x: np.ndarray, alpha: float = 0.2, beta: float = 0.5) -> np.ndarray:
    """min(max(alpha x + beta, 0), 1); the defaults are those of recurrent layers."""
    return np.clip(alpha * x + beta, 0.0, 1.0)


def softmax(x: np.ndarray, axis: int = -1) -> np.ndarray:
    """exp(x) / sum exp(x), shifted by the maximum; a row of -inf only gives NaN, as the formula does."""
    weights = np.exp(x - x.max(axis=axis, keepdims=True))
    return weights / weights.sum(axis=axis, keepdims=True)


RECURRENT: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "tanh": np.tanh,
    "scaled_tanh": np.tanh,  # alpha = beta = 1 in recurrent layers
    "sigmoid": sigmoid,
    "hard_sigmoid": hard_sigmoid,
    "sigmoid_hard": hard_sigmoid,
    "relu": lambda x: np.maximum(x, 0),
    "linear": lambda x: x,
}
