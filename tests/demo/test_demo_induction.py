"""The written copying circuit copies before any training; the same model without it does not."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlxkd import compat
from mlxkd.demo import induction
from mlxkd.demo.train_teacher import CONFIG


def _copied(model) -> float:
    """Share of the second half of a repeated random list that is predicted from the first."""
    said = np.random.default_rng(0).integers(300, CONFIG["vocab_size"], (2, 40))
    tokens = mx.array(np.concatenate([said, said], axis=1))
    right = model(tokens[:, :-1]).argmax(axis=-1) == tokens[:, 1:]
    return float(right[:, 40:].mean())


def test_it_copies_from_the_start() -> None:
    mx.random.seed(0)
    model = compat.build_model({**CONFIG, "eos_token_id": 1})
    assert _copied(model) < 0.05
    induction.seed_induction(model)
    assert _copied(model) > 0.9
