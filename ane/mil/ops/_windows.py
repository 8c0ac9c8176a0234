"""Sliding windows over spatial axes: padding rules shared by convolution and pooling."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ane.mil.ops._arguments import integers

Pads = tuple[tuple[int, int], ...]


def vector(values: Any, rank: int, default: int) -> tuple[int, ...]:
    """One integer per spatial axis."""
    return (default,) * rank if values is None else integers(values)


def pads(
    pad_type: str,
    pad: Any,
    sizes: tuple[int, ...],
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...] | None = None,
) -> Pads:
    """(before, after) per spatial axis. ``same`` keeps ceil(size / stride) outputs and puts an odd pad after."""
    if pad_type == "valid":
        return ((0, 0),) * len(sizes)
    if pad_type == "custom":
        flat = vector(pad, 2 * len(sizes), 0)
        return tuple((flat[2 * i], flat[2 * i + 1]) for i in range(len(sizes)))
    if pad_type not in ("same", "same_lower"):
        raise ValueError(f"pad_type {pad_type!r} is not one of valid, custom, same, same_lower")
    reach = extents(kernel, dilations)
    totals = [max(0, (math.ceil(n / s) - 1) * s + k - n) for n, s, k in zip(sizes, strides, reach, strict=True)]
    small = [(t // 2, t - t // 2) for t in totals]
    return tuple((b, a) if pad_type == "same" else (a, b) for b, a in small)


def padded(shape: tuple[int, ...], widths: Pads) -> tuple[int, ...]:
    """Shape of x[N, C, *spatial] after padding."""
    return (*shape[:2], *(n + before + after for n, (before, after) in zip(shape[2:], widths, strict=True)))


def extents(kernel: tuple[int, ...], dilations: tuple[int, ...] | None) -> tuple[int, ...]:
    """Elements a kernel spans with its dilation."""
    if dilations is None:
        return kernel
    return tuple((k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True))


def ceil_overhang(
    sizes: tuple[int, ...], widths: Pads, kernel: tuple[int, ...], strides: tuple[int, ...]
) -> tuple[int, ...]:
    """Elements that the last window of a ceil-mode pool hangs over the padded input, per axis.

    A window that would begin in the padding after the input is dropped, as in PyTorch.
    """
    result = []
    for n, (before, after), k, s in zip(sizes, widths, kernel, strides, strict=True):
        count = math.ceil((n + before + after - k) / s) + 1
        if (count - 1) * s >= n + before and before + after > 0:
            count -= 1
        result.append(max(0, (count - 1) * s + k - (n + before + after)))
    return tuple(result)


def windows(x: np.ndarray, kernel: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    """View of x[N, C, *spatial] as [N, C, *places, *kernel]."""
    rank = len(kernel)
    view = np.lib.stride_tricks.sliding_window_view(x, kernel, axis=tuple(range(2, 2 + rank)))
    return view[(slice(None), slice(None), *(slice(None, None, s) for s in strides))]
