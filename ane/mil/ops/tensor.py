"""Creating, sorting and scanning tensors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ane.mil.ops._arguments import integers
from ane.mil.ops.registry import OpContext, op

Array = np.ndarray


@op("fill", versions=("ios15",))
def fill(ctx: OpContext, *, shape: Any, value: Any = 0.0) -> Array:
    """A tensor of ``shape`` filled with ``value``."""
    ctx.reserve(math.prod(integers(shape)))
    return np.full(integers(shape), np.asarray(value))


@op("fill_like", versions=("ios16",))
def fill_like(ctx: OpContext, *, ref_tensor: Array, value: Any = 0.0) -> Array:
    """A tensor shaped like ``ref_tensor`` filled with ``value``."""
    return np.full(np.shape(ref_tensor), np.asarray(value))


@op("range_1d", versions=("ios15",))
def range_1d(ctx: OpContext, *, end: Any, start: Any, step: Any) -> Array:
    """start, start + step, ... up to and without end."""
    dtype = np.result_type(np.asarray(start).dtype, np.asarray(step).dtype)
    count = max(0, int(np.ceil((np.float64(end) - np.float64(start)) / np.float64(step))))
    ctx.reserve(count)
    return (np.float64(start) + np.float64(step) * np.arange(count)).astype(dtype)


@op("band_part", versions=("ios15",))
def band_part(ctx: OpContext, *, x: Array, lower: Any = -1, upper: Any = -1) -> Array:
    """Zero outside the band of ``lower`` diagonals below and ``upper`` above (negative: all of them)."""
    rows, columns = np.ogrid[: x.shape[-2], : x.shape[-1]]
    keep = np.ones(x.shape[-2:], bool)
    if int(lower) >= 0:
        keep &= rows - columns <= int(lower)
    if int(upper) >= 0:
        keep &= columns - rows <= int(upper)
    return np.where(keep, x, np.zeros((), x.dtype))


@op("cumsum", versions=("ios15",))
def cumsum(ctx: OpContext, *, x: Array, axis: Any = 0, exclusive: bool = False, reverse: bool = False) -> Array:
    """Running sum along ``axis``; exclusive leaves the element itself out, reverse runs from the end."""
    at = int(axis)
    values = np.flip(x, at) if reverse else x
    total = np.cumsum(values, axis=at, dtype=np.float64 if x.dtype.kind == "f" else x.dtype)
    if exclusive:
        total = total - values
    return np.flip(total, at) if reverse else total


def _order(x: Array, axis: int, ascending: bool) -> Array:
    """Stable order along ``axis``: of equal values the first comes first, in either direction."""
    if ascending:
        return np.argsort(x, axis=axis, kind="stable")
    backwards = np.flip(np.argsort(np.flip(x, axis), axis=axis, kind="stable"), axis)
    return x.shape[axis] - 1 - backwards


@op("argsort", versions=("ios15",))
def argsort(ctx: OpContext, *, x: Array, axis: Any = -1, ascending: bool = False) -> Array:
    """Indices that sort along ``axis``."""
    return _order(x, int(axis), bool(ascending)).astype(np.int32)


@op("topk", versions=("ios15", "ios16", "ios17"))
def topk(
    ctx: OpContext,
    *,
    x: Array,
    k: Any = 1,
    axis: Any = -1,
    ascending: bool = False,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: str = "int32",
) -> Array | tuple[Array, Array]:
    """The k largest (ascending: smallest) values along ``axis`` and their indices; k = -1 takes all.

    ``sort`` false allows any order; the sorted one is as good.
    """
    at = int(axis)
    order = _order(x, at, bool(ascending))
    best = order if int(k) == -1 else np.take(order, np.arange(int(k)), axis=at)
    values = np.take_along_axis(x, best, axis=at)
    return (values, best.astype(output_indices_dtype)) if return_indices else values


@op("non_zero", versions=("ios15",))
def non_zero(ctx: OpContext, *, x: Array) -> Array:
    """Indices of the non-zero elements, one row each, in row-major order."""
    return np.argwhere(x).astype(np.int32)


@op("one_hot", versions=("ios15",))
def one_hot(
    ctx: OpContext,
    *,
    indices: Array,
    one_hot_vector_size: Any,
    axis: Any = -1,
    on_value: Any = 1,
    off_value: Any = 0,
) -> Array:
    """A new ``axis`` that is on_value at each index and off_value elsewhere (everywhere for an index outside)."""
    at = int(axis) % (np.ndim(indices) + 1)
    ctx.reserve(max(np.size(indices), 1) * int(one_hot_vector_size))
    classes = np.arange(int(one_hot_vector_size)).reshape((-1,) + (1,) * (np.ndim(indices) - at))
    return np.where(np.expand_dims(indices, at) == classes, np.asarray(on_value), np.asarray(off_value))
