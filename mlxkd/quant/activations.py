"""Fake quantisation of activations, straight through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlxkd.errors import unknown


def _int8_token(x: mx.array) -> mx.array:
    """Asymmetric int8 per token (the last axis), zero on the grid, dynamic range: as torchao's 8da schemes."""
    wide = x.astype(mx.float32)
    low = mx.minimum(mx.min(wide, axis=-1, keepdims=True), 0.0)
    high = mx.maximum(mx.max(wide, axis=-1, keepdims=True), 0.0)
    scale = mx.maximum((high - low) / 255, 1.1920929e-07)
    zero = mx.clip(-128 - mx.round(low / scale), -128, 127)
    codes = mx.clip(mx.round(wide / scale) + zero, -128, 127)
    return ((codes - zero) * scale).astype(x.dtype)


def _mlx(mode: str, group: int, bits: int) -> Callable[[mx.array], mx.array]:
    def quantise(x: mx.array) -> mx.array:
        rows = x.reshape(-1, x.shape[-1])
        codes, scales = mx.quantize(rows, group, bits, mode=mode)
        back = mx.dequantize(codes, scales, None, group, bits, mode=mode, dtype=x.dtype)
        return back.reshape(x.shape)

    return quantise


_GRIDS: dict[str, tuple[int, Callable[[mx.array], mx.array]]] = {
    "int8-token": (1, _int8_token),
    "mxfp8": (32, _mlx("mxfp8", 32, 8)),
    "nvfp4": (16, _mlx("nvfp4", 16, 4)),
}


def names() -> tuple[str, ...]:
    """Names of the activation grids."""
    return tuple(_GRIDS)


def width_fault(name: str, width: int) -> str | None:
    """Why activations of this width cannot lie on the grid, or None.

    Raises:
        UserError: an unknown activation grid.
    """
    if name not in _GRIDS:
        raise unknown("activation grid", name, names())
    group = _GRIDS[name][0]
    return f"width {width} is not divisible by {group}" if width % group else None


def _straight_through(quantise: Callable[[mx.array], mx.array]) -> Callable[..., Any]:
    function = mx.custom_function(quantise)

    @function.vjp
    def vjp(primals: Any, cotangent: mx.array, _: Any) -> mx.array:
        return cotangent

    return function


_FAKE = {name: _straight_through(quantise) for name, (_, quantise) in _GRIDS.items()}


def fake_activations(x: mx.array, name: str) -> mx.array:
    """``x`` [..., width] on the activation grid ``name``, straight-through gradient; same shape and dtype."""
    result: mx.array = _FAKE[name](x)
    return result
