"""The exact acceptance and resampling law of speculative decoding.

Leviathan et al. (arXiv:2211.17192) and Chen et al. (arXiv:2302.01318): accept a draft x ~ q with
probability min(1, p(x) / q(x)); at the first rejection draw from the normalised max(p - q, 0); if all
pass, draw one more token from p. Both p and q are the laws after every processor. A draft that was not
drawn at all (n-gram, grammar, greedy) is the point mass q(x) = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from mlxkd.decode.sampling import Law, point


@dataclass
class Draft:
    """Proposed tokens and the laws they were drawn from; an absent law is the point mass.

    Args:
        tokens: proposals in order.
        laws: one per token, or empty when every token is a point mass.
    """

    tokens: list[int] = field(default_factory=list)
    laws: list[Law] = field(default_factory=list)

    def law(self, position: int) -> Law:
        """The law that token ``position`` was drawn from."""
        return self.laws[position] if self.laws else point(self.tokens[position])

    def cut(self, length: int) -> Draft:
        """The first ``length`` proposals."""
        return Draft(self.tokens[:length], self.laws[:length])


class Streams:
    """Independent random streams of one request: acceptance, worker draws, drafter draws."""

    def __init__(self, seed: int):
        children = np.random.SeedSequence(seed).spawn(3)
        self.accept, self.draw, self.draft = (np.random.Generator(np.random.PCG64(child)) for child in children)


def residual(p: Law, q: Law) -> Law:
    """The law after a rejection: max(p - q, 0), normalised.

    Raises:
        ValueError: q covers p everywhere, so that a rejection has probability 0.
    """
    left = np.maximum(p.probabilities - _aligned(p, q), 0.0)
    total = left.sum()
    if total <= 0:
        raise ValueError("nothing is left of the worker's law")
    keep = left > 0
    return Law(p.ids[keep], left[keep] / total)


def _aligned(p: Law, q: Law) -> np.ndarray:
    """q's probabilities on the support of p."""
    at = np.minimum(np.searchsorted(q.ids, p.ids), len(q.ids) - 1)
    return np.where(q.ids[at] == p.ids, q.probabilities[at], 0.0)


@dataclass(frozen=True)
class Stage:
    """One proposal before the judge.

    Args:
        acceptance: probability that it stands.
        worker, drafter: the laws p and q at this position, for the residual.
    """

    acceptance: float
    worker: Law
    drafter: Law


def stages(law_at: Callable[[int], Law], draft: Draft) -> Iterator[Stage]:
    """The proposals in order, each reached only if all before it stood.

    Args:
        law_at: the worker's law after the first i proposals, for i in 0..len(draft).
        draft: the proposals.
    """
    for i, token in enumerate(draft.tokens):
        p, q = law_at(i), draft.law(i)
        yield Stage(min(1.0, p.of(token) / q.of(token)), p, q)


def verify(law_at: Callable[[int], Law], draft: Draft, streams: Streams) -> tuple[int, int]:
    """Judge a draft; returns (accepted proposals, the token that follows them).

    Args:
        law_at: as for ``stages``; asked in order and never beyond the first rejection.
        draft: the proposals.
        streams: the request's random streams.
    """
    for accepted, stage in enumerate(stages(law_at, draft)):
        if stage.acceptance < 1 and (stage.acceptance == 0 or streams.accept.random() >= stage.acceptance):
            return accepted, residual(stage.worker, stage.drafter).draw(streams.draw.random())
    return len(draft.tokens), law_at(len(draft.tokens)).draw(streams.draw.random())


def acceptance(p: Law, q: Law) -> float:
    """Probability that a draft from q is accepted: the sum of min(p, q)."""
    return float(np.minimum(p.probabilities, _aligned(p, q)).sum())


def expected_tokens(acceptance_by_position: Sequence[float]) -> float:
    """Tokens per worker forward when position i is reached and accepted with these conditional rates."""
    return 1.0 + float(np.cumprod(np.asarray(acceptance_by_position, dtype=np.float64)).sum())
