"""Gemma 2: sandwich norms with weight + 1, GELU, soft caps on scores and logits; every layer sees everything.

Google's model alternates windows of 4096 tokens; mlx-lm leaves them out, and parity with it is the rule here.
"""

from __future__ import annotations

from typing import Any

from ane.convert.architecture import Architecture, Layer, rotary


def architecture(config: dict[str, Any]) -> Architecture:
    head_dim = config["head_dim"]
    return Architecture(
        family="gemma2",
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=head_dim,
        vocab=config["vocab_size"],
        eps=config["rms_norm_eps"],
        layers=(Layer(),) * config["num_hidden_layers"],
        rotaries=(
            rotary(head_dim, config.get("rope_theta", 10000.0), interleaved=config.get("rope_traditional", False)),
        ),
        query_scale=config.get("query_pre_attn_scalar", 144.0) ** -0.5,
        activation="gelu_tanh",
        norm_offset=1.0,
        sandwich_norms=True,
        embedding_scale=config["hidden_size"] ** 0.5,
        attention_softcap=config.get("attn_logit_softcapping", 50.0),
        logit_softcap=config.get("final_logit_softcapping", 30.0),
    )
