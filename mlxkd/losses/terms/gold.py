"""Cross-tokenizer distillation: byte-aligned groups, JSD on the tokens both vocabularies have, ULD on the rest.

GOLD (TRL, "bayesian" merge): tokens of both sides are grouped between the borders in the text where the two
tokenizers agree; a group's distribution is that of its last token times the probability of the tokens before it.
With equal tokenizers every group is one token, nothing is unmatched, and the loss is the plain divergence.
Universal logit distillation (2402.12030) compares what is unmatched by rank: sum_i |p_(i) - q_(i)|, sorted.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlxkd.errors import UserError
from mlxkd.losses.cross import Aligned, ranked_difference
from mlxkd.losses.distribution import Distribution

NEEDS = "aligned"
FLOOR = 1e-8  # below this a merged probability counts as this, as in TRL


@dataclass(frozen=True)
class Options:
    """beta: of the JSD on matched tokens; matched: its weight, None for the matched share of the teacher's ids."""

    beta: float = 0.0
    matched: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise UserError(f"beta must lie between 0 and 1, not {self.beta}", where="loss.gold")
        if self.matched is not None and not 0 <= self.matched <= 1:
            raise UserError(f"matched must lie between 0 and 1, not {self.matched}", where="loss.gold")


def loss(
    student: Distribution, teacher: Aligned, options: Options, given: dict[str, mx.array]
) -> tuple[mx.array, mx.array]:
    """Values [n], zero but at the last position of each group, and the gradient [n, V]."""
    merged = teacher.merge(student)
    q, p = merged.q, teacher.p
    share = teacher.pairs.shape[1] / p.shape[-1] if options.matched is None else options.matched
    ours, theirs = teacher.pairs
    matched, slope = _matched(q[:, ours], p[:, theirs], options.beta)
    values, gradient = share * matched, mx.zeros_like(q)
    gradient = gradient.at[:, ours].add(share * slope)
    if teacher.ours_alone.size and teacher.theirs_alone.size:
        rest, rest_slope = ranked_difference(q[:, teacher.ours_alone], p[:, teacher.theirs_alone])
        values = values + (1 - share) * rest
        gradient = gradient.at[:, teacher.ours_alone].add((1 - share) * rest_slope)
    return teacher.spread(student, merged, values, gradient)


def _matched(q: mx.array, p: mx.array, beta: float) -> tuple[mx.array, mx.array]:
    """Generalised JSD of unnormalised masses and its gradient with respect to ``q``."""
    inside = q >= FLOOR
    q, p = mx.maximum(q, FLOOR), mx.maximum(p, FLOOR)
    log_q, log_p = mx.log(q), mx.log(p)
    if beta == 0:
        values, slope = p * (log_p - log_q), -p / q
    elif beta == 1:
        values, slope = q * (log_q - log_p), log_q - log_p + 1
    else:
        log_m = mx.log(beta * p + (1 - beta) * q)
        values = beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)
        slope = (1 - beta) * (log_q - log_m)
    return mx.sum(values, axis=-1), mx.where(inside, slope, 0)
