"""Simulated builds for the gates: noise and drift as published for laptops, with a known truth.

3 % between requests, 1.5 % between processes, a share of slow requests 25 % slower, a heat drift of several
percent over the session and a slow swing, which hit both sides of a round alike.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bench.gates import Evidence, Gate, Outcome, Thresholds, evaluate, next_rounds, overall
from bench.statistics import Statistic, log_ratio

SERIES = {"ttft_ms": 80.0, "tpot_ms": 12.0}


def rounds(
    rng: np.random.Generator, count: int, requests: int, *, slow: float, change: float, done: int = 0
) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """(baseline, candidate) samples by series; the candidate's times are (1 + change) times the baseline's in truth."""
    sides: tuple[dict[str, list[Any]], dict[str, list[Any]]] = ({}, {})
    for series, middle in SERIES.items():
        for number in range(done, done + count):
            shared = 0.06 * (1 - math.exp(-number / 8)) + 0.02 * math.sin(number) + rng.normal(0, 0.02)
            for side, shift in zip(sides, (0.0, math.log1p(change)), strict=True):
                logs = shared + shift + rng.normal(0, 0.015) + rng.normal(0, 0.03, requests)
                logs += math.log(1.25) * (rng.random(requests) < slow)
                side.setdefault(series, []).append(middle * np.exp(logs))
    return sides


def build(seed: int, change: float, limits: Thresholds, *, start: int = 10, requests: int = 100) -> Outcome:
    """The gates' verdict on one simulated build, doubling the rounds as `bench gate` does."""
    rng = np.random.default_rng(seed)
    slow = float(rng.choice([0.0, 0.02, 0.05, 0.10]))
    baseline, candidate = rounds(rng, start, requests, slow=slow, change=change)
    done = start
    for look in range(1, limits.looks + 1):
        outcome = overall(_timed(evaluate(Evidence({**candidate}, {**baseline}), limits)))
        more = next_rounds(done, look, limits)
        if outcome != "cannot tell" or more is None:
            return outcome
        extra = rounds(rng, more, requests, slow=slow, change=change, done=done)
        for side, added in zip((baseline, candidate), extra, strict=True):
            for series in SERIES:
                side[series] += added[series]
        done += more
    return "cannot tell"


def _timed(gates: list[Gate]) -> list[Gate]:
    """The gates on times: the simulation has no energy, quality or residency."""
    return [g for g in gates if g.outcome != "not available"]


def rate(outcome: Outcome, builds: int, change: float, limits: Thresholds) -> float:
    """Share of simulated builds that end in ``outcome``."""
    return sum(build(seed, change, limits) == outcome for seed in range(builds)) / builds


def coverage(name: Statistic, sessions: int, *, requests: int, slow: float, level: float = 0.95) -> dict[str, float]:
    """Share of simulated sessions whose one-sided bound holds the truth (a build 4 % slower), by side.

    Args:
        sessions: of 10 rounds each, with a heat drift.
        requests: per round.
        slow: share of requests that take a quarter longer.
        level: of the bounds.
    """
    truth, held = math.log(1.04), {"lower": 0, "upper": 0}
    for seed in range(sessions):
        rng = np.random.default_rng(seed)
        sides: list[list[Any]] = [[], []]
        for number in range(10):
            heat = 0.05 * number / 10 + rng.normal(0, 0.02)
            for side, shift in zip(sides, (0.0, truth), strict=True):
                logs = heat + shift + rng.normal(0, 0.015) + rng.normal(0, 0.03, requests)
                side.append(np.exp(logs + math.log(1.25) * (rng.random(requests) < slow)))
        estimate = log_ratio(sides[0], sides[1], name, draws=400, seed=seed)
        held["lower"] += estimate.bound(level, "lower") <= truth
        held["upper"] += estimate.bound(level, "upper") >= truth
    return {side: count / sessions for side, count in held.items()}
