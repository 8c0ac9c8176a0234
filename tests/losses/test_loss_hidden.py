"""Hidden-state matching: against MLX's own differentiation of the written formula, masked, with projectors."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from kd_toys import assert_trees_close, ragged_batch, toy

from mlxkd.errors import UserError
from mlxkd.losses.hidden import HiddenMatch, Projectors, WithProjectors
from mlxkd.losses.step import loss_and_gradients
from mlxkd.losses.term import Term
from mlxkd.students.split import Split
from mlxkd.teachers.local import LocalTeacher


@pytest.mark.parametrize("kind", ["cosine", "mse"])
@pytest.mark.parametrize("positions", ["supervised", "visible"])
def test_gradients_of_student_and_projectors(kind, positions) -> None:
    student, _ = toy(1)
    teacher, _ = toy(2, hidden_size=24, head_dim=6)
    pair, batch = WithProjectors(student, Projectors(2, 16, 24)), ragged_batch()
    match = HiddenMatch(((0, 1), (-1, -1)), pair.projectors, kind, 0.5, positions)
    voice = LocalTeacher(teacher)
    _, states = voice.targets_and_states(batch, [1, -1], states_at=match.where(batch))
    labels, weights = mx.array(batch.labels), mx.array(batch.weights)
    places = batch.weights
    if positions == "visible":
        lengths = [max(np.flatnonzero(row), default=-1) + 1 for row in batch.weights]
        places = np.array(
            [[float(s < n) for s in range(row.shape[0])] for row, n in zip(batch.weights, lengths, strict=True)]
        )

    def layer_outputs(model, x, number):
        h = model.model.embed_tokens(x)
        for layer in model.layers[: number + 1]:
            h = layer(h, mask="causal")
        return h

    def objective(x):
        total = (nn.losses.cross_entropy(pair.student(x), labels) * weights).sum()
        for (ours, theirs), w in zip(match.layers, pair.projectors.weights, strict=True):
            a = (pair.student.model(x) if ours == -1 else layer_outputs(pair.student, x, ours)) @ w.T
            b = teacher.model(x) if theirs == -1 else layer_outputs(teacher, x, theirs)
            if kind == "mse":
                values = ((a - b) ** 2).mean(-1)
            else:
                values = 1 - (a * b).sum(-1) / (mx.linalg.norm(a, axis=-1) * mx.linalg.norm(b, axis=-1))
            total = total + 0.5 * (values * mx.array(places)).sum()
        return total

    value, expected = nn.value_and_grad(pair, objective)(mx.array(batch.inputs))
    step = loss_and_gradients(
        pair, Split(student), batch, None, [Term("cross_entropy")], hidden_match=(match, states), chunk_bytes=1
    )
    assert step.sums["loss"].item() == pytest.approx(value.item(), rel=2e-6)
    assert set(step.sums) == {"cross_entropy", f"hidden_{kind}", "loss"}
    assert_trees_close(step.gradients, expected, 2e-5)
    assert isinstance(student.model.layers[0], nn.Module)


def test_equal_widths_start_at_the_identity() -> None:
    student, _ = toy(1)
    batch = ragged_batch()
    match = HiddenMatch(((-1, -1),), Projectors(1, 16, 16), "mse")
    _, states = LocalTeacher(toy(1)[0]).targets_and_states(batch, [-1])
    step = loss_and_gradients(
        student, Split(student), batch, None, [Term("cross_entropy")], hidden_match=(match, states)
    )
    assert abs(step.sums["hidden_mse"].item()) < 1e-6


def test_refusals() -> None:
    student, _ = toy(1)
    with pytest.raises(UserError, match="kind must be one of cosine, mse, not 'l1'"):
        HiddenMatch(((0, 0),), Projectors(1, 16, 16), "l1")
    with pytest.raises(UserError, match="positions must be one of supervised, visible, not 'all'"):
        HiddenMatch(((0, 0),), Projectors(1, 16, 16), positions="all")
    with pytest.raises(UserError, match="2 pairs of layers and 1 projectors"):
        HiddenMatch(((0, 0), (1, 1)), Projectors(1, 16, 16))
    with pytest.raises(UserError, match="layers are numbered 0 to 2, or -1, not"):
        Split(student).states(mx.array([[1, 2]]), [3])
    assert np.isfinite(np.array(student(mx.array([[1, 2]])))).all()
