"""Convolution and its transpose, in 1, 2 and 3 spatial dimensions."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from ane.mil.ops import _windows
from ane.mil.ops._arguments import along, integers
from ane.mil.ops.registry import OpContext, op

Array = np.ndarray


def _reserve(ctx: OpContext, x: Array, weight: Array, padded: tuple[int, ...], steps: tuple[int, ...]) -> None:
    """Refuse what the padded input and its patches would take beyond the memory bound."""
    ctx.reserve(math.prod(padded))
    places = math.prod(n // s + 1 for n, s in zip(padded[2:], steps, strict=True))
    ctx.reserve(places * padded[0] * max(x.shape[1] * math.prod(weight.shape[2:]), weight.shape[0]))


@op("conv", versions=("ios15", "ios17"))
def conv(
    ctx: OpContext,
    *,
    x: Array,
    weight: Array,
    bias: Any = None,
    strides: Any = None,
    pad_type: str = "valid",
    pad: Any = None,
    dilations: Any = None,
    groups: Any = 1,
) -> Array:
    """Cross-correlation of x[N, C, *spatial] with weight[O, C/groups, *kernel]."""
    rank = x.ndim - 2
    steps, spread = _windows.vector(strides, rank, 1), _windows.vector(dilations, rank, 1)
    widths = _windows.pads(pad_type, pad, x.shape[2:], weight.shape[2:], steps, spread)
    _reserve(ctx, x, weight, _windows.padded(x.shape, widths), steps)
    y = ctx.xp.conv(x, weight, steps, widths, spread, int(groups))
    return y if bias is None else y + along(bias, 1, x.ndim)


def _spread(ctx: OpContext, x: Array, weight: Array, groups: int) -> Array:
    """Contribution of each input place to each kernel tap: [N, O, *kernel, *spatial]."""
    batch, spatial, kernel = x.shape[0], x.shape[2:], weight.shape[2:]
    inputs = x.reshape(batch, groups, x.shape[1] // groups, -1)
    taps = weight.reshape(groups, weight.shape[0] // groups, -1)
    product = ctx.xp.matmul(np.swapaxes(taps, 1, 2), inputs)
    return product.reshape(batch, groups * weight.shape[1], *kernel, *spatial)


def _place(parts: Array, sizes: tuple[int, ...], steps: tuple[int, ...], spread: tuple[int, ...]) -> Array:
    """Add the taps up where they land; ``sizes`` is the spatial shape of the uncropped output."""
    rank = len(sizes)
    kernel, spatial = parts.shape[2 : 2 + rank], parts.shape[2 + rank :]
    y = np.zeros((*parts.shape[:2], *sizes), parts.dtype)
    for tap in itertools.product(*map(range, kernel)):
        where: Any = tuple(
            slice(t * d, t * d + (n - 1) * s + 1, s) for t, d, n, s in zip(tap, spread, spatial, steps, strict=True)
        )
        chosen: Any = (slice(None), slice(None), *tap)
        y[(..., *where)] += parts[chosen]
    return y


@op("conv_transpose", versions=("ios15", "ios17"))
def conv_transpose(
    ctx: OpContext,
    *,
    x: Array,
    weight: Array,
    bias: Any = None,
    pad: Any = None,
    output_shape: Any = None,
    pad_type: str = "valid",
    strides: Any = None,
    dilations: Any = None,
    groups: Any = 1,
) -> Array:
    """The transpose (gradient) of ``conv``, weight[C, O/groups, *kernel].

    ``custom`` pads crop the full output, ``same`` keeps size * stride, ``output_shape`` overrides the size;
    what lies beyond the full output is bias only.
    """
    rank = x.ndim - 2
    steps, spread = _windows.vector(strides, rank, 1), _windows.vector(dilations, rank, 1)
    reach = _windows.extents(weight.shape[2:], spread)
    full = tuple((n - 1) * s + k for n, s, k in zip(x.shape[2:], steps, reach, strict=True))
    wanted = None if output_shape is None else integers(output_shape)[-rank:]
    if pad_type in ("same", "same_lower"):
        wanted = wanted or tuple(n * s for n, s in zip(x.shape[2:], steps, strict=True))
        excess = [max(0, f - w) for f, w in zip(full, wanted, strict=True)]
        before = tuple(e // 2 if pad_type == "same" else e - e // 2 for e in excess)
    else:
        widths = _windows.pads(pad_type, pad, x.shape[2:], weight.shape[2:], steps, spread)
        before = tuple(b for b, _ in widths)
        wanted = wanted or tuple(f - b - a for f, (b, a) in zip(full, widths, strict=True))
    buffer = tuple(max(f, b + w) for f, b, w in zip(full, before, wanted, strict=True))
    ctx.reserve(x.shape[0] * weight.shape[1] * int(groups) * math.prod(buffer))
    y = _place(_spread(ctx, x, weight, int(groups)), buffer, steps, spread)
    inside: Any = (..., *(slice(b, b + w) for b, w in zip(before, wanted, strict=True)))
    y = y[inside]
    return y if bias is None else y + along(bias, 1, x.ndim)
