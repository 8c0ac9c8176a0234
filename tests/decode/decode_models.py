"""Small random models of several cache kinds."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxkd import compat

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "vocab_size": 61,
    "max_position_embeddings": 72,
    "tie_word_embeddings": True,
}
GEMMA3 = {
    "model_type": "gemma3_text",
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "vocab_size": 61,
    "sliding_window": 5,
    "sliding_window_pattern": 2,
    "max_position_embeddings": 72,
    "query_pre_attn_scalar": 16,
    "rope_global_base_freq": 10000.0,
    "rope_local_base_freq": 1000.0,
}
GEMMA2 = {
    "model_type": "gemma2",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "vocab_size": 61,
    "max_position_embeddings": 72,
    "query_pre_attn_scalar": 16,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
LFM2 = {
    "model_type": "lfm2",
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 72,
    "norm_eps": 1e-5,
    "conv_bias": False,
    "conv_L_cache": 3,
    "block_dim": 32,
    "block_ff_dim": 48,
    "block_multiple_of": 8,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
    "full_attn_idxs": [1],
    "rope_theta": 10000.0,
}
CONFIGS = {"llama": LLAMA, "gemma2": GEMMA2, "gemma3": GEMMA3, "lfm2": LFM2}


def tiny(name: str, seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """A random model that is far from uniform, so that a wrong state shows."""
    mx.random.seed(seed)
    model = compat.build_model(CONFIGS[name])
    model.update(
        nn.utils.tree_map(lambda p: p + 0.3 * mx.random.normal(p.shape) if p.ndim > 1 else p, model.parameters())
    )
    mx.eval(model.parameters())
    return model, CONFIGS[name]
