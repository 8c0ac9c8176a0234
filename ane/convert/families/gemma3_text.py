"""Gemma 3 text: sandwich norms with weight + 1, GELU, QK-norm, and windows with their own rotary base."""

from __future__ import annotations

from typing import Any

import numpy as np

from ane.convert.architecture import Architecture, Layer, rotary

# The values that Google's configs leave out, as mlx-lm and transformers fill them in.
DEFAULTS = {
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "max_position_embeddings": 32768,
}


def bfloat16(value: float) -> float:
    """The nearest bfloat16: Gemma multiplies its embedding by a rounded square root."""
    bits = np.float32(value).view(np.uint32)
    return float(((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32))


def architecture(config: dict[str, Any]) -> Architecture:
    c = {**DEFAULTS, **config}
    pattern, count = c["sliding_window_pattern"], c["num_hidden_layers"]
    far, near = Layer(0, None), Layer(1, c["sliding_window"])
    return Architecture(
        family="gemma3_text",
        hidden=c["hidden_size"],
        intermediate=c["intermediate_size"],
        heads=c["num_attention_heads"],
        kv_heads=c["num_key_value_heads"],
        head_dim=c["head_dim"],
        vocab=c["vocab_size"],
        eps=c["rms_norm_eps"],
        layers=tuple(far if (i + 1) % pattern == 0 else near for i in range(count)),
        rotaries=(
            rotary(c["head_dim"], c["rope_theta"], c.get("rope_scaling"), max_positions=c["max_position_embeddings"]),
            rotary(c["head_dim"], c["rope_local_base_freq"]),
        ),
        query_scale=c["query_pre_attn_scalar"] ** -0.5,
        activation="gelu_tanh",
        norm_offset=1.0,
        qk_norm=True,
        sandwich_norms=True,
        clip_residual=True,
        embedding_scale=bfloat16(c["hidden_size"] ** 0.5),
    )
