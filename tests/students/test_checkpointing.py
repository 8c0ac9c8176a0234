"""Checkpointed layers: the same gradients, less memory is MLX's business, and no other model is touched."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxkd import compat, quant
from mlxkd.errors import UserError
from mlxkd.students.checkpointing import checkpoint_layers
from mlxkd.trees import leaves

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def _gradients(model: nn.Module) -> dict[str, np.ndarray]:
    tokens = mx.array([[1, 5, 9, 3, 7, 2]])
    loss = nn.value_and_grad(model, lambda t: nn.losses.cross_entropy(model(t[:, :-1]), t[:, 1:]).sum())
    return {name: np.array(value) for name, value in leaves(loss(tokens)[1])}


def test_gradients_are_those_of_the_plain_model_on_and_off_the_grid() -> None:
    mx.random.seed(0)
    plain = compat.build_model(CONFIG)
    other = checkpoint_layers(quant.clone(plain))
    for grids in (False, True):
        if grids:
            for model in (plain, other):
                quant.attach(model, quant.plan_for(model, "mlx-affine4-g32"))
        wanted, got = _gradients(plain), _gradients(other)
        assert wanted.keys() == got.keys()
        assert all(np.allclose(wanted[k], got[k], atol=1e-6) for k in wanted)
        assert any(np.abs(wanted[k]).max() > 1e-3 for k in wanted if "self_attn" in k)


def test_a_teacher_of_the_same_family_keeps_its_class() -> None:
    teacher, student = compat.build_model(CONFIG), compat.build_model(CONFIG)
    before = type(teacher.model.layers[0]), type(teacher.model.layers[0]).__call__
    checkpoint_layers(student)
    assert (type(teacher.model.layers[0]), type(teacher.model.layers[0]).__call__) == before
    assert type(student.model.layers[0]) is not before[0]


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(UserError, match="no list of layers"):
        checkpoint_layers(nn.Linear(2, 2))
