"""Pooling over 1, 2 or 3 spatial dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ane.mil.ops import _windows
from ane.mil.ops.registry import OpContext, op

Array = np.ndarray


def _geometry(
    ctx: OpContext, x: Array, kernel_sizes: Any, strides: Any, pad_type: str, pad: Any, ceil_mode: bool
) -> tuple[tuple[int, ...], tuple[int, ...], _windows.Pads, tuple[int, ...]]:
    """Kernel, strides, pads and the overhang of ceil mode."""
    rank = x.ndim - 2
    kernel, steps = _windows.vector(kernel_sizes, rank, 1), _windows.vector(strides, rank, 1)
    widths = _windows.pads(pad_type, pad, x.shape[2:], kernel, steps)
    overhang = _windows.ceil_overhang(x.shape[2:], widths, kernel, steps) if ceil_mode else (0,) * rank
    ctx.reserve(math.prod(_windows.padded(x.shape, _stretched(widths, overhang))))
    return kernel, steps, widths, overhang


def _padded(x: Array, widths: _windows.Pads, value: float) -> Array:
    return np.pad(x, [(0, 0), (0, 0), *widths], constant_values=value)


def _stretched(widths: _windows.Pads, overhang: tuple[int, ...]) -> _windows.Pads:
    return tuple((before, after + extra) for (before, after), extra in zip(widths, overhang, strict=True))


def _reduced(x: Array, kernel: tuple[int, ...], steps: tuple[int, ...], function: Any) -> Array:
    rank = len(kernel)
    return function(_windows.windows(x, kernel, steps), axis=tuple(range(-rank, 0)))


def _plain(
    padding: float, prepare: Callable[[Array], Array], reduce: Callable[..., Array], finish: Callable[[Array], Array]
) -> Callable[..., Array]:
    """A pool that needs no count: prepare, pad with ``padding``, reduce each window, finish."""

    def call(
        ctx: OpContext,
        *,
        x: Array,
        kernel_sizes: Any,
        strides: Any = None,
        pad_type: str = "valid",
        pad: Any = None,
        ceil_mode: bool = False,
    ) -> Array:
        kernel, steps, widths, overhang = _geometry(ctx, x, kernel_sizes, strides, pad_type, pad, ceil_mode)
        return finish(_reduced(_padded(prepare(x), _stretched(widths, overhang), padding), kernel, steps, reduce))

    return call


# The largest element of each window, where padding never wins; and sqrt(sum x^2).
op("max_pool", versions=("ios15",))(_plain(-np.inf, np.asarray, np.max, np.asarray))
op("l2_pool", versions=("ios15",))(_plain(0.0, lambda x: np.square(x.astype(np.float64)), np.sum, np.sqrt))


@op("avg_pool", versions=("ios15",))
def avg_pool(
    ctx: OpContext,
    *,
    x: Array,
    kernel_sizes: Any,
    strides: Any = None,
    pad_type: str = "valid",
    pad: Any = None,
    exclude_padding_from_average: bool = False,
    ceil_mode: bool = False,
) -> Array:
    """The mean of each window; padding counts unless excluded, the overhang of ceil mode never does."""
    kernel, steps, widths, overhang = _geometry(ctx, x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    total = _reduced(_padded(x.astype(np.float64), _stretched(widths, overhang), 0.0), kernel, steps, np.sum)
    ones = np.ones((1, 1, *x.shape[2:]))
    counted = _padded(ones, widths, 0.0 if exclude_padding_from_average else 1.0)
    hung = _padded(counted, tuple((0, extra) for extra in overhang), 0.0)
    return total / _reduced(hung, kernel, steps, np.sum)
