"""Statistics of paired rounds: what a regression gate may conclude from noisy times.

A round is one fresh process per side, run next to each other; everything that drifts (heat, load,
the day) moves both sides of a round together, so rounds are the unit that is resampled.

The estimate is the log ratio of a statistic of the pooled samples, after what both sides of a round share
(the geometric mean of their medians) is divided out. Its standard error comes from the
paired cluster bootstrap (resample rounds with replacement, the same rounds on both sides), widened by
sqrt(n / (n - 1)) and used with Student's t on n - 1 degrees, as for few clusters
(Hesterberg 2015, "What Teachers Should Know About the Bootstrap", sections 3.2 and 4.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

DRAWS = 1000
POWER_Z = 2.5  # z(95 %, one-sided) + z(80 %): the smallest change seen four times in five
Statistic = Literal["p50", "p95", "es90", "mean"]
LEVELS = {"p50": 0.5, "p95": 0.95, "es90": 0.9}
Rounds = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Estimate:
    """A log ratio (or a plain difference) with its standard error and degrees of freedom."""

    value: float
    error: float
    degrees: int

    def bound(self, confidence: float, side: Literal["lower", "upper"]) -> float:
        """One-sided confidence bound; infinite where the error is."""
        if self.error == 0:
            return self.value
        reach = float(stats.t.ppf(confidence, self.degrees)) * self.error
        return self.value - reach if side == "lower" else self.value + reach

    def p_above(self, limit: float) -> float:
        """p-value of "the truth is at most ``limit``": small when the truth lies above it."""
        if not math.isfinite(self.error):
            return 1.0
        if self.error == 0:
            return 0.0 if self.value > limit else 1.0
        return float(stats.t.sf((self.value - limit) / self.error, self.degrees))

    def p_below(self, limit: float) -> float:
        """p-value of "the truth is at least ``limit``": small when the truth lies below it."""
        return Estimate(-self.value, self.error, self.degrees).p_above(-limit)

    @property
    def detectable(self) -> float:
        """Smallest true change (same scale) seen in four runs out of five at 95 %."""
        return POWER_Z * self.error

    def rounds_to_settle(self, limit: float, alpha: float) -> int | None:
        """Rounds in all after which the bound would clear ``limit`` if the estimate stayed; None where none would."""
        distance = abs(self.value - limit)
        if not math.isfinite(self.error) or distance < 1e-4:
            return None
        needed = float(stats.norm.ppf(1 - alpha)) * self.error * math.sqrt(self.degrees + 1) / distance
        return max(self.degrees + 2, math.ceil(needed**2) + 2)


def statistic(values: Sequence[float] | np.ndarray, name: Statistic) -> float:
    """``p50``/``p95`` (smallest observation with that share at or below it), ``es90`` (mean of the worst tenth), mean.

    Raises:
        ValueError: no values.
    """
    data = np.sort(np.asarray(values, dtype=np.float64))
    if data.size == 0:
        raise ValueError("no observations")
    if name == "mean":
        return float(data.mean())
    return float(_weighted([data], np.ones((1, 1)), name)[0])


def _weighted(rounds: Sequence[np.ndarray], counts: np.ndarray, name: Statistic) -> np.ndarray:
    """The statistic of the pool in which round r appears counts[d, r] times, for each draw d.

    A quantile of a mixture lies between the smallest and the largest quantile of its parts, so only
    pooled values inside that window can be the answer.
    """
    sizes = np.array([r.size for r in rounds], dtype=np.float64)
    total = counts @ sizes
    if name == "mean":
        return (counts @ np.array([r.sum() for r in rounds])) / total
    level = LEVELS[name]
    pooled = np.sort(np.concatenate(rounds))
    ends = [np.sort(r)[max(math.ceil(level * r.size - 1e-9) - 1, 0)] for r in rounds if r.size]
    window = np.unique(pooled[(pooled >= min(ends)) & (pooled <= max(ends))])
    ordered = [np.sort(r) for r in rounds]
    at_most = np.array([np.searchsorted(r, window, side="right") for r in ordered], dtype=np.float64)
    below = counts @ at_most < (level * total - 1e-9)[:, None]
    place = np.minimum(below.sum(axis=1), window.size - 1)
    quantile = window[place]
    if name != "es90":
        return quantile
    sums = [np.concatenate([[0.0], np.cumsum(r)]) for r in ordered]
    tails = np.array([s[-1] - s[k.astype(int)] for s, k in zip(sums, at_most, strict=True)])
    rows = np.arange(len(counts))
    tail_sum, tail_count = (counts @ tails)[rows, place], total - (counts @ at_most)[rows, place]
    wanted = (1 - level) * total
    return (tail_sum + (wanted - tail_count) * quantile) / wanted


def _arrays(rounds: Rounds) -> list[np.ndarray]:
    return [np.asarray(r, dtype=np.float64) for r in rounds]


def _draw(rounds: int, draws: int, seed: int) -> np.ndarray:
    """How often each round appears in each bootstrap draw: [draws, rounds]."""
    return np.random.default_rng(seed).multinomial(rounds, np.full(rounds, 1 / rounds), size=draws).astype(np.float64)


def _estimate(value: float, draws: np.ndarray, rounds: int) -> Estimate:
    if (draws == value).all():  # certain, also at infinity: every draw fell on a censored sample
        return Estimate(value, 0.0, rounds - 1)
    finite = bool(np.isfinite(draws).all())
    error = float(draws.std(ddof=1)) * math.sqrt(rounds / (rounds - 1)) if finite else math.inf
    return Estimate(value, error, rounds - 1)


def log_ratio(baseline: Rounds, candidate: Rounds, name: Statistic, *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """log(statistic of candidate / statistic of baseline) over paired rounds.

    Args:
        baseline, candidate: positive samples of each round, same number of rounds, round i paired with round i.
            Infinite (censored) samples are allowed; an infinite statistic leaves the error infinite.

    Raises:
        ValueError: fewer than three rounds, unpaired rounds, an empty round, or a value that is not positive.
    """
    ours, theirs = _arrays(candidate), _arrays(baseline)
    _check(ours, theirs)
    shared = [_shared(a, b) for a, b in zip(ours, theirs, strict=True)]
    ours, theirs = ([r / s for r, s in zip(side, shared, strict=True)] for side in (ours, theirs))
    counts = np.vstack([np.ones(len(ours)), _draw(len(ours), draws, seed)])
    with np.errstate(invalid="ignore"):
        ratio = np.log(_weighted(ours, counts, name)) - np.log(_weighted(theirs, counts, name))
    return _estimate(float(ratio[0]), ratio[1:], len(ours))


def _shared(ours: np.ndarray, theirs: np.ndarray) -> float:
    """What moved both sides of a round (heat, the day): removed, or hot rounds alone would make the tail."""
    level = math.sqrt(float(np.median(ours)) * float(np.median(theirs)))
    return level if math.isfinite(level) else 1.0


def _check(*sides: list[np.ndarray]) -> None:
    if len({len(side) for side in sides}) > 1:
        raise ValueError(f"unpaired rounds: {[len(side) for side in sides]}")
    if len(sides[0]) < 3:
        raise ValueError(f"{len(sides[0])} rounds; a spread needs at least 3")
    for side in sides:
        if any(r.size == 0 or not (r > 0).all() for r in side):
            raise ValueError("every round needs samples, all of them positive")


def level(rounds: Rounds, name: Statistic, *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """The statistic itself with its error over rounds, for absolute limits (steps to the first call, say)."""
    data = _arrays(rounds)
    _check(data)
    values = _weighted(data, np.vstack([np.ones(len(data)), _draw(len(data), draws, seed)]), name)
    return _estimate(float(values[0]), values[1:], len(data))


def paired_difference(baseline: Sequence[float], candidate: Sequence[float]) -> Estimate:
    """Mean of candidate - baseline over paired cases (scores in [0, 1]), with Student's standard error."""
    difference = np.asarray(candidate, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    if difference.size < 2:
        raise ValueError("a paired difference needs at least 2 cases")
    return Estimate(
        float(difference.mean()), float(difference.std(ddof=1) / math.sqrt(difference.size)), difference.size - 1
    )


def stored_log_ratio(baseline: Rounds, candidate: Rounds, name: Statistic, day_sigma: float) -> Estimate:
    """log ratio against stored rounds of another day: unpaired, with the variance of both days added."""
    theirs, ours = level(baseline, name), level(candidate, name)
    relative = [side.error / side.value for side in (theirs, ours)]
    error = math.sqrt(relative[0] ** 2 + relative[1] ** 2 + 2 * day_sigma**2)
    return Estimate(math.log(ours.value / theirs.value), error, min(theirs.degrees, ours.degrees))


def between_modes(*sides: Rounds, jump: float = 0.10) -> bool:
    """Whether the 95th percentile sits on the step between two modes, where it flips from run to run.

    Looks at every sample divided by its own side's median, so that a plain slowdown cannot look like a step.
    """
    pools = [np.concatenate(_arrays(side)) for side in sides]
    scaled = np.concatenate([pool / np.median(pool) for pool in pools])
    if not np.isfinite(np.quantile(scaled, 0.97, method="inverted_cdf")):
        return False
    low, high = np.quantile(scaled, [0.93, 0.97])
    return bool(high / low - 1 > jump)


def holm(p_values: Sequence[float], alpha: float) -> list[bool]:
    """Which hypotheses Holm's step-down procedure rejects at family-wise level ``alpha`` (Holm 1979)."""
    rejected = [False] * len(p_values)
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[index] > alpha / (len(p_values) - rank):
            break
        rejected[index] = True
    return rejected


def day_sigma(days: Sequence[float]) -> float | None:
    """Standard deviation of a log statistic between days; None below five days, where it would be a guess."""
    return float(np.std(np.log(days), ddof=1)) if len(days) >= 5 else None
