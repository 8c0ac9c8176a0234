"""Adapters: only they train, and merging keeps their effect, on a quantised base too."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from kd_toys import assert_trees_close, ragged_batch, toy
from mlx.utils import tree_flatten, tree_map

from mlxkd import compat
from mlxkd.errors import UserError
from mlxkd.losses.step import loss_and_gradients
from mlxkd.losses.term import Term
from mlxkd.students.lora import LoRA, attach, merge
from mlxkd.students.split import Split

WIDE = {"hidden_size": 32, "head_dim": 8, "intermediate_size": 32}
TOKENS = mx.array([[1, 5, 9]])


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("quantised", [False, True])
def test_train_and_merge(quantised, dora, stories_model, tmp_path) -> None:
    model, config = toy(1, **WIDE)
    if quantised:
        nn.quantize(model, group_size=32, bits=4)
        config |= {"quantization": {"group_size": 32, "bits": 4, "mode": "affine"}}
    attach(model, LoRA(rank=2, keys=["self_attn.q_proj", "mlp.down_proj"], dora=dora))
    batch = ragged_batch()
    labels, weights = mx.array(batch.labels), mx.array(batch.weights)
    _, expected = nn.value_and_grad(model, lambda x: (nn.losses.cross_entropy(model(x), labels) * weights).sum())(
        mx.array(batch.inputs)
    )
    step = loss_and_gradients(model, Split(model), batch, None, [Term("cross_entropy")])
    assert_trees_close(step.gradients, expected, 1e-5)
    assert {name.rsplit(".", 1)[1] for name, _ in tree_flatten(step.gradients)} <= {"lora_a", "lora_b", "m"}
    model.update(tree_map(lambda p, g: p - 0.05 * g, model.trainable_parameters(), step.gradients))
    before = model(TOKENS)
    merged, new_config = merge(model, config)
    assert np.allclose(merged(TOKENS), before, atol=2e-4)
    compat.save_model_folder(tmp_path / "m", merged, new_config, stories_model)
    loaded, _ = compat.load_model(tmp_path / "m")
    assert np.allclose(loaded(TOKENS), before, atol=2e-4)


def test_refusals() -> None:
    model, config = toy(1)
    with pytest.raises(UserError, match="this model has no adapters to merge"):
        merge(model, config)
    with pytest.raises(UserError, match="no layer was adapted"):
        attach(model, LoRA(keys=["nothing"]))
    with pytest.raises(UserError, match="rank 0 or dropout"):
        attach(model, LoRA(rank=0))
