"""Do two backends say the same? One path of tokens through both, position by position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlxkd.decode.session import Session


@dataclass(frozen=True)
class Agreement:
    """Two sessions on one prompt.

    Args:
        positions: generated positions compared.
        same: positions at which both prefer the same token.
        kl: nats per position, KL(first || second).
        diverges: first position with another preference, or None: greedy answers are identical.
        margin: logit distance of the first session's two best tokens there: small is a tie, large a fault.
    """

    positions: int
    same: int
    kl: tuple[float, ...]
    diverges: int | None
    margin: float | None

    @property
    def identical(self) -> bool:
        """Whether the greedy answers are the same, token by token."""
        return self.diverges is None


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64 log-probabilities of the last axis."""
    x = np.asarray(logits, dtype=np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def agree(first: Session, second: Session, prompt: Sequence[int], tokens: int) -> Agreement:
    """Feed ``prompt`` and the first session's greedy answer to both and compare their laws.

    Args:
        prompt: token ids, at least one; both sessions start empty and are left empty.
        tokens: positions at most.
    """
    fed, rows = np.asarray([list(prompt)], dtype=np.int32), []
    for _ in range(tokens):
        pair = [np.asarray(s.extend(fed), dtype=np.float32)[0, fed.shape[1] - 1] for s in (first, second)]
        rows.append(pair)
        fed = np.array([[int(pair[0].argmax())]], dtype=np.int32)
    for session in (first, second):
        session.rewind([0])
    return compare([r[0] for r in rows], [r[1] for r in rows])


def compare(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> Agreement:
    """The agreement of two lists of logits [V] over the same positions."""
    kl, same, diverges, margin = [], 0, None, None
    for index, (a, b) in enumerate(zip(first, second, strict=True)):
        p, q = log_softmax(a), log_softmax(b)
        kl.append(float((np.exp(p) * (p - q)).sum()))
        if int(a.argmax()) == int(b.argmax()):
            same += 1
        elif diverges is None:
            best = np.sort(np.asarray(a, dtype=np.float64))[-2:]
            diverges, margin = index, float(best[1] - best[0])
    return Agreement(len(kl), same, tuple(kl), diverges, margin)


def summary(found: Sequence[Agreement]) -> dict[str, float]:
    """Shares and nats over all prompts."""
    kl = [v for a in found for v in a.kl]
    positions = sum(a.positions for a in found)
    return {
        "identical_answers": sum(a.identical for a in found) / len(found),
        "same_preference": sum(a.same for a in found) / positions,
        "kl_mean": float(np.mean(kl)),
        "kl_max": float(np.max(kl)),
    }
