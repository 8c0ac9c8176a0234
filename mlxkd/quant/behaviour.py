"""What mx.quantize does differently on different backends, found by asking it.

Codes are therefore made once, on one machine, and shipped; machines compare codes, never requantised floats.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np


def backend_behaviour() -> dict[str, str]:
    """How this backend rounds ties, ranges one-sign groups and composes half-precision decoding."""
    return {"ties": _ties(), "one_sign_groups": _one_sign_groups(), "half_decode": _half_decode()}


def _ties() -> str:
    # Range [0, 15] at 4 bits gives scale -1 and bias 15: 0.5 and 2.5 lie between codes 14, 15 and 12, 13.
    values = np.zeros((1, 32), np.float32)
    values[0, :3] = (15.0, 0.5, 2.5)
    decoded = mx.dequantize(*mx.quantize(mx.array(values), 32, 4), 32, 4)
    pair = (float(decoded[0, 1]), float(decoded[0, 2]))
    known = {(1.0, 3.0): "half to even", (0.0, 2.0): "half away from zero"}
    return known.get(pair, f"0.5 and 2.5 become {pair[0]:g} and {pair[1]:g}")


def _one_sign_groups() -> str:
    values = mx.array(-np.linspace(1.0, 2.0, 32, dtype=np.float32)[None])
    _, scales, _ = mx.quantize(values, 32, 4)
    span = abs(float(scales[0, 0])) * 15
    return "range of the group" if span < 1.5 else "range extended to zero"


def _half_decode() -> str:
    scale, bias, code = mx.array([[1.0078125]]), mx.array([[-7.96875]]), 13
    words = mx.full((1, 4), sum(code << (4 * i) for i in range(8)), dtype=mx.uint32)
    args = (scale.astype(mx.bfloat16), bias.astype(mx.bfloat16))
    decoded = float(mx.dequantize(words, *args, 32, 4)[0, 0])
    once = float((args[0].astype(mx.float32) * code + args[1].astype(mx.float32)).astype(mx.bfloat16)[0, 0])
    return "one rounding" if decoded == once else "two roundings"
