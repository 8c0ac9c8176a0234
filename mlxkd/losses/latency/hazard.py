"""Expected length from a hazard: how long a student is expected to go on before an event (a stop, a call).

With h_t the probability of the event at position t, S_t = prod_{s<=t} (1 - h_s) is the probability of going on
beyond t, and the expected number of positions before the event, counted up to T, is sum_{t=1..T} S_t
(the tail-sum formula for a non-negative integer).
"""

from __future__ import annotations

import numpy as np


def survival(hazard: np.ndarray) -> np.ndarray:
    """float64 [T] probabilities of no event up to and with each position, from hazards in [0, 1]."""
    return np.cumprod(1.0 - hazard.astype(np.float64))


def expected_positions(hazard: np.ndarray) -> float:
    """Expected positions before the event, at most T."""
    return float(survival(hazard).sum())


def expected_slope(hazard: np.ndarray) -> np.ndarray:
    """float64 [T], derivative of ``expected_positions`` by each hazard: -sum_{t>=s} prod_{r<=t, r!=s} (1 - h_r)."""
    going_on = 1.0 - hazard.astype(np.float64)
    before = np.concatenate([[1.0], np.cumprod(going_on)[:-1]])
    # after[s] = 1 + g_{s+1} + g_{s+1} g_{s+2} + ...; no division, so a certain event (h = 1) is no special case.
    after = np.ones(len(going_on))
    for s in range(len(going_on) - 2, -1, -1):
        after[s] = 1.0 + going_on[s + 1] * after[s + 1]
    return -before * after


def hinge(extra: float, reference: float, margin: float) -> tuple[float, float]:
    """relu((extra + reference) / reference - 1 - margin) and its derivative by ``extra``.

    Args:
        extra: expected positions beyond the reference answer.
        reference: length of the teacher's answer, positive.
        margin: tolerated excess, as a share of the reference.
    """
    value = extra / reference - margin
    return (value, 1.0 / reference) if value > 0 else (0.0, 0.0)
