"""Moving blocks between space, depth and batch of [N, C, H, W] tensors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ane.mil.ops._arguments import integers
from ane.mil.ops.registry import OpContext, op

Array = np.ndarray


@op("depth_to_space", versions=("ios15",))
def depth_to_space(ctx: OpContext, *, x: Array, block_size: Any) -> Array:
    """Channels ordered (block row, block column, channel), as TensorFlow does."""
    b, (n, c, h, w) = int(block_size), x.shape
    parts = x.reshape(n, b, b, c // (b * b), h, w).transpose(0, 3, 4, 1, 5, 2)
    return parts.reshape(n, c // (b * b), h * b, w * b)


@op("space_to_depth", versions=("ios15",))
def space_to_depth(ctx: OpContext, *, x: Array, block_size: Any) -> Array:
    """The inverse of ``depth_to_space``."""
    b, (n, c, h, w) = int(block_size), x.shape
    parts = x.reshape(n, c, h // b, b, w // b, b).transpose(0, 3, 5, 1, 2, 4)
    return parts.reshape(n, c * b * b, h // b, w // b)


@op("pixel_shuffle", versions=("ios15",))
def pixel_shuffle(ctx: OpContext, *, x: Array, upscale_factor: Any) -> Array:
    """Channels ordered (channel, block row, block column), as PyTorch does."""
    f, (n, c, h, w) = int(upscale_factor), x.shape
    parts = x.reshape(n, c // (f * f), f, f, h, w).transpose(0, 1, 4, 2, 5, 3)
    return parts.reshape(n, c // (f * f), h * f, w * f)


@op("pixel_unshuffle", versions=("ios16",))
def pixel_unshuffle(ctx: OpContext, *, x: Array, downscale_factor: Any) -> Array:
    """The inverse of ``pixel_shuffle``."""
    f, (n, c, h, w) = int(downscale_factor), x.shape
    parts = x.reshape(n, c, h // f, f, w // f, f).transpose(0, 1, 3, 5, 2, 4)
    return parts.reshape(n, c * f * f, h // f, w // f)


@op("space_to_batch", versions=("ios15",))
def space_to_batch(ctx: OpContext, *, x: Array, block_shape: Any, paddings: Any) -> Array:
    """Pad with zeros, then send each place of a block to its own batch: (block row, block column, n)."""
    (bh, bw), edges = integers(block_shape), np.asarray(paddings).astype(int).tolist()
    ctx.reserve(math.prod((*x.shape[:2], *(n + sum(e) for n, e in zip(x.shape[2:], edges, strict=True)))))
    x = np.pad(x, [(0, 0), (0, 0), *edges])
    n, c, h, w = x.shape
    parts = x.reshape(n, c, h // bh, bh, w // bw, bw).transpose(3, 5, 0, 1, 2, 4)
    return parts.reshape(n * bh * bw, c, h // bh, w // bw)


@op("batch_to_space", versions=("ios15",))
def batch_to_space(ctx: OpContext, *, x: Array, block_shape: Any, crops: Any) -> Array:
    """The inverse of ``space_to_batch``: interleave, then crop (before, after) per spatial axis."""
    (bh, bw), ((top, bottom), (left, right)) = integers(block_shape), np.asarray(crops).astype(int).tolist()
    n, c, h, w = x.shape
    parts = x.reshape(bh, bw, n // (bh * bw), c, h, w).transpose(2, 3, 4, 0, 5, 1)
    whole = parts.reshape(n // (bh * bw), c, h * bh, w * bw)
    return whole[:, :, top : h * bh - bottom, left : w * bw - right]
