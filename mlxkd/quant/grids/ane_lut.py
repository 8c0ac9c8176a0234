"""The Neural Engine's palettes: every weight is one of 2**bits float16 values, per tensor or per group of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import numpy as np

from mlxkd.quant.dkm import soft_palette
from mlxkd.quant.grids._base import Codes, Constexpr, Grid, Ranges, stand_in
from mlxkd.quant.kmeans import distinct_half_values, kmeans

BITS = (2, 3, 4, 6, 8)
GROUP_CHANNELS = (4, 8, 16, 32)


@dataclass(frozen=True)
class PaletteGrid(Grid):
    """w = palette[group of rows][code].

    A palette comes from k-means on the host, so it is a range that a layer holds: training assigns the nearest
    entries of the held palette, and learns or refreshes the entries.

    Args:
        group_channels: consecutive output rows that share a palette; 0 means the whole matrix does.
    """

    group_channels: int

    rowwise: ClassVar[bool] = False
    holds_ranges: ClassVar[bool] = True
    range_names: ClassVar[tuple[str, ...]] = ("palette",)
    dtypes: ClassVar[tuple[mx.Dtype, ...]] = (mx.float16, mx.float32)

    def fault(self, shape: tuple[int, ...]) -> str | None:
        if len(shape) < 2:
            return f"has {len(shape)} axis, the grid needs two"
        uneven = self.group_channels and shape[-2] % self.group_channels
        return f"its {shape[-2]} output channels are not divisible by {self.group_channels}" if uneven else None

    def bits_per_weight(self, shape: tuple[int, ...]) -> float:
        rows = self.group_channels or shape[-2]
        return self.bits + 16 * 2**self.bits / (rows * shape[-1])

    def _groups(self, w: mx.array) -> mx.array:
        """[..., out, in] -> [..., groups, rows * in]."""
        return w.reshape(*w.shape[:-2], w.shape[-2] // (self.group_channels or w.shape[-2]), -1)

    def ranges(self, w: mx.array) -> Ranges:
        """Palettes float32 [..., groups, 2**bits], ascending, by k-means; runs on the host."""
        groups = self._groups(w.astype(mx.float32))
        flat = np.array(groups).reshape(-1, groups.shape[-1])
        palettes = np.stack([kmeans(*distinct_half_values(group), 2**self.bits) for group in flat])
        return {"palette": mx.array(palettes.astype(np.float32)).reshape(*groups.shape[:-1], -1)}

    def encode(self, w: mx.array, dtype: mx.Dtype) -> Codes:
        return self.encode_with(w, self.ranges(w), dtype)

    def stored(self, ranges: Ranges, dtype: mx.Dtype) -> Ranges:
        return {"palette": ranges["palette"].astype(mx.float16)}  # Core ML's, whatever the student's dtype

    def encode_with(self, w: mx.array, ranges: Ranges, dtype: mx.Dtype) -> Codes:
        # Learned entries may cross; nearest-entry search needs them ascending.
        palette = mx.sort(self.stored(ranges, dtype)["palette"], axis=-1)
        return {"indices": nearest(self._groups(w.astype(mx.float32)), palette).reshape(w.shape), "palette": palette}

    def decode(self, codes: Codes, dtype: mx.Dtype) -> mx.array:
        indices = codes["indices"]
        values = mx.take_along_axis(codes["palette"], self._groups(indices).astype(mx.uint32), axis=-1)
        return values.reshape(indices.shape).astype(dtype)

    def indices(self, codes: Codes) -> mx.array:
        return codes["indices"]

    def pullback(self, cotangent: mx.array, w: mx.array, ranges: Ranges, dtype: mx.Dtype) -> tuple[mx.array, Ranges]:
        """Straight through to the weight; an entry receives the sum over the weights that chose it."""
        sums = self.range_pullback(cotangent, self.encode_with(w, ranges, dtype))["palette"]
        ranks = mx.argsort(mx.argsort(ranges["palette"].astype(mx.float16), axis=-1), axis=-1)
        return cotangent, {"palette": mx.take_along_axis(sums, ranks, axis=-1)}

    def beyond(self, w: mx.array, ranges: Ranges, dtype: mx.Dtype) -> mx.array:
        """Beyond the outermost entries by more than half the step that leads to them."""
        entries = mx.sort(ranges["palette"].astype(mx.float32), axis=-1)
        low = entries[..., :1] - (entries[..., 1:2] - entries[..., :1]) / 2
        high = entries[..., -1:] + (entries[..., -1:] - entries[..., -2:-1]) / 2
        groups = self._groups(w.astype(mx.float32))
        return mx.mean((groups < low) | (groups > high))

    def range_pullback(self, cotangent: mx.array, codes: Codes) -> Ranges:
        indices, flow = self._groups(codes["indices"]), self._groups(cotangent)
        sums = [mx.sum(mx.where(indices == code, flow, 0.0), axis=-1) for code in range(2**self.bits)]
        return {"palette": mx.stack(sums, axis=-1)}

    def soft(self, w: mx.array, ranges: Ranges, dtype: mx.Dtype, tau: float) -> tuple[mx.array, Ranges]:
        """Differentiable palettisation: the softly assigned weight, and the palette it moved to."""
        groups = self._groups(w.astype(mx.float32))
        palette = ranges["palette"]
        flat, moved = soft_palette(groups.reshape(-1, groups.shape[-1]), palette.reshape(-1, palette.shape[-1]), tau)
        return flat.reshape(w.shape).astype(dtype), {"palette": moved.reshape(palette.shape)}

    def constexpr(self, codes: Codes) -> Constexpr:
        """indices uint8 [out, in]; lut float16 [groups, 1, 2**bits, 1], Core ML's layout for scalar palettes."""
        palette = np.array(codes["palette"])
        lut = palette.reshape(palette.shape[0], 1, -1, 1)
        return Constexpr("constexpr_lut_to_dense", self.bits, {"indices": np.array(codes["indices"]), "lut": lut})

    def constexpr_form(self, shape: tuple[int, int]) -> Constexpr:
        lut = (shape[0] // (self.group_channels or shape[0]), 1, 2**self.bits, 1)
        arrays = {"indices": stand_in(shape, np.uint8), "lut": stand_in(lut, np.float16)}
        return Constexpr("constexpr_lut_to_dense", self.bits, arrays)


def nearest(values: mx.array, palette: mx.array) -> mx.array:
    """Index uint8 [..., n] of the nearest of ascending entries [..., k]; a tie takes the lower.

    Midpoints are compared in float32; a binary search keeps the memory at one index per value.
    """
    entries = palette.astype(mx.float32)
    middles = (entries[..., 1:] + entries[..., :-1]) / 2
    if entries.shape[-1] <= 16:
        index = mx.zeros(values.shape, mx.uint8)
        for k in range(middles.shape[-1]):
            index = index + (values > middles[..., k : k + 1]).astype(mx.uint8)
        return index
    low = mx.zeros(values.shape, mx.uint32)
    step = entries.shape[-1] // 2
    while step:
        probe = mx.take_along_axis(middles, low + (step - 1), axis=-1)
        low = mx.where(values > probe, low + step, low)
        step //= 2
    return low.astype(mx.uint8)


def _grids() -> dict[str, PaletteGrid]:
    named = {}
    for bits in BITS:
        for rows in (0, *GROUP_CHANNELS):
            name = f"ane-lut{bits}" + (f"-gc{rows}" if rows else "")
            named[name] = PaletteGrid(name, bits, rows)
    return named


GRIDS = _grids()
