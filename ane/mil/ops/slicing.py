"""Slices: read, write, pad and crop."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ane.mil.ops._arguments import flags, integers
from ane.mil.ops.registry import OpContext, op

Array = np.ndarray


def indices(
    x: Array,
    begin: Any,
    end: Any,
    stride: Any = None,
    begin_mask: Any = None,
    end_mask: Any = None,
    squeeze_mask: Any = None,
) -> tuple[int | slice, ...]:
    """The NumPy index that MIL's begin, end, stride and masks describe.

    A masked begin or end is the far end in the direction of the stride; a squeezed axis is indexed at its begin.
    """
    rank = x.ndim
    steps = integers(stride) if stride is not None else (1,) * rank
    starts, ends = integers(begin), integers(end)
    open_begin, open_end, squeezed = (flags(mask, rank) for mask in (begin_mask, end_mask, squeeze_mask))
    return tuple(
        (0 if open_begin[i] else starts[i])
        if squeezed[i]
        else slice(None if open_begin[i] else starts[i], None if open_end[i] else ends[i], steps[i])
        for i in range(rank)
    )


@op("slice_by_index", versions=("ios15", "ios17"))
def slice_by_index(
    ctx: OpContext,
    *,
    x: Array,
    begin: Any,
    end: Any,
    stride: Any = None,
    begin_mask: Any = None,
    end_mask: Any = None,
    squeeze_mask: Any = None,
) -> Array:
    """x[begin:end:stride] per axis."""
    return x[indices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)]


@op("slice_update", versions=("ios18",), inplace="x")
def slice_update(
    ctx: OpContext,
    *,
    x: Array,
    update: Array,
    begin: Any,
    end: Any,
    stride: Any = None,
    begin_mask: Any = None,
    end_mask: Any = None,
    squeeze_mask: Any = None,
) -> Array:
    """x with x[begin:end:stride] = update; x itself is overwritten only where nobody else reads it.

    Raises:
        UserError: the update does not have the shape of the slice (Core ML does not broadcast it).
    """
    where = indices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    target = x[where].shape
    if target != np.shape(update):
        raise ctx.fault(f"the update has shape {np.shape(update)}, the slice {target}")
    result = ctx.writable(x)
    result[where] = update
    return result


@op("slice_by_size", versions=("ios15", "ios17"))
def slice_by_size(ctx: OpContext, *, x: Array, begin: Any, size: Any) -> Array:
    """x[begin : begin + size] per axis; a size of -1 takes the rest."""
    starts = (b % d if b < 0 else b for b, d in zip(integers(begin), x.shape, strict=True))
    return x[tuple(slice(b, None if s == -1 else b + s) for b, s in zip(starts, integers(size), strict=True))]


_PAD_MODES: dict[str, Any] = {
    "constant": "constant",
    "reflect": "reflect",
    "reflection": "reflect",
    "replicate": "edge",
}


@op("pad", versions=("ios15",))
def pad(ctx: OpContext, *, x: Array, pad: Any, mode: str = "constant", constant_val: Any = 0.0) -> Array:
    """Pad the last len(pad)/2 axes by (before, after) pairs; ``replicate`` repeats the edge."""
    pairs = np.asarray(pad).reshape(-1, 2).astype(int).tolist()
    widths = [[0, 0]] * (x.ndim - len(pairs)) + pairs
    if mode not in _PAD_MODES:
        raise ctx.fault(f"pad mode {mode!r} is not one of {', '.join(_PAD_MODES)}")
    ctx.reserve(math.prod(n + before + after for n, (before, after) in zip(x.shape, widths, strict=True)))
    if mode == "constant":
        return np.pad(x, widths, constant_values=np.asarray(constant_val).astype(x.dtype))
    return np.pad(x, widths, mode=_PAD_MODES[mode])


@op("crop", versions=("ios15",))
def crop(ctx: OpContext, *, x: Array, crop_height: Any, crop_width: Any) -> Array:
    """Cut (before, after) rows and columns off the last two axes."""
    (top, bottom), (left, right) = integers(crop_height), integers(crop_width)
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]
