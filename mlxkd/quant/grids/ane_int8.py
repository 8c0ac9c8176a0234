"""The Neural Engine's linear grid: int8 symmetric, one float16 scale per output channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import numpy as np

from mlxkd.quant.grids._base import Codes, Constexpr, Grid, Ranges, code_gradients, eased_round, eased_slope, stand_in

TOP = 127  # symmetric: -128 is not used


@dataclass(frozen=True)
class Int8ChannelGrid(Grid):
    """w = scale[out] * code, code in [-127, 127]; decoded values are those of Core ML, float16."""

    range_names: ClassVar[tuple[str, ...]] = ("scales",)
    anneals: ClassVar[bool] = True
    dtypes: ClassVar[tuple[mx.Dtype, ...]] = (mx.float16, mx.float32)

    def fault(self, shape: tuple[int, ...]) -> str | None:
        return f"has {len(shape)} axis, the grid needs two" if len(shape) < 2 else None

    def bits_per_weight(self, shape: tuple[int, ...]) -> float:
        return 8 + 16 / shape[-1]

    def ranges(self, w: mx.array) -> Ranges:
        """Scales float32 [..., out] that put each channel's largest magnitude on code 127."""
        largest = mx.max(mx.abs(w.astype(mx.float16).astype(mx.float32)), axis=-1)
        return {"scales": mx.maximum(largest / TOP, 1e-6)}  # an all-zero channel still needs a scale

    def encode(self, w: mx.array, dtype: mx.Dtype) -> Codes:
        return self.encode_with(w, self.ranges(w), dtype)

    def _position(self, w: mx.array, ranges: Ranges) -> mx.array:
        return w.astype(mx.float32) / self._stored_scales(ranges)

    def _stored_scales(self, ranges: Ranges) -> mx.array:
        """Scales as they will be stored, float32 [..., out, 1]."""
        return ranges["scales"].astype(mx.float16).astype(mx.float32)[..., None]

    def encode_with(self, w: mx.array, ranges: Ranges, dtype: mx.Dtype) -> Codes:
        codes = mx.clip(mx.round(self._position(w, ranges)), -TOP, TOP)
        return {"codes": codes.astype(mx.int8), **self.stored(ranges, dtype)}

    def stored(self, ranges: Ranges, dtype: mx.Dtype) -> Ranges:
        return {"scales": ranges["scales"].astype(mx.float16)}  # Core ML's, whatever the student's dtype

    def ease(self, w: mx.array, ranges: Ranges, dtype: mx.Dtype, sharpness: mx.array) -> mx.array:
        codes = eased_round(mx.clip(self._position(w, ranges), -TOP, TOP), sharpness)
        return codes * self._stored_scales(ranges)

    def eased_pullback(
        self, cotangent: mx.array, w: mx.array, eased: mx.array, ranges: Ranges, dtype: mx.Dtype, sharpness: mx.array
    ) -> tuple[mx.array, Ranges]:
        position = self._position(w, ranges)
        inside = mx.abs(position) < TOP
        codes = mx.where(inside, eased / self._stored_scales(ranges), mx.clip(position, -TOP, TOP))
        slope = mx.where(inside, eased_slope(position, codes, sharpness), 0.0)
        dw, dscales, _ = code_gradients(cotangent, position, codes, slope)
        return dw, {"scales": dscales}

    def beyond(self, w: mx.array, ranges: Ranges, dtype: mx.Dtype) -> mx.array:
        return mx.mean(mx.abs(self._position(w, ranges)) > TOP + 0.5)

    def range_pullback(self, cotangent: mx.array, codes: Codes) -> Ranges:
        return {"scales": mx.sum(cotangent * codes["codes"], axis=-1)}

    def decode(self, codes: Codes, dtype: mx.Dtype) -> mx.array:
        scales = codes["scales"].astype(mx.float32)[..., None]
        return (codes["codes"].astype(mx.float32) * scales).astype(mx.float16).astype(dtype)

    def indices(self, codes: Codes) -> mx.array:
        return (codes["codes"].astype(mx.int16) + TOP).astype(mx.uint8)

    def pullback(self, cotangent: mx.array, w: mx.array, ranges: Ranges, dtype: mx.Dtype) -> tuple[mx.array, Ranges]:
        position = self._position(w, ranges)
        codes = mx.clip(mx.round(position), -TOP, TOP)
        inside = mx.abs(position) <= TOP + 0.5
        dw, dscales, _ = code_gradients(cotangent, position, codes, inside)
        return dw, {"scales": dscales}

    def constexpr(self, codes: Codes) -> Constexpr:
        scale = np.array(codes["scales"])[..., None]
        return Constexpr("constexpr_blockwise_shift_scale", 8, {"data": np.array(codes["codes"]), "scale": scale})

    def constexpr_form(self, shape: tuple[int, int]) -> Constexpr:
        arrays = {"data": stand_in(shape, np.int8), "scale": stand_in((shape[0], 1), np.float16)}
        return Constexpr("constexpr_blockwise_shift_scale", 8, arrays)


GRIDS = {"ane-int8": Int8ChannelGrid("ane-int8", 8)}
