"""The head/backbone split over families, and the refusal of those that it would get wrong."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from kd_toys import assert_trees_close, toy

from mlxkd import compat
from mlxkd.errors import UserError
from mlxkd.students.split import Split


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantised", [True, False])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_head_of_backbone_is_the_model(tied, quantised, dtype) -> None:
    model, _ = toy(hidden_size=32, head_dim=8, intermediate_size=32, tie_word_embeddings=tied)
    model.set_dtype(dtype)
    if quantised:
        nn.quantize(model, group_size=32, bits=4)
    split = Split(model)
    assert split.head.tied == tied and split.head.rows == 37
    tokens = mx.array([[5, 6, 7]])
    assert np.allclose(split.head(split.hidden(tokens)), model(tokens).astype(mx.float32), atol=1e-5)


def test_an_undeclared_soft_cap_is_refused_even_when_logits_are_small() -> None:
    """nanochat caps at a constant 15 that its arguments do not name; small random logits hide the cap."""
    model, _ = toy(model_type="nanochat", sharpness=1.0, num_key_value_heads=4, max_position_embeddings=64)
    assert mx.abs(model(mx.array([[1, 2, 3]]))).max().item() < 1.5
    with pytest.raises(UserError, match=r"'nanochat' cannot be split .* scales or caps its logits in its own way"):
        Split(model)
    assert model(mx.array([[1, 2, 3]])).shape == (1, 3, 37)


def test_a_model_without_backbone_is_refused() -> None:
    with pytest.raises(UserError, match="none of model, transformer, backbone is its backbone"):
        Split(nn.Linear(3, 4))


def test_rows_on_several_streams_give_the_same_states_and_gradients() -> None:
    model, _ = toy()
    streams = [mx.default_stream(mx.default_device()), mx.new_stream(mx.default_device())]
    whole, parts = Split(model), Split(model, streams=streams)
    tokens = mx.array(np.random.default_rng(0).integers(1, 37, (5, 9)))
    for ours, theirs in zip(parts.states(tokens, [0, -1])[1], whole.states(tokens, [0, -1])[1], strict=True):
        assert np.allclose(ours, theirs, rtol=1e-5, atol=1e-4)
    direction = mx.random.normal((5, 9, 16))
    ours, theirs = (
        nn.value_and_grad(model, lambda x, split=split: (split.hidden(x) * direction).sum())(tokens)[1]
        for split in (parts, whole)
    )
    assert_trees_close(ours, theirs, 1e-5)


def test_the_real_model(stories_model) -> None:
    model, _ = compat.load_model(stories_model)
    split = Split(model)
    assert (split.head.tied, split.head.rows, split.head.scale, split.head.softcap) == (True, 512, 1.0, None)
