"""The search of the recovery measurement: rates are widened until the best one has neighbours on both sides."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from scipy.special import log_softmax
from scipy.stats import sem
from test_quant_identity import LLAMA

from mlxkd.compat import build_model

sys.path.append(str(Path(__file__).parents[2]))

from scripts.measurements._qat_cells import Cell, Loss, loss_on
from scripts.measurements._qat_text import training_rows
from scripts.measurements.qat_recovery import DWQ_RATES, WIDER, best_rate
from scripts.measurements.qat_search import SEARCH, label


class Constant(nn.Module):
    """The same logits everywhere."""

    def __init__(self, logits: list[float]):
        super().__init__()
        self.logits = mx.array(logits)

    def __call__(self, tokens: mx.array) -> mx.array:
        return mx.broadcast_to(self.logits, (*tokens.shape, len(self.logits)))


@pytest.mark.parametrize("optimum", [1e-5, 1e-3, 2e-2])
def test_the_best_rate_is_interior(optimum: float) -> None:
    asked: list[float] = []

    def loss(rate: float) -> float:
        asked.append(rate)
        return math.log(rate / optimum) ** 2

    best, found = best_rate(loss, DWQ_RATES)
    assert min(asked) < best < max(asked)
    assert abs(math.log(best / optimum)) <= math.log(WIDER) and found == loss(best)
    assert len(set(asked)) + 1 == len(asked)  # no rate is measured twice


def test_every_try_of_the_search_has_its_own_name() -> None:
    assert len({label(tried) for tried in SEARCH}) == len(SEARCH)


def test_losses_are_those_of_the_definition() -> None:
    rows = np.random.default_rng(0).integers(0, 96, (3, 9)).astype(np.int32)
    teacher, other = (build_model({**LLAMA, "tie_word_embeddings": tied}) for tied in (True, False))
    p, q = (log_softmax(np.array(m(mx.array(rows[:, :-1])), np.float64), axis=-1) for m in (teacher, other))
    nll = -np.take_along_axis(q, rows[:, 1:, None], -1)[..., 0].mean(-1)
    excess = nll + np.take_along_axis(p, rows[:, 1:, None], -1)[..., 0].mean(-1)
    found = loss_on(other, teacher, rows)
    assert found.nll == pytest.approx(nll.mean(), abs=1e-5)
    assert found.divergence == pytest.approx(np.mean(np.sum(np.exp(p) * (p - q), -1)), abs=1e-5)
    assert found.error == pytest.approx(sem(excess), rel=1e-3)
    assert loss_on(teacher, teacher, rows).error == 0
    assert found.known == pytest.approx(excess.mean(), abs=1e-5), "no row of these is strange"


def test_rows_that_the_float_model_does_not_know_are_left_out_of_the_known() -> None:
    """The second model is better on the strange row alone: over all rows that hides what it loses on the others."""
    rows = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [2, 2, 2, 2]], np.int32)
    found = loss_on(Constant([0.0, 1.0, 0.0]), Constant([0.0, 4.0, -3.0]), rows)
    sure, softer = (-log_softmax(x) for x in ([0.0, 4.0, -3.0], [0.0, 1.0, 0.0]))
    assert found.known == pytest.approx(softer[1] - sure[1], abs=1e-5) and found.known > 0
    assert found.nll == pytest.approx((3 * softer[1] + softer[2]) / 4, abs=1e-5)
    assert found.nll < (3 * sure[1] + sure[2]) / 4


def test_a_kept_cell_comes_back_whole() -> None:
    cell = Cell(Loss(2.0, 0.1, 0.01, 0.3), Loss(2.1, 0.2, 0.02, 0.4), 3, 4.5)
    assert Cell.from_json(json.loads(json.dumps(asdict(cell)))) == cell


def test_training_rows_are_windows_of_the_text_or_what_the_float_model_makes_of_their_beginning() -> None:
    stream = np.random.default_rng(0).integers(0, 96, 500).astype(np.int32)
    teacher = build_model({**LLAMA, "tie_word_embeddings": True})
    norm = teacher.model.norm
    norm.weight = norm.weight * 1e4  # logits so far apart that sampling takes the largest
    options = {"steps": 6, "rows": 4, "width": 16, "seed": 3}
    plain = training_rows(stream, teacher, **options, continued=0.0)
    rows = training_rows(stream, teacher, **options, continued=0.5)
    windows = np.lib.stride_tricks.sliding_window_view(stream, 17)
    assert all((windows == row).all(-1).any() for row in plain.reshape(-1, 17))
    assert (rows[:, :2] == plain[:, :2]).all() and (rows[:, 2:, :4] == plain[:, 2:, :4]).all()
    written = rows[:, 2:].reshape(-1, 17)
    likeliest = np.array(mx.argmax(teacher(mx.array(written[:, :-1])), axis=-1))
    assert (written[:, 4:] == likeliest[:, 3:]).all()
    assert (training_rows(stream, teacher, **options, continued=0.5) == rows).all()
