"""The search of the recovery measurement: rates are widened until the best one has neighbours on both sides."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))

from scripts.measurements.qat_recovery import DWQ_RATES, WIDER, best_rate
from scripts.measurements.qat_search import SEARCH, label


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
