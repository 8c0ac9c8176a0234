"""Compressed weights: what each form stands for. Evaluated once, when the constant is first needed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ane.mil.blob import unpack
from ane.mil.ops.registry import OpContext, op

LUT_BITS = {2: 1, 4: 2, 16: 4, 64: 6, 256: 8}


@op("constexpr_cast", versions=("ios16", "ios18"))
def constexpr_cast(ctx: OpContext, *, source_val: np.ndarray, output_dtype: str) -> np.ndarray:
    """The fp16 weight as fp32."""
    return source_val


@op("constexpr_affine_dequantize", versions=("ios16",))
def constexpr_affine_dequantize(
    ctx: OpContext, *, quantized_data: np.ndarray, zero_point: np.ndarray, scale: np.ndarray, axis: Any
) -> np.ndarray:
    """scale * (quantized_data - zero_point), per tensor or along ``axis``."""

    def spread(value: np.ndarray) -> np.ndarray:
        if value.ndim == 0:
            return value
        shape = [1] * quantized_data.ndim
        shape[int(axis)] = value.size
        return value.reshape(shape)

    return spread(scale) * (quantized_data.astype(np.float32) - spread(zero_point).astype(np.float32))


@op("constexpr_lut_to_dense", versions=("ios16",))
def lut_to_dense_packed(ctx: OpContext, *, indices: np.ndarray, lut: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """lut[index] for indices packed without gaps, least significant bits first, into bytes."""
    if lut.size not in LUT_BITS:
        raise ctx.fault(f"a palette has {lut.size} entries, not one of {sorted(LUT_BITS)}")
    bits, size = LUT_BITS[lut.size], math.prod(shape.tolist())
    if indices.size != -(-bits * size // 8):
        raise ctx.fault(f"{indices.size} bytes of indices for {size} values of {bits} bits")
    return lut[unpack(indices, f"uint{bits}", size)].reshape(shape.tolist())


@op("constexpr_sparse_to_dense", versions=("ios16",))
def sparse_to_dense_packed(
    ctx: OpContext, *, nonzero_data: np.ndarray, mask: np.ndarray, shape: np.ndarray
) -> np.ndarray:
    """nonzero_data where the packed mask has a one, zeros elsewhere."""
    size = math.prod(shape.tolist())
    if mask.size * 8 < size:
        raise ctx.fault(f"a mask of {mask.size} bytes for {size} values")
    return _scatter(ctx, nonzero_data, unpack(mask, "uint1", size).reshape(shape.tolist()))


@op("constexpr_blockwise_shift_scale", versions=("ios18",))
def blockwise_shift_scale(
    ctx: OpContext, *, data: np.ndarray, scale: np.ndarray, offset: np.ndarray | None = None
) -> np.ndarray:
    """scale * (data - offset); each scale serves a block of data.shape / scale.shape."""
    values = data.astype(np.float32)
    if offset is not None:
        values = values - _expand(ctx, offset.astype(np.float32), data.shape)
    return values * _expand(ctx, scale, data.shape)


@op("constexpr_lut_to_dense", versions=("ios18",))
def lut_to_dense(ctx: OpContext, *, indices: np.ndarray, lut: np.ndarray, vector_axis: Any = None) -> np.ndarray:
    """The palette entry of each index; lut[*blocks, entries, vector], vectors laid along ``vector_axis``."""
    entries, vector = lut.shape[-2:]
    if lut.ndim != indices.ndim + 2:
        raise ctx.fault(f"a palette of rank {lut.ndim} for indices of rank {indices.ndim}")
    if indices.size and int(indices.max()) >= entries:
        raise ctx.fault(f"index {int(indices.max())} into a palette of {entries} entries")
    tables = lut.reshape(-1, entries, vector)
    table = _expand(ctx, np.arange(len(tables)).reshape(lut.shape[:-2]), indices.shape)
    dense = tables[table, indices]
    if vector == 1:
        return dense[..., 0]
    if vector_axis is None:
        raise ctx.fault(f"a palette of vectors of {vector} needs a vector_axis")
    axis = int(vector_axis) % indices.ndim
    shape = tuple(d * vector if i == axis else d for i, d in enumerate(indices.shape))
    return np.moveaxis(dense, -1, axis + 1).reshape(shape)


@op("constexpr_sparse_to_dense", versions=("ios18",))
def sparse_to_dense(ctx: OpContext, *, nonzero_data: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """nonzero_data where the mask has a one, zeros elsewhere."""
    return _scatter(ctx, nonzero_data, mask)


@op("constexpr_lut_to_sparse", versions=("ios18",))
def lut_to_sparse(
    ctx: OpContext,
    *,
    indices_mask: np.ndarray,
    indices_nonzero_data: np.ndarray,
    lut: np.ndarray,
    vector_axis: Any = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Palette entries of sparse indices: the mask (expanded along ``vector_axis``) and the values under it."""
    dense = lut_to_dense(
        ctx, indices=_scatter(ctx, indices_nonzero_data, indices_mask), lut=lut, vector_axis=vector_axis
    )
    mask = indices_mask if lut.shape[-1] == 1 else np.repeat(indices_mask, lut.shape[-1], int(vector_axis))
    return mask, dense[mask != 0]


@op("constexpr_sparse_blockwise_shift_scale", versions=("ios18",))
def sparse_blockwise_shift_scale(
    ctx: OpContext,
    *,
    data_mask: np.ndarray,
    nonzero_data: np.ndarray,
    scale: np.ndarray,
    offset: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Shift and scale of sparse codes: the mask and the values under it."""
    dense = blockwise_shift_scale(ctx, data=_scatter(ctx, nonzero_data, data_mask), scale=scale, offset=offset)
    return data_mask, dense[data_mask != 0]


def _scatter(ctx: OpContext, values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    chosen = mask != 0
    if np.count_nonzero(chosen) != values.size:
        raise ctx.fault(f"{values.size} values for a mask with {np.count_nonzero(chosen)} ones")
    dense = np.zeros(mask.shape, values.dtype)
    dense[chosen] = values
    return dense


def _expand(ctx: OpContext, blocks: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Repeat one value per block to one per element; lengths must divide."""
    if blocks.ndim != len(shape) or any(b == 0 or d % b for d, b in zip(shape, blocks.shape, strict=False)):
        raise ctx.fault(f"blocks {list(blocks.shape)} do not divide {list(shape)}")
    for axis, (size, count) in enumerate(zip(shape, blocks.shape, strict=True)):
        if count not in (1, size):
            blocks = np.repeat(blocks, size // count, axis)
    return np.broadcast_to(blocks, shape)
