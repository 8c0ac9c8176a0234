"""Where an image operation reads its source: sampling grids, interpolation, behaviour outside."""

from __future__ import annotations

import math

import numpy as np

Array = np.ndarray


def grid(mode: str, size: float, count: int) -> Array:
    """Positions of ``count`` samples over ``size`` pixels, in pixels from the first (may lie outside [0, size - 1]).

    The five modes are those documented for ``resize_bilinear``. A negative size (a box whose end precedes its
    start) runs backwards.

    Raises:
        ValueError: an unknown mode.
    """
    steps = np.arange(count, dtype=np.float64)
    spaces = max(count - 1, 1)
    if mode == "ALIGN_CORNERS" and count == 1:
        return np.array([(size - 1) / 2])
    if mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        return steps * (size - 1) / spaces
    if mode == "DEFAULT":
        return steps * size / count
    if mode == "OFFSET_CORNERS":
        delta = (max(1.0, size - 1) if size >= 1 else size - 1) / count
        return (steps + 0.5) * delta
    if mode == "UNALIGN_CORNERS":
        return (steps + 0.5) * size / count - 0.5
    raise ValueError(f"unknown sampling mode {mode!r}")


def interpolate(x: Array, axis: int, positions: Array) -> Array:
    """Linear interpolation along ``axis``; positions outside take the edge."""
    last = x.shape[axis] - 1
    inside = np.clip(positions, 0, last)
    low = np.floor(inside).astype(np.intp)
    shape = [1] * x.ndim
    shape[axis] = -1
    weight = (inside - low).reshape(shape)
    return np.take(x, low, axis) * (1 - weight) + np.take(x, np.minimum(low + 1, last), axis) * weight


def nearest(x: Array, axis: int, positions: Array) -> Array:
    """The element at the integer below each position."""
    return np.take(x, np.clip(np.floor(positions), 0, x.shape[axis] - 1).astype(np.intp), axis)


def reflect(position: Array, size: int, *, edge: bool) -> Array:
    """Fold positions into [0, size - 1], repeating the edge pixel (symmetric) or not (reflection)."""
    low, span = (-0.5, float(size)) if edge else (0.0, float(size - 1))
    if span == 0:
        return np.zeros_like(position)
    offset = np.mod(position - low, 2 * span)
    return np.clip(low + np.minimum(offset, 2 * span - offset), 0, size - 1)


def pixels(coordinate: Array, size: int, mode: str, align_corners: bool) -> Array:
    """Coordinates of the given mode in pixels of an axis of ``size``.

    Raises:
        ValueError: an unknown mode.
    """
    coordinate = coordinate.astype(np.float64)
    if mode == "unnormalized":
        return coordinate
    if mode == "normalized_minus_one_to_one":
        coordinate = (coordinate + 1) / 2
    elif mode != "normalized_zero_to_one":
        raise ValueError(f"unknown coordinates mode {mode!r}")
    return coordinate * (size - 1) if align_corners else coordinate * size - 0.5


def read(image: Array, rows: Array, columns: Array, outside: float | None) -> Array:
    """image[C, H, W] at integer places; ``outside`` is the value beyond the edge, None clamps."""
    height, width = image.shape[-2:]
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    values = image[:, np.clip(rows, 0, height - 1).astype(np.intp), np.clip(columns, 0, width - 1).astype(np.intp)]
    return values if outside is None else np.where(inside, values, outside)


def bilinear(image: Array, rows: Array, columns: Array, outside: float | None) -> Array:
    """image[C, H, W] interpolated at real places of any common shape; neighbours beyond the edge as in ``read``."""
    top, left = np.floor(rows), np.floor(columns)
    down, right = rows - top, columns - left
    corners = (
        (top, left, (1 - down) * (1 - right)),
        (top, left + 1, (1 - down) * right),
        (top + 1, left, down * (1 - right)),
        (top + 1, left + 1, down * right),
    )
    total = sum(read(image, r, c, outside) * weight for r, c, weight in corners)
    return np.asarray(total)


def scaled(size: int, factor: float) -> int:
    """floor(size * factor), forgiving the rounding of a factor stored in single precision."""
    return math.floor(size * float(factor) + 1e-5)
