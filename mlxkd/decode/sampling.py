"""From logits to the law a token is drawn from, in float64 on the host: the same on every backend.

Order of the processors: repetition penalty, grammar mask, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mlxkd.errors import UserError


@dataclass(frozen=True)
class SamplingOptions:
    """How a request draws its tokens.

    Args:
        temperature: 0 is greedy (ties go to the smallest id).
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens with at least this mass (Holtzman et al., 2019).
        min_p: keep tokens with at least this share of the likeliest one's probability (Nguyen et al., 2024).
        repetition_penalty: divides positive and multiplies negative logits of recent tokens (Keskar et al., 2019).
        repetition_window: how many recent tokens count, prompt included; 0 counts all.
        seed: of this request alone; what its batch mates do never matters.

    Raises:
        UserError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_window: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "temperature": self.temperature >= 0,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
            "repetition_penalty": self.repetition_penalty > 0,
            "repetition_window": self.repetition_window >= 0,
            "seed": self.seed >= 0,
        }
        for name, good in checks.items():
            if not good:
                raise UserError(f"{name} = {getattr(self, name)} is out of range", where="sampling options")

    @property
    def needs_history(self) -> bool:
        """Whether earlier tokens change the law."""
        return self.repetition_penalty != 1.0


@dataclass(frozen=True)
class Law:
    """A distribution over tokens by its support.

    Args:
        ids: int64[n], ascending.
        probabilities: float64[n], positive, summing to 1.
    """

    ids: np.ndarray
    probabilities: np.ndarray

    @cached_property
    def _cumulative(self) -> np.ndarray:
        return np.cumsum(self.probabilities)

    def of(self, token: int) -> float:
        """Probability of one token."""
        at = int(np.searchsorted(self.ids, token))
        return float(self.probabilities[at]) if at < len(self.ids) and self.ids[at] == token else 0.0

    def draw(self, uniform: float) -> int:
        """The token at quantile ``uniform`` in [0, 1)."""
        if len(self.ids) == 1:
            return int(self.ids[0])
        cumulative = self._cumulative
        at = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
        return int(self.ids[min(at, len(self.ids) - 1)])


def point(token: int) -> Law:
    """All mass on one token."""
    return Law(np.array([token]), np.ones(1))


def penalised(logits: np.ndarray, history: Sequence[int], options: SamplingOptions) -> np.ndarray:
    """Logits [V] with the repetition penalty applied to the tokens of ``history``."""
    if not options.needs_history or len(history) == 0:
        return logits
    recent = np.unique(np.asarray(history[-options.repetition_window :], dtype=np.int64))
    changed = logits.copy()
    values = changed[recent]
    factor = options.repetition_penalty
    changed[recent] = np.where(values > 0, values / factor, values * factor)
    return changed


def law(
    logits: np.ndarray,
    options: SamplingOptions,
    history: Sequence[int] = (),
    allowed: np.ndarray | None = None,
) -> Law:
    """The law of the next token.

    Args:
        logits: float[V].
        options: the request's sampling options.
        history: tokens so far, for the repetition penalty.
        allowed: bool[V] grammar mask, or None.

    Raises:
        ValueError: every token is masked, or a logit is NaN.
    """
    values = penalised(np.asarray(logits, dtype=np.float64), history, options)
    if allowed is not None:
        values = np.where(allowed, values, -np.inf)
    best = float(values.max())
    if not np.isfinite(best):
        raise ValueError("no token has a finite logit")
    if options.temperature == 0:
        return point(int(values.argmax()))
    ids = np.flatnonzero(values > -np.inf)
    if 0 < options.top_k < len(ids):
        ids = _top_k(values, ids, options.top_k)
    weights = np.exp((values[ids] - best) / options.temperature)
    weights /= weights.sum()
    if options.top_p < 1:
        keep = _top_p(weights, options.top_p)
        ids, weights = ids[keep], weights[keep]
    if options.min_p > 0:
        keep = weights >= options.min_p * weights.max()
        ids, weights = ids[keep], weights[keep]
    positive = weights > 0
    ids, weights = ids[positive], weights[positive]
    return Law(ids, weights / weights.sum())


def _top_k(values: np.ndarray, ids: np.ndarray, k: int) -> np.ndarray:
    """The ``k`` ids of largest value, ascending; of equal values the smallest ids stay."""
    candidates = values[ids]
    threshold = np.partition(candidates, -k)[-k]
    above = ids[candidates > threshold]
    return np.sort(np.concatenate([above, ids[candidates == threshold][: k - len(above)]]))


def _top_p(weights: np.ndarray, mass: float) -> np.ndarray:
    """Ascending positions of the smallest likeliest set whose mass reaches ``mass``."""
    # Tokens below (1 - mass) / n together weigh less than 1 - mass, so the set never reaches them.
    possible = np.flatnonzero(weights >= (1 - mass) / len(weights))
    order = possible[np.argsort(-weights[possible], kind="stable")]
    reached = np.searchsorted(np.cumsum(weights[order]), mass * (1 - 1e-12), side="left") + 1
    return np.sort(order[:reached])


def log_probability(logits: np.ndarray, token: int) -> float:
    """The model's own log-probability of a token, in nats, before any processor; logits float[V]."""
    values = np.asarray(logits, dtype=np.float64)
    best = values.max()
    return float(values[token] - best - np.log(np.exp(values - best).sum()))
