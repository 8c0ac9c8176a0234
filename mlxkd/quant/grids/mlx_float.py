"""MLX's small-float grids: OCP microscaling mxfp4 and mxfp8, and nvfp4 (E4M3 scale per 16 values)."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxkd.quant.grids._base import Codes, Constexpr, stand_in
from mlxkd.quant.grids._mlx import MLXGrid


@dataclass(frozen=True)
class FloatGrid(MLXGrid):
    """mx.quantize(mode="mxfp4" | "nvfp4" | "mxfp8"): one 8-bit scale per group, no bias, no learned ranges."""

    def bits_per_weight(self, shape: tuple[int, ...]) -> float:
        return self.bits + 8 / self.group

    def lookup_dtype(self, dtype: mx.Dtype) -> mx.Dtype:
        # nn.QuantizedEmbedding leaves the choice to mx.dequantize, which takes bfloat16 where scales have no dtype.
        return mx.bfloat16

    def constexpr(self, codes: Codes) -> Constexpr:
        """Core ML has no op for small floats with block scales: the decoded values, float16."""
        return Constexpr("const", 16, {"val": np.array(self.decode(codes, mx.float16))})

    def constexpr_form(self, shape: tuple[int, int]) -> Constexpr:
        return Constexpr("const", 16, {"val": stand_in(shape, np.float16)})


GRIDS = {
    "mlx-mxfp4": FloatGrid("mlx-mxfp4", 4, 32, "mxfp4"),
    "mlx-nvfp4": FloatGrid("mlx-nvfp4", 4, 16, "nvfp4"),
    "mlx-mxfp8": FloatGrid("mlx-mxfp8", 8, 32, "mxfp8"),
}
