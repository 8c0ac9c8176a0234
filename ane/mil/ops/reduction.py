"""Reductions over several axes, and argmax/argmin over one.

Sums of floats run in float64: the reference value should not depend on the order of addition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ane.mil.ops._arguments import axes_of
from ane.mil.ops.registry import OpContext, op

Array = np.ndarray
Reduce = Callable[[Array, tuple[int, ...], bool], Array]


def _wide(x: Array) -> Array:
    return x.astype(np.float64) if x.dtype.kind == "f" else x


def _sum(x: Array, axes: tuple[int, ...], keep: bool) -> Array:
    return np.sum(_wide(x), axis=axes, keepdims=keep)


def _log_sum_exp(x: Array, axes: tuple[int, ...], keep: bool) -> Array:
    x = x.astype(np.float64)
    top = np.max(x, axis=axes, keepdims=True)
    # An infinite maximum would give inf - inf; the sum is then that infinity itself.
    shift = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):  # nothing but -inf sums to log(0) = -inf, as it should
        total = np.log(np.sum(np.exp(x - shift), axis=axes, keepdims=True)) + shift
    return total if keep else np.squeeze(total, axis=axes)


REDUCTIONS: dict[str, Reduce] = {
    "reduce_l1_norm": lambda x, axes, keep: _sum(np.abs(x), axes, keep),
    "reduce_l2_norm": lambda x, axes, keep: np.sqrt(_sum(np.square(_wide(x)), axes, keep)),
    "reduce_log_sum": lambda x, axes, keep: np.log(_sum(x, axes, keep)),
    "reduce_log_sum_exp": _log_sum_exp,
    "reduce_max": lambda x, axes, keep: np.max(x, axis=axes, keepdims=keep),
    "reduce_mean": lambda x, axes, keep: np.mean(_wide(x), axis=axes, keepdims=keep),
    "reduce_min": lambda x, axes, keep: np.min(x, axis=axes, keepdims=keep),
    "reduce_prod": lambda x, axes, keep: np.prod(_wide(x), axis=axes, keepdims=keep),
    "reduce_sum": _sum,
    "reduce_sum_square": lambda x, axes, keep: _sum(np.square(_wide(x)), axes, keep),
}


def _reduction(function: Reduce) -> Callable[..., Array]:
    def call(ctx: OpContext, *, x: Array, axes: Any = None, keep_dims: bool = False) -> Array:
        return function(x, axes_of(axes, x.ndim), bool(keep_dims))

    return call


for _name, _function in REDUCTIONS.items():
    op(_name, versions=("ios15",))(_reduction(_function))


def _positions(function: Callable[..., Array]) -> Callable[..., Array]:
    def call(
        ctx: OpContext, *, x: Array, axis: Any = -1, keep_dims: bool = False, output_dtype: str = "int32"
    ) -> Array:
        return function(x, axis=int(axis), keepdims=bool(keep_dims)).astype(output_dtype)

    return call


# The first of equal values wins, as in NumPy. ``output_dtype`` exists from ios17 on.
op("reduce_argmax", versions=("ios15", "ios17"))(_positions(np.argmax))
op("reduce_argmin", versions=("ios15", "ios17"))(_positions(np.argmin))
