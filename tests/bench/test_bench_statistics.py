"""The gate statistics against numpy, closed forms and simulation with a known truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bench import simulation, statistics
from bench.statistics import Estimate

LIMIT = math.log(1.05)
floats = st.lists(st.floats(0.1, 100), min_size=1, max_size=40)


@given(st.lists(floats, min_size=1, max_size=6), st.sampled_from([("p50", 0.5), ("p95", 0.95), ("es90", 0.9)]))
@settings(max_examples=150, deadline=None)
def test_pooled_statistics_agree_with_numpy(rounds: list[list[float]], which: tuple[str, float]) -> None:
    name, level = which
    pool = np.concatenate([np.array(r) for r in rounds])
    got = statistics._weighted([np.array(r) for r in rounds], np.ones((1, len(rounds))), name)[0]  # type: ignore[arg-type]
    if name != "es90":
        assert got == np.quantile(pool, level, method="inverted_cdf")
    else:
        ordered, wanted = np.sort(pool)[::-1], 0.1 * pool.size
        weights = np.clip(wanted - np.arange(pool.size), 0, 1)
        assert got == pytest.approx(float((ordered * weights).sum() / wanted))


def test_a_draw_counts_whole_rounds() -> None:
    """A draw that takes round 0 twice and round 1 never is the statistic of round 0 alone."""
    rounds = [np.array([1.0, 2.0, 9.0]), np.array([100.0, 200.0])]
    counts = np.array([[2.0, 0.0], [0.0, 3.0]])
    np.testing.assert_array_equal(statistics._weighted(rounds, counts, "p50"), [2.0, 100.0])
    np.testing.assert_allclose(statistics._weighted(rounds, counts, "mean"), [4.0, 150.0])


def test_scaling_one_side_moves_the_log_ratio_exactly() -> None:
    rng = np.random.default_rng(0)
    rounds = [rng.lognormal(0, 0.1, 30) for _ in range(8)]
    for name in ("p50", "p95", "es90", "mean"):
        estimate = statistics.log_ratio(rounds, [1.1 * r for r in rounds], name)  # type: ignore[arg-type]
        assert estimate.value == pytest.approx(math.log(1.1))
        assert estimate.error == pytest.approx(0, abs=1e-12)


def test_mean_error_matches_the_clustered_closed_form() -> None:
    """For equal rounds of constant values, the bootstrap error of a mean is the standard error over rounds."""
    heights = np.array([1.0, 1.2, 0.9, 1.1, 1.3, 0.8, 1.05, 0.95])
    estimate = statistics.level([np.full(5, h) for h in heights], "mean", draws=20000)
    assert estimate.error == pytest.approx(heights.std(ddof=1) / math.sqrt(8), rel=0.03)


def test_bounds_and_p_values_agree_with_each_other_and_with_student() -> None:
    estimate = Estimate(0.06, 0.01, 9)
    assert estimate.bound(0.95, "lower") == pytest.approx(0.06 - stats.t.ppf(0.95, 9) * 0.01)
    for limit in (0.03, 0.05, 0.09):
        p = estimate.p_above(limit)
        assert estimate.bound(1 - p, "lower") == pytest.approx(limit)
        assert estimate.p_below(limit) == pytest.approx(1 - p)


def test_rounds_to_settle_do_settle() -> None:
    estimate = Estimate(math.log(1.03), 0.012, 9)
    total = estimate.rounds_to_settle(LIMIT, 0.05)
    assert total is not None and total > 10
    later = Estimate(estimate.value, estimate.error * math.sqrt(10 / total), total - 1)
    assert later.bound(0.95, "upper") <= LIMIT
    assert Estimate(LIMIT, 0.01, 9).rounds_to_settle(LIMIT, 0.05) is None


def test_censored_samples_decide_only_when_certain() -> None:
    never = [[math.inf] * 5 + [3.0] * 5 for _ in range(5)]
    always = statistics.level(never, "p95")
    assert always.value == math.inf and always.error == 0 and always.p_above(25) == 0
    sometimes = statistics.level([[3.0] * 10] * 4 + [[math.inf] * 10], "p95")
    assert sometimes.p_above(25) == 1 and sometimes.p_below(25) == 1


@pytest.mark.parametrize(
    ("rounds", "message"),
    [
        ([[1.0], [2.0]], "at least 3"),
        ([[1.0], [], [2.0]], "every round needs samples"),
        ([[1.0], [-1.0], [2.0]], "positive"),
    ],
)
def test_bad_rounds_are_refused(rounds: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        statistics.level(rounds, "p50")
    with pytest.raises(ValueError, match="unpaired"):
        statistics.log_ratio([[1.0]] * 3, [[1.0]] * 4, "p50")


def test_holm_is_the_textbook_procedure() -> None:
    assert statistics.holm([0.01, 0.04, 0.03, 0.005], 0.05) == [True, False, False, True]
    assert statistics.holm([], 0.05) == []


def test_modes_around_the_95th_percentile_are_seen_whatever_the_slowdown() -> None:
    rng = np.random.default_rng(1)

    def side(slow: float, factor: float) -> list[np.ndarray]:
        return [factor * rng.lognormal(0, 0.03, 100) * np.where(rng.random(100) < slow, 1.25, 1.0) for _ in range(10)]

    assert statistics.between_modes(side(0.05, 1), side(0.05, 1.1))
    assert not statistics.between_modes(side(0.0, 1), side(0.0, 1.5))
    assert not statistics.between_modes(side(0.12, 1), side(0.12, 1.1))


def test_stored_baselines_carry_the_variance_of_two_days() -> None:
    rounds = [[1.0, 1.01, 0.99]] * 6
    estimate = statistics.stored_log_ratio(rounds, rounds, "p50", 0.02)
    assert estimate.error == pytest.approx(math.sqrt(2) * 0.02)
    assert statistics.day_sigma([1, 2, 3, 4]) is None
    assert statistics.day_sigma([1, math.e, 1, math.e, 1]) == pytest.approx(np.std([0, 1, 0, 1, 0], ddof=1))


@pytest.mark.parametrize(("name", "requests", "slow"), [("p50", 20, 0.05), ("es90", 100, 0.05), ("p95", 100, 0.0)])
def test_intervals_cover_as_stated(name: str, requests: int, slow: float) -> None:
    """One-sided 95 % bounds hold the truth in 95 % of 300 sessions; 91.7 % is 2.6 standard errors below."""
    covered = simulation.coverage(name, 300, requests=requests, slow=slow)  # type: ignore[arg-type]
    assert min(covered.values()) >= 0.917
    assert max(covered.values()) <= 0.99  # not by being uselessly wide
