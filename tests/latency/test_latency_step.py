"""The latency losses through the whole training step, against automatic differentiation of the plain formula."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_latency_losses import example

from mlxkd import compat
from mlxkd.data.batching import Batches
from mlxkd.errors import UserError
from mlxkd.losses.latency import inputs
from mlxkd.losses.step import loss_and_gradients
from mlxkd.losses.term import Term
from mlxkd.students.split import Split

CONFIG = {
    "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24,
    "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "vocab_size": 16,
    "tie_word_embeddings": True,
}  # fmt: skip
OPENS = 8


@pytest.fixture
def student() -> nn.Module:
    mx.random.seed(3)
    model = compat.build_model(CONFIG)
    return model


def test_expected_length_and_early_call_move_the_model_as_autograd_says(student: nn.Module) -> None:
    examples = [
        example([1, 2, 3, 4, 5, 3, OPENS, 7], 2, (6, 7)),
        example([1, 2, OPENS, 5, 7], 2, (2, 4)),
        example([1, 2, 3, 7], 2, None),
    ]
    batch = Batches(examples, [(3, 8)]).batch(0)
    split = Split(student)
    terms = [Term("cross_entropy"), Term("early_call", 0.7, options={"ramp": 0.0}), Term("expected_length", 0.9)]
    given = inputs.early_call(batch, examples, [OPENS], 16) | inputs.expected_length(batch, examples, split, [OPENS])
    assert given["length_value"].max() > 0, "the student must hesitate for the hinge to act"
    step = loss_and_gradients(student, split, batch, None, terms, inputs=given)

    def plain(x: mx.array) -> mx.array:
        log_q = nn.log_softmax(student(x), axis=-1)
        total = (
            -mx.take_along_axis(log_q, mx.array(batch.labels)[..., None], -1)[..., 0] * mx.array(batch.weights)
        ).sum()
        for row, index in enumerate(batch.rows):
            item = examples[index]
            (start, end), call = item.meta["turns"][0], item.meta["calls"][0]
            lines = log_q[row, start - 1 : end - 1]
            decay = mx.array(0.95 ** np.arange(end - start))
            opening = lines[:, OPENS]
            if call is None:
                total = total - 0.7 * 0.2 * (decay * mx.log(1 - mx.exp(opening))).sum()
                continue
            before = call[0] - start
            wanted = mx.array([OPENS] * before + item.tokens[call[0] : end].tolist())
            total = total - 0.7 * 0.2 * (decay * mx.take_along_axis(lines, wanted[:, None], -1)[:, 0]).sum()
            total = total - 0.7 * 0.02 * (decay * opening)[: before + 1].sum()
            if before:
                survive = mx.cumprod(1 - mx.exp(opening[:before]))
                total = total + 0.9 * mx.maximum(survive.sum() / (end - call[0]) - 0.15, 0)
        return total

    value, expected = nn.value_and_grad(student, plain)(mx.array(batch.inputs))
    assert step.sums["loss"].item() == pytest.approx(value.item(), rel=1e-5)
    for (name, got), (_, want) in zip(tree_flatten(step.gradients), tree_flatten(expected), strict=True):
        assert np.array(got) == pytest.approx(np.array(want), abs=2e-5), name


@pytest.mark.parametrize("name", ["early_call", "expected_length", "rollout_length"])
def test_the_step_refuses_to_start_without_the_inputs(student: nn.Module, name: str) -> None:
    batch = Batches([example([1, 2, OPENS, 7], 2, (2, 3))], [(1, 8)]).batch(0)
    with pytest.raises(UserError, match=f"the term '{name}' needs '\\w+' for every position, and it is absent"):
        loss_and_gradients(student, Split(student), batch, None, [Term("cross_entropy"), Term(name)])
