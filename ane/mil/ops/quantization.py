"""Run-time quantisation of activations (ios17). Weights are the business of the constexpr operations."""

from __future__ import annotations

from typing import Any

import numpy as np

from ane.mil.ops._arguments import along
from ane.mil.ops.registry import OpContext, op

Array = np.ndarray


def _per_axis(values: Any, axis: Any, rank: int) -> Array:
    return along(values, 0 if axis is None else int(axis) % rank, rank)


@op("quantize", versions=("ios17",))
def quantize(
    ctx: OpContext, *, input: Array, scale: Any, output_dtype: str, zero_point: Any = None, axis: Any = None
) -> Array:
    """clip(round(input / scale) + zero_point) in int8 or uint8; halves go to the even neighbour."""
    steps = np.rint(input / _per_axis(scale, axis, input.ndim))
    if zero_point is not None:
        steps = steps + _per_axis(zero_point, axis, input.ndim)
    bounds = np.iinfo(output_dtype)
    return np.clip(steps, bounds.min, bounds.max).astype(output_dtype)


@op("dequantize", versions=("ios17",))
def dequantize(ctx: OpContext, *, input: Array, scale: Any, zero_point: Any = None, axis: Any = None) -> Array:
    """scale (input - zero_point)."""
    steps = input.astype(np.float32)
    if zero_point is not None:
        steps = steps - _per_axis(zero_point, axis, input.ndim).astype(np.float32)
    return steps * _per_axis(scale, axis, input.ndim)
