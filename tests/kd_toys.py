"""Toy models and batches for the distillation tests."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlxkd.compat import build_model
from mlxkd.data.batching import Batch

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 37,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


def toy(seed: int = 0, sharpness: float = 4.0, **changes: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A small random model in float32 with distributions that are not flat, and its config."""
    config = {**LLAMA, **changes}
    mx.random.seed(seed)
    model = build_model(config)
    model.update(
        tree_map(lambda p: p.astype(mx.float32) if mx.issubdtype(p.dtype, mx.floating) else p, model.parameters())
    )
    norms = [
        (name, value * sharpness)
        for name, value in tree_flatten(model.parameters())
        if name.endswith("model.norm.weight")
    ]
    model.load_weights(norms, strict=False)
    mx.eval(model.parameters())
    return model, config


def ragged_batch(rows: int = 3, length: int = 11, vocabulary: int = 37, seed: int = 0) -> Batch:
    """Right-padded rows of different lengths with masked prompts and fractional weights."""
    random = np.random.default_rng(seed)
    inputs = random.integers(1, vocabulary, (rows, length)).astype(np.int32)
    labels = np.concatenate([inputs[:, 1:], random.integers(1, vocabulary, (rows, 1)).astype(np.int32)], axis=1)
    weights = random.choice(np.float32([0, 0.5, 1, 2]), (rows, length))
    for row in range(rows):
        weights[row, : row + 1] = 0
        weights[row, length - 2 * row :] = 0
        inputs[row, length - 2 * row + 1 :] = 0
    return Batch(inputs, labels, weights, tuple(range(rows)), (rows, length))


def flat(tree: Any) -> dict[str, np.ndarray]:
    """Leaves by path, as NumPy."""
    return {name: np.array(value.astype(mx.float32)) for name, value in tree_flatten(tree)}


def assert_trees_close(ours: Any, theirs: Any, tolerance: float) -> None:
    """Same paths; differences within ``tolerance`` of each leaf's largest value."""
    a, b = flat(ours), flat(theirs)
    assert a.keys() == b.keys()
    for name in b:
        scale = max(np.abs(b[name]).max(), 1e-3)
        assert np.abs(a[name] - b[name]).max() <= tolerance * scale, name
