"""Checkpoints restore everything, the random state included; the schedule is the closed form."""

from __future__ import annotations

import math
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxkd.errors import UserError
from mlxkd.recipe_sections import Optimizer
from mlxkd.training import state
from mlxkd.training.schedule import adamw, cosine


def test_the_random_stream_goes_on_where_it_was(tmp_path: Path) -> None:
    mx.random.seed(7)
    mx.eval(mx.random.normal((5,)))
    key = state.random_key()
    first = np.array(mx.random.normal((8,)))
    mx.random.seed(99)
    state.set_random_key(key)
    assert np.array_equal(np.array(mx.random.normal((8,))), first)


def _step(model: nn.Module, optimizer: object) -> None:
    x = mx.random.normal((4, 3))
    _, gradients = nn.value_and_grad(model, lambda x: (model(x) ** 2).sum())(x)
    optimizer.update(model, gradients)  # type: ignore[attr-defined]
    mx.eval(model.parameters())


def test_a_restored_model_takes_the_same_next_step(tmp_path: Path) -> None:
    mx.random.seed(1)
    model, optimizer = nn.Linear(3, 2), adamw(Optimizer())
    optimizer.init(model.trainable_parameters())
    _step(model, optimizer)
    state.save(tmp_path / "last", state.Position(1, "r", "d"), model, optimizer)
    _step(model, optimizer)
    mx.random.seed(55)
    other, fresh = nn.Linear(3, 2), adamw(Optimizer())
    assert state.restore(tmp_path / "last", other, fresh) == state.Position(1, "r", "d")
    _step(other, fresh)
    assert np.array_equal(np.array(model.weight), np.array(other.weight))


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint"):
        state.peek(tmp_path)
    (tmp_path / state.FACTS).write_text("{")
    with pytest.raises(UserError, match="damaged"):
        state.peek(tmp_path)


def test_cosine_with_warm_up() -> None:
    rate = cosine(Optimizer(learning_rate=2.0, warmup=0.1, final=0.25), 100)
    assert rate(0) == pytest.approx(0.2) and rate(9) == pytest.approx(2.0)
    assert rate(10) == pytest.approx(2.0)
    assert rate(55) == pytest.approx(2.0 * (0.25 + 0.75 * 0.5 * (1 + math.cos(math.pi * 0.5))))
    assert rate(100) == pytest.approx(0.5)


def test_only_matrices_decay() -> None:
    model = nn.RMSNorm(4)
    linear = nn.Linear(4, 4)
    optimizer = adamw(Optimizer(learning_rate=0.1, weight_decay=0.5))
    tree = {"norm": model, "linear": linear}
    holder = nn.Sequential(*tree.values())
    before = np.array(linear.weight)
    zeros = nn.utils.tree_map(mx.zeros_like, holder.trainable_parameters())
    optimizer.update(holder, zeros)
    assert np.allclose(np.array(linear.weight), before * (1 - 0.1 * 0.5), atol=1e-6)
    assert np.array_equal(np.array(model.weight), np.ones(4))
