"""Layer cosines of real mlx-lm models against a computation written out with the model's own parts."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxkd import compat
from mlxkd.errors import UserError
from mlxkd.report.layers import hidden_states, layer_cosine

CONFIG = {
    "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 3, "intermediate_size": 32,
    "num_attention_heads": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 32,
}  # fmt: skip


def test_states_are_those_of_the_forward_pass_and_the_model_is_left_alone() -> None:
    model = compat.build_model(CONFIG)
    tokens = np.arange(8, dtype=np.int32)[None]
    before = np.array(model(mx.array(tokens)))
    states = hidden_states(model, tokens)
    assert [s.shape for s in states] == [(1, 8, 16)] * 3
    last = model.model.norm(mx.array(states[-1]))
    logits = model.model.embed_tokens.as_linear(last) if "lm_head" not in model else model.lm_head(last)
    np.testing.assert_allclose(np.array(logits), before, atol=1e-5)
    np.testing.assert_array_equal(np.array(model(mx.array(tokens))), before)
    assert type(model.model.layers[0]).__name__ == "TransformerBlock"


def test_a_model_is_one_with_itself_and_widths_must_agree() -> None:
    model = compat.build_model(CONFIG)
    tokens = np.arange(8, dtype=np.int32)[None]
    matrix = layer_cosine(model, model, tokens)
    np.testing.assert_allclose(np.diag(matrix), 1, atol=1e-6)
    assert matrix.shape == (3, 3) and np.abs(matrix).max() <= 1 + 1e-6
    with pytest.raises(UserError, match="hidden widths differ: 8 and 16"):
        layer_cosine(compat.build_model(CONFIG | {"hidden_size": 8}), model, tokens)
    with pytest.raises(UserError, match="keeps its layers elsewhere"):
        hidden_states(object(), tokens)
