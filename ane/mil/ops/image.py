"""Resizing, resampling and cropping images."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ane.mil.ops import _sampling
from ane.mil.ops._arguments import Undocumented, integers
from ane.mil.ops.registry import OpContext, op

Array = np.ndarray


@op("upsample_nearest_neighbor", versions=("ios15",))
def upsample_nearest_neighbor(
    ctx: OpContext, *, x: Array, scale_factor_height: Any = 1, scale_factor_width: Any = 1
) -> Array:
    """Output pixel i reads floor(i in / out), with out = floor(in * scale)."""
    height = _sampling.scaled(x.shape[-2], scale_factor_height)
    width = _sampling.scaled(x.shape[-1], scale_factor_width)
    return resize_nearest_neighbor(ctx, x=x, target_size_height=height, target_size_width=width)


@op("resize_nearest_neighbor", versions=("ios15",))
def resize_nearest_neighbor(ctx: OpContext, *, x: Array, target_size_height: Any, target_size_width: Any) -> Array:
    """Output pixel i reads floor(i in / out)."""
    for axis, size in ((x.ndim - 2, int(target_size_height)), (x.ndim - 1, int(target_size_width))):
        ctx.reserve(max(x.size // max(x.shape[axis], 1), 1) * size)
        x = _sampling.nearest(x, axis, np.arange(size) * x.shape[axis] // size)
    return x


def _linear(ctx: OpContext, x: Array, axis: int, mode: str, count: int) -> Array:
    ctx.reserve(max(x.size // max(x.shape[axis], 1), 1) * count)
    return _sampling.interpolate(x, axis, _sampling.grid(mode, x.shape[axis], count))


@op("upsample_bilinear", versions=("ios15", "ios16"))
def upsample_bilinear(
    ctx: OpContext,
    *,
    x: Array,
    scale_factor_height: Any = 1,
    scale_factor_width: Any = 1,
    align_corners: bool = True,
    half_pixel_centers: Any = None,
) -> Array:
    """Bilinear enlargement; half-pixel centres unless the corners are aligned (or as ios16 programs say)."""
    half = not align_corners if half_pixel_centers is None else bool(half_pixel_centers)
    mode = "STRICT_ALIGN_CORNERS" if align_corners else "UNALIGN_CORNERS" if half else "DEFAULT"
    x = _linear(ctx, x, x.ndim - 2, mode, _sampling.scaled(x.shape[-2], scale_factor_height))
    return _linear(ctx, x, x.ndim - 1, mode, _sampling.scaled(x.shape[-1], scale_factor_width))


@op("resize_bilinear", versions=("ios15",))
def resize_bilinear(
    ctx: OpContext,
    *,
    x: Array,
    target_size_height: Any = 1,
    target_size_width: Any = 1,
    sampling_mode: str = "DEFAULT",
) -> Array:
    """Bilinear resize of the last two axes."""
    x = _linear(ctx, x, x.ndim - 2, sampling_mode, int(target_size_height))
    return _linear(ctx, x, x.ndim - 1, sampling_mode, int(target_size_width))


@op("resize", versions=("ios17",))
def resize(
    ctx: OpContext,
    *,
    x: Array,
    shape: Any,
    resized_dims: Any,
    interpolation_mode: str = "LINEAR",
    sampling_mode: str = "DEFAULT",
) -> Array:
    """Resize the last ``resized_dims`` axes to the end of ``shape`` (0 keeps a size); nearest rounds halves up."""
    count = int(resized_dims)
    dtype = x.dtype
    for axis, size in zip(range(x.ndim - count, x.ndim), integers(shape)[-count:] if count else (), strict=True):
        ctx.reserve(max(x.size // max(x.shape[axis], 1), 1) * size)
        positions = _sampling.grid(sampling_mode, x.shape[axis], size or x.shape[axis])
        if interpolation_mode == "LINEAR":
            x = _sampling.interpolate(x, axis, positions)
        elif interpolation_mode == "NEAREST_NEIGHBOR":
            x = _sampling.nearest(x, axis, positions + 0.5)
        else:
            raise ctx.fault(f"interpolation mode {interpolation_mode!r} is not LINEAR or NEAREST_NEIGHBOR")
    return np.rint(x) if dtype.kind in "iu" else x


_ORDERS = {
    "CORNERS_HEIGHT_FIRST": lambda a, b, c, d: (a, c, b, d),
    "CORNERS_WIDTH_FIRST": lambda a, b, c, d: (b, d, a, c),
    "CENTER_SIZE_HEIGHT_FIRST": lambda a, b, c, d: (a - c / 2, a + c / 2, b - d / 2, b + d / 2),
    "CENTER_SIZE_WIDTH_FIRST": lambda a, b, c, d: (b - d / 2, b + d / 2, a - c / 2, a + c / 2),
}


def _crop(
    image: Array, box: Array, target: tuple[int, int], normalized: bool, scale: float, order: str, mode: str, pad: float
) -> Array:
    """One box of image[C, H, W] resized to ``target``; what lies outside the image is ``pad``."""
    top, bottom, left, right = _ORDERS[order](*(float(v) for v in box))
    height, width = image.shape[-2:]
    by_row, by_column = (scale * (height - 1), scale * (width - 1)) if normalized else (scale, scale)
    rows = top * by_row + _sampling.grid(mode, (bottom - top) * by_row + 1, target[0])
    columns = left * by_column + _sampling.grid(mode, (right - left) * by_column + 1, target[1])
    r, c = np.meshgrid(rows, columns, indexing="ij")
    inside = (r >= 0) & (r <= height - 1) & (c >= 0) & (c <= width - 1)
    return np.where(inside, _sampling.bilinear(image, r, c, None), pad)


@op("crop_resize", versions=("ios15", "ios16"))
def crop_resize(
    ctx: OpContext,
    *,
    x: Array,
    roi: Array,
    target_height: Any = 1,
    target_width: Any = 1,
    normalized_coordinates: bool = False,
    spatial_scale: Any = 1.0,
    box_coordinate_mode: str = "CORNERS_HEIGHT_FIRST",
    sampling_mode: str = "DEFAULT",
    pad_value: Any = 0.0,
) -> Array:
    """Boxes of every image, roi[N, 1, 4, 1, 1], or of one image each, roi[N, 1, 5, 1, 1] with its index first.

    Raises:
        Undocumented: normalised boxes outside [0, 1] in ios15, where Core ML's answer is undocumented.
    """
    boxes = np.asarray(roi)[:, 0, :, 0, 0]
    corners = boxes[:, -4:]
    if ctx.opset == "ios15" and normalized_coordinates and ((corners < 0) | (corners > 1)).any():
        what = "ios15 crop_resize leaves normalised boxes outside [0, 1] undefined"
        raise Undocumented(what, where=f"operation {ctx.name!r}")
    rest = (
        (int(target_height), int(target_width)),
        bool(normalized_coordinates),
        float(spatial_scale),
        box_coordinate_mode,
        sampling_mode,
        float(pad_value),
    )
    ctx.reserve(len(boxes) * x.shape[0] * x.shape[1] * math.prod(rest[0]))
    if boxes.shape[1] == 4:
        return np.stack([np.stack([_crop(image, box, *rest) for image in x]) for box in corners])
    return np.stack([_crop(x[int(b[0])], b[1:], *rest)[None] for b in boxes])


@op("crop_resize", versions=("ios17",))
def crop_resize_17(
    ctx: OpContext,
    *,
    x: Array,
    boxes: Array,
    box_indices: Any = None,
    target_height: Any = 1,
    target_width: Any = 1,
    normalized_coordinates: bool = False,
    spatial_scale: Any = 1.0,
    box_coordinate_mode: str = "CORNERS_HEIGHT_FIRST",
    sampling_mode: str = "DEFAULT",
    pad_value: Any = 0.0,
) -> Array:
    """boxes[N, 4] of the images that ``box_indices`` names (default: box i of image i): [N, C, h, w]."""
    images = range(len(boxes)) if box_indices is None else integers(box_indices)
    rest = (bool(normalized_coordinates), float(spatial_scale), box_coordinate_mode, sampling_mode, float(pad_value))
    target = (int(target_height), int(target_width))
    ctx.reserve(len(boxes) * x.shape[1] * math.prod(target))
    return np.stack([_crop(x[i], box, target, *rest) for i, box in zip(images, boxes, strict=True)])


@op("resample", versions=("ios15", "ios16", "ios17"))
def resample(
    ctx: OpContext,
    *,
    x: Array,
    coordinates: Array,
    sampling_mode: str,
    padding_mode: str,
    padding_value: Any,
    coordinates_mode: str,
    align_corners: bool,
) -> Array:
    """x[B, C, H, W] read at coordinates[B, h, w, (x, y)]: PyTorch's grid_sample with more modes."""
    height, width = x.shape[-2:]
    columns = _sampling.pixels(coordinates[..., 0], width, coordinates_mode, bool(align_corners))
    rows = _sampling.pixels(coordinates[..., 1], height, coordinates_mode, bool(align_corners))
    outside = float(padding_value) if padding_mode == "constant" else None
    if padding_mode == "border":
        rows, columns = np.clip(rows, 0, height - 1), np.clip(columns, 0, width - 1)
    elif padding_mode in ("reflection", "symmetric"):
        edge = padding_mode == "symmetric"
        rows, columns = _sampling.reflect(rows, height, edge=edge), _sampling.reflect(columns, width, edge=edge)
    elif padding_mode != "constant":
        raise ctx.fault(f"padding mode {padding_mode!r} is not one of constant, border, reflection, symmetric")
    if sampling_mode == "nearest":
        rows, columns = np.rint(rows), np.rint(columns)
    return np.stack([_sampling.bilinear(*one, outside) for one in zip(x, rows, columns, strict=True)])


@op("affine", versions=("ios15",))
def affine(
    ctx: OpContext,
    *,
    x: Array,
    transform_matrix: Array,
    output_height: Any,
    output_width: Any,
    sampling_mode: str,
    padding_mode: str,
    padding_value: Any,
    coordinates_mode: str,
    align_corners: bool,
) -> Array:
    """Resample at the affine image of the output's own grid: x' = a0 x + a1 y + a2, y' = b0 x + b1 y + b2."""
    ctx.reserve(math.prod(x.shape[:2]) * int(output_height) * int(output_width))
    ys, xs = np.meshgrid(np.linspace(-1, 1, int(output_height)), np.linspace(-1, 1, int(output_width)), indexing="ij")
    places = np.stack([xs, ys, np.ones_like(xs)])  # [3, h, w]
    matrices = np.broadcast_to(transform_matrix, (len(x), 6)).reshape(-1, 2, 3)
    return resample(
        ctx,
        x=x,
        coordinates=np.einsum("bij,jhw->bhwi", matrices, places),
        sampling_mode=sampling_mode,
        padding_mode=padding_mode,
        padding_value=padding_value,
        coordinates_mode=coordinates_mode,
        align_corners=align_corners,
    )
