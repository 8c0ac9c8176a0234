"""MLX's affine grids: w = scale * code + bias, one scale and bias per group of a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import numpy as np

from mlxkd.quant.bitpack import pack_codes
from mlxkd.quant.grids._base import Codes, Constexpr, Ranges, code_gradients, eased_round, eased_slope, stand_in
from mlxkd.quant.grids._fit import fit
from mlxkd.quant.grids._mlx import MLXGrid

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class AffineGrid(MLXGrid):
    """mx.quantize(mode="affine"); codes, scales and biases are MLX's own unless ranges are learned."""

    range_names: ClassVar[tuple[str, ...]] = ("scales", "biases")
    anneals: ClassVar[bool] = True

    def bits_per_weight(self, shape: tuple[int, ...]) -> float:
        return self.bits + 32 / self.group

    def ranges(self, w: mx.array) -> Ranges:
        """Scales and biases float32 [..., out, in / group] where mx.quantize puts them."""
        _, scales, biases = mx.quantize(w.astype(mx.float32), **self.packing)
        return {"scales": scales, "biases": biases}

    def fitted_ranges(self, w: mx.array) -> Ranges:
        ranges = self.ranges(w)
        groups = w.astype(mx.float32).reshape(*ranges["scales"].shape, self.group)
        return dict(zip(self.range_names, fit(groups, **ranges, top=2**self.bits - 1), strict=True))

    def _position(self, w: mx.array, ranges: Ranges, dtype: mx.Dtype) -> mx.array:
        """Where w lies between code 0 and code 2**bits - 1 of its stored scale and bias, unrounded."""
        groups = w.astype(mx.float32).reshape(*w.shape[:-1], -1, self.group)
        scales, biases = self._stored_affine(ranges, dtype)
        return (groups - biases) / scales

    def _stored_affine(self, ranges: Ranges, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """Scales and biases as they will be stored, float32 [..., out, groups, 1]."""
        scales, biases = (value.astype(mx.float32)[..., None] for value in self.stored(ranges, dtype).values())
        return scales, biases

    def encode_with(self, w: mx.array, ranges: Ranges, dtype: mx.Dtype) -> Codes:
        """Nearest codes on the grid of the scales and biases as they will be stored."""
        codes = mx.clip(mx.round(self._position(w, ranges, dtype)), 0, 2**self.bits - 1)
        return {"weight": pack_codes(codes.reshape(w.shape), self.bits), **self.stored(ranges, dtype)}

    def pullback(self, cotangent: mx.array, w: mx.array, ranges: Ranges, dtype: mx.Dtype) -> tuple[mx.array, Ranges]:
        """Inside the range dŵ/dw = 1, dŵ/dscale = round(v) - v, dŵ/dbias = 0; outside 0, the clipped code, 1."""
        position = self._position(w, ranges, dtype)
        top = 2**self.bits - 1
        codes = mx.clip(mx.round(position), 0, top)
        inside = (position >= -0.5) & (position <= top + 0.5)
        dw, dscales, dbiases = code_gradients(cotangent.reshape(position.shape), position, codes, inside)
        return dw.reshape(w.shape), {"scales": dscales, "biases": dbiases}

    def ease(self, w: mx.array, ranges: Ranges, dtype: mx.Dtype, sharpness: mx.array) -> mx.array:
        codes = eased_round(mx.clip(self._position(w, ranges, dtype), 0, 2**self.bits - 1), sharpness)
        scales, biases = self._stored_affine(ranges, dtype)
        return (codes * scales + biases).reshape(w.shape)

    def eased_pullback(
        self, cotangent: mx.array, w: mx.array, eased: mx.array, ranges: Ranges, dtype: mx.Dtype, sharpness: mx.array
    ) -> tuple[mx.array, Ranges]:
        position = self._position(w, ranges, dtype)
        scales, biases = self._stored_affine(ranges, dtype)
        top = 2**self.bits - 1
        inside = (position > 0) & (position < top)
        # A scale of zero puts positions beyond the ends, where the soft weight says nothing of its code.
        codes = mx.where(inside, (eased.reshape(position.shape) - biases) / scales, mx.clip(position, 0, top))
        slope = mx.where(inside, eased_slope(position, codes, sharpness), 0.0)
        dw, dscales, dbiases = code_gradients(cotangent.reshape(position.shape), position, codes, slope)
        return dw.reshape(w.shape), {"scales": dscales, "biases": dbiases}

    def beyond(self, w: mx.array, ranges: Ranges, dtype: mx.Dtype) -> mx.array:
        position = self._position(w, ranges, dtype)
        return mx.mean((position < -0.5) | (position > 2**self.bits - 0.5))

    def range_pullback(self, cotangent: mx.array, codes: Codes) -> Ranges:
        indices = self.indices(codes)
        flow = cotangent.reshape(*indices.shape[:-1], -1, self.group)
        return {"scales": mx.sum(flow * indices.reshape(flow.shape), axis=-1), "biases": mx.sum(flow, axis=-1)}

    def constexpr(self, codes: Codes) -> Constexpr:
        """Per-block scales with a float offset, w = scale * (data - offset): right on Core ML's CPU and GPU.

        The Neural Engine rejects or miscomputes per-block scales; its own grids are the ane ones. A block of one
        value v, to which MLX gives a scale near zero, has an offset beyond float16: it is written as v * (c - (c - 1)).
        Other offsets beyond float16 come out infinite, and the caller must look for them.
        """
        data = np.array(self.indices(codes))
        scales, biases = (np.array(codes[n].astype(mx.float32)) for n in self.range_names)
        with np.errstate(over="ignore"):
            offset = (-biases / scales).astype(np.float16)
        blocks = data.reshape(*scales.shape, self.group)
        first = blocks[..., 0].astype(np.float32)
        single = np.isinf(offset) & (blocks == blocks[..., :1]).all(-1)
        arrays = {
            "data": data,
            "scale": np.where(single, scales * first + biases, scales).astype(np.float16),
            "offset": np.where(single, first - 1, offset).astype(np.float16),
        }
        return Constexpr("constexpr_blockwise_shift_scale", self.bits, arrays)

    def constexpr_form(self, shape: tuple[int, int]) -> Constexpr:
        blocks = stand_in((shape[0], shape[1] // self.group), np.float16)
        arrays = {"data": stand_in(shape, np.uint8), "scale": blocks, "offset": blocks}
        return Constexpr("constexpr_blockwise_shift_scale", self.bits, arrays)


GRIDS = {
    f"mlx-affine{bits}-g{group}": AffineGrid(f"mlx-affine{bits}-g{group}", bits, group, "affine")
    for bits in BITS
    for group in GROUPS
}
