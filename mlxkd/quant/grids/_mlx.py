"""What the grids of mx.quantize have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlxkd.quant.bitpack import unpack_codes
from mlxkd.quant.grids._base import Codes, Grid


@dataclass(frozen=True)
class MLXGrid(Grid):
    """A grid that mx.quantize makes and mx.quantized_matmul multiplies with."""

    group: int
    mode: str

    def fault(self, shape: tuple[int, ...]) -> str | None:
        if len(shape) < 2:
            return f"has {len(shape)} axis, the grid needs two"
        # MLX packs whole 32-bit words, and its kernels read whole groups.
        return f"width {shape[-1]} is not divisible by {self.group}" if shape[-1] % self.group else None

    @property
    def packing(self) -> dict[str, Any]:
        return {"group_size": self.group, "bits": self.bits, "mode": self.mode}

    def encode(self, w: mx.array, dtype: mx.Dtype) -> Codes:
        packed = mx.quantize(w.astype(dtype), **self.packing)
        return dict(zip(("weight", "scales", "biases"), packed, strict=False))

    def decode(self, codes: Codes, dtype: mx.Dtype) -> mx.array:
        return mx.dequantize(codes["weight"], codes["scales"], codes.get("biases"), **self.packing, dtype=dtype)

    def indices(self, codes: Codes) -> mx.array:
        return unpack_codes(codes["weight"], self.bits)

    def linear(self, x: mx.array, codes: Codes, *, transpose: bool = True) -> mx.array:
        return mx.quantized_matmul(
            x, codes["weight"], codes["scales"], codes.get("biases"), transpose=transpose, **self.packing
        )

    def gather_linear(self, x: mx.array, codes: Codes, indices: mx.array, sorted_indices: bool) -> mx.array:
        return mx.gather_qmm(
            x,
            codes["weight"],
            codes["scales"],
            codes.get("biases"),
            rhs_indices=indices,
            transpose=True,
            sorted_indices=sorted_indices,
            **self.packing,
        )
