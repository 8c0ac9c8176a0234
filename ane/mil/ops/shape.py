"""Changing and asking shape: reshape, transpose, expand, squeeze, concat, split, stack, tile and the like."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ane.mil.ops._arguments import axes_of, integers
from ane.mil.ops.registry import OpContext, op

Array = np.ndarray


def _filled(x: Array, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Replace each 0 by the dimension of x that it inherits, counted from the right (1 where there is none)."""
    offset = x.ndim - len(shape)
    return tuple(s if s else (x.shape[i + offset] if i + offset >= 0 else 1) for i, s in enumerate(shape))


@op("reshape", versions=("ios15", "ios17"))
def reshape(ctx: OpContext, *, x: Array, shape: Any) -> Array:
    """Row-major reshape; one -1 is inferred, 0 inherits a dimension.

    Before ios17 a 0 needs equal ranks; counting from the right is then the same rule.
    """
    wanted = _filled(x, integers(shape)) if x.size else integers(shape)
    return np.reshape(x, wanted)


@op("reshape_like", versions=("ios16", "ios17"), variadic=("ref_tensors", "begins", "ends", "end_masks"))
def reshape_like(
    ctx: OpContext,
    *,
    x: Array,
    ref_tensors: tuple[Array, ...],
    begins: tuple[Any, ...],
    ends: tuple[Any, ...],
    end_masks: tuple[Any, ...],
) -> Array:
    """Reshape to the concatenation of ``ref.shape[begin:end]`` (to its end where masked)."""
    shape: list[int] = []
    for ref, begin, end, mask in zip(ref_tensors, begins, ends, end_masks, strict=True):
        shape.extend(np.shape(ref)[int(begin) : None if bool(mask) else int(end)])
    return np.reshape(x, shape)


@op("transpose", versions=("ios15", "ios17"))
def transpose(ctx: OpContext, *, x: Array, perm: Any) -> Array:
    """Axis i of the result is axis perm[i] of x."""
    return np.transpose(x, integers(perm))


@op("expand_dims", versions=("ios15", "ios17"))
def expand_dims(ctx: OpContext, *, x: Array, axes: Any) -> Array:
    """Insert axes of length 1 at ``axes`` of the result."""
    return np.expand_dims(x, integers(axes))


@op("squeeze", versions=("ios15", "ios17"))
def squeeze(ctx: OpContext, *, x: Array, axes: Any = None) -> Array:
    """Drop axes of length 1: the named ones, or all."""
    return np.squeeze(x, axis=None if axes is None else integers(axes))


@op("flatten2d", versions=("ios15",))
def flatten2d(ctx: OpContext, *, x: Array, axis: Any = 1) -> Array:
    """Flatten the axes before ``axis`` into one and the rest into another."""
    at = int(axis) + (x.ndim if int(axis) < 0 else 0)
    return np.reshape(x, (math.prod(x.shape[:at]), math.prod(x.shape[at:])))


@op("shape", versions=("ios15",))
def shape(ctx: OpContext, *, x: Array) -> Array:
    """The shape of x as an int32 vector."""
    return np.array(np.shape(x), np.int32)


@op("concat", versions=("ios15",), variadic=("values",))
def concat(ctx: OpContext, *, values: tuple[Array, ...], axis: Any, interleave: bool = False) -> Array:
    """Join along ``axis``; interleaved, row i of the result comes from value i mod n."""
    if not interleave:
        return np.concatenate(values, axis=int(axis))
    at = int(axis) % values[0].ndim
    stacked = np.stack(values, axis=at + 1)
    return np.reshape(stacked, (*values[0].shape[:at], -1, *values[0].shape[at + 1 :]))


@op("split", versions=("ios15",))
def split(ctx: OpContext, *, x: Array, axis: Any, num_splits: Any = None, split_sizes: Any = None) -> tuple[Array, ...]:
    """Cut along ``axis`` into ``split_sizes``, or into ``num_splits`` equal parts."""
    if split_sizes is None:
        return tuple(np.split(x, int(num_splits), axis=int(axis)))
    return tuple(np.split(x, np.cumsum(integers(split_sizes))[:-1], axis=int(axis)))


@op("stack", versions=("ios15",), variadic=("values",))
def stack(ctx: OpContext, *, values: tuple[Array, ...], axis: Any) -> Array:
    """Join along a new ``axis``."""
    return np.stack(values, axis=int(axis))


@op("tile", versions=("ios15",))
def tile(ctx: OpContext, *, x: Array, reps: Any) -> Array:
    """Repeat x reps[i] times along axis i."""
    ctx.reserve(x.size * math.prod(integers(reps)))
    return np.tile(x, integers(reps))


@op("reverse", versions=("ios15", "ios17"))
def reverse(ctx: OpContext, *, x: Array, axes: Any = None) -> Array:
    """Reverse the order along ``axes`` (default: all)."""
    return np.flip(x, axis=axes_of(axes, x.ndim))


@op("reverse_sequence", versions=("ios15", "ios17"))
def reverse_sequence(ctx: OpContext, *, x: Array, lengths: Any, seq_axis: Any = 0, batch_axis: Any = 0) -> Array:
    """Reverse the first lengths[b] elements along ``seq_axis`` of each slice b of ``batch_axis``."""
    seq, batch = int(seq_axis) % x.ndim, int(batch_axis) % x.ndim
    steps = np.arange(x.shape[seq])
    counts = np.asarray(lengths).astype(np.intp)[:, None]
    order = np.where(steps < counts, counts - 1 - steps, steps)  # [batch, seq]
    rows = np.moveaxis(x, (batch, seq), (0, 1))
    picked = rows[np.arange(rows.shape[0])[:, None], order]
    return np.moveaxis(picked, (0, 1), (batch, seq))


@op("sliding_windows", versions=("ios15", "ios17"))
def sliding_windows(ctx: OpContext, *, x: Array, axis: Any, size: Any, stride: Any = 1) -> Array:
    """All windows of ``size`` along ``axis``, ``stride`` apart; the window becomes the axis after it."""
    at = int(axis) % x.ndim
    windows = np.lib.stride_tricks.sliding_window_view(x, int(size), axis=at)
    kept = np.moveaxis(windows, -1, at + 1)
    return kept[(slice(None),) * at + (slice(None, None, int(stride)),)]
