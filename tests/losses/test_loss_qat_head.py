"""Heads that train on a grid: chunked gradients equal automatic differentiation through QUANT's own layers."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from kd_toys import assert_trees_close, ragged_batch, toy

from mlxkd.losses.step import loss_and_gradients
from mlxkd.losses.term import Term
from mlxkd.quant import grid
from mlxkd.quant.modules import LayerState, Spec, qat_class
from mlxkd.students.split import Split


def on_grid(module: nn.Module, kernel: bool) -> None:
    """Put one layer on the 4-bit grid without the room's own planning."""
    state = LayerState("head", type(module))
    state.specs["t"], state.active = Spec(grid("mlx-affine4-g32"), mx.float32, kernel), "t"
    object.__setattr__(module, "qat", state)
    module.__class__ = qat_class(module)


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_qat_head(kernel, tied) -> None:
    model, _ = toy(1, hidden_size=32, head_dim=8, tie_word_embeddings=tied)
    on_grid(model.model.embed_tokens if tied else model.lm_head, kernel)
    batch = ragged_batch()
    labels, weights = mx.array(batch.labels), mx.array(batch.weights)
    value, expected = nn.value_and_grad(model, lambda x: (nn.losses.cross_entropy(model(x), labels) * weights).sum())(
        mx.array(batch.inputs)
    )
    split = Split(model)
    step = loss_and_gradients(model, split, batch, None, [Term("cross_entropy")], chunk_bytes=1)
    assert step.sums["loss"].item() == pytest.approx(value.item(), rel=1e-6)
    assert_trees_close(step.gradients, expected, 1e-5)
