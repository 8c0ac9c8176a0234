"""Llama: RMSNorm, rotary positions, grouped queries, SwiGLU; windows where ``layer_types`` asks for them."""

from __future__ import annotations

from typing import Any

from ane.convert.architecture import Architecture, Layer, rotary


def architecture(config: dict[str, Any]) -> Architecture:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    count = config["num_hidden_layers"]
    kinds = config.get("layer_types") or ["full_attention"] * count
    windows = [config["sliding_window"] if kind == "sliding_attention" else None for kind in kinds]
    scaling = config.get("rope_scaling")
    return Architecture(
        family=config["model_type"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        vocab=config["vocab_size"],
        eps=config["rms_norm_eps"],
        layers=tuple(Layer(0, window) for window in windows),
        rotaries=(
            rotary(
                head_dim,
                config.get("rope_theta", 10000.0),
                scaling,
                max_positions=config.get("max_position_embeddings"),
                interleaved=config.get("rope_traditional", False),
            ),
        ),
        query_scale=head_dim**-0.5,
    )
