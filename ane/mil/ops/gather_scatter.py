"""Gathering and scattering by integer indices. Negative indices count from the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ane.mil.ops.registry import OpContext, op

Array = np.ndarray


def _positions(ctx: OpContext, indices: Any, size: int) -> Array:
    """Indices as non-negative positions.

    Raises:
        UserError: an index outside [-size, size); Core ML leaves the result undefined there.
    """
    positions = np.asarray(indices).astype(np.intp)
    bad = (positions < -size) | (positions >= size)
    if bad.any():
        raise ctx.fault(f"index {positions[bad].flat[0]} is outside an axis of length {size}")
    return np.where(positions < 0, positions + size, positions)


@op("gather", versions=("ios15", "ios16", "ios17"))
def gather(
    ctx: OpContext, *, x: Array, indices: Any, axis: Any = 0, batch_dims: Any = 0, validate_indices: bool = False
) -> Array:
    """Slices of x along ``axis``; the first ``batch_dims`` axes of x and indices go together."""
    x, batch = np.asarray(x), int(batch_dims)
    at = int(axis) % x.ndim
    positions = _positions(ctx, indices, x.shape[at])
    ctx.reserve(positions.size * (x.size // max(x.shape[at], 1)) // max(math.prod(x.shape[:batch]), 1))
    if not batch:
        return np.take(x, positions, axis=at)
    lead = np.broadcast_shapes(x.shape[:batch], positions.shape[:batch])
    rows = [np.take(x[where], positions[where], axis=at - batch) for where in np.ndindex(*lead)]
    return np.stack(rows).reshape(*lead, *rows[0].shape) if rows else np.empty((*lead,), x.dtype)


@op("gather_along_axis", versions=("ios15", "ios16", "ios17"))
def gather_along_axis(
    ctx: OpContext, *, x: Array, indices: Array, axis: Any = 0, validate_indices: bool = False
) -> Array:
    """NumPy's take_along_axis."""
    return np.take_along_axis(x, _positions(ctx, indices, x.shape[int(axis)]), axis=int(axis))


def _coordinates(ctx: OpContext, indices: Any, shape: tuple[int, ...]) -> tuple[Array, ...]:
    """The last axis of ``indices`` split into one position array per leading axis of ``shape``."""
    indices = np.asarray(indices)
    return tuple(_positions(ctx, indices[..., i], shape[i]) for i in range(indices.shape[-1]))


@op("gather_nd", versions=("ios15", "ios16", "ios17"))
def gather_nd(
    ctx: OpContext, *, x: Array, indices: Array, batch_dims: Any = 0, validate_indices: bool = False
) -> Array:
    """x at the coordinates in the last axis of ``indices``, batch by batch."""
    batch = int(batch_dims)
    coordinates = _coordinates(ctx, indices, x.shape[batch:])
    shared = tuple(np.arange(x.shape[i]).reshape((-1,) + (1,) * (indices.ndim - 2 - i)) for i in range(batch))
    ctx.reserve(math.prod(indices.shape[:-1]) * math.prod(x.shape[batch + indices.shape[-1] :]))
    return x[shared + coordinates]


_MODES: dict[str, Callable[..., Any]] = {
    "add": np.add.at,
    "sub": np.subtract.at,
    "mul": np.multiply.at,
    "div": np.divide.at,
    "max": np.maximum.at,
    "min": np.minimum.at,
}


def _scatter(ctx: OpContext, data: Array, where: Any, updates: Array, mode: str) -> Array:
    """A copy of data changed at ``where``; repeated places are all applied, in order."""
    result = np.array(data)
    if mode == "update":
        result[where] = updates
    elif mode == "div" and result.dtype.kind in "iu":
        wide = result.astype(np.float64)
        np.divide.at(wide, where, updates)
        result = wide.astype(result.dtype)
    elif mode in _MODES:
        _MODES[mode](result, where, updates)
    else:
        raise ctx.fault(f"scatter mode {mode!r} is not one of update, {', '.join(_MODES)}")
    return result


@op("scatter", versions=("ios15", "ios17"))
def scatter(
    ctx: OpContext,
    *,
    data: Array,
    indices: Array,
    updates: Array,
    axis: Any = 0,
    mode: str = "add",
    validate_indices: bool = False,
) -> Array:
    """Combine slices of ``updates`` into ``data`` at ``indices`` of ``axis``."""
    at = int(axis) % data.ndim
    where = (slice(None),) * at + (_positions(ctx, indices, data.shape[at]),)
    return _scatter(ctx, data, where, updates, mode)


@op("scatter_along_axis", versions=("ios15", "ios17"))
def scatter_along_axis(
    ctx: OpContext,
    *,
    data: Array,
    indices: Array,
    updates: Array,
    axis: Any = 0,
    mode: str = "add",
    validate_indices: bool = False,
) -> Array:
    """Combine single elements: the inverse of gather_along_axis."""
    at = int(axis) % data.ndim
    grid: list[Array] = list(np.indices(indices.shape, sparse=True))
    grid[at] = _positions(ctx, indices, data.shape[at])
    return _scatter(ctx, data, tuple(grid), updates, mode)


@op("scatter_nd", versions=("ios15", "ios17"))
def scatter_nd(
    ctx: OpContext,
    *,
    data: Array,
    indices: Array,
    updates: Array,
    mode: str = "add",
    validate_indices: bool = False,
) -> Array:
    """Combine slices of ``updates`` at the coordinates in the last axis of ``indices``."""
    return _scatter(ctx, data, _coordinates(ctx, indices, data.shape), updates, mode)
