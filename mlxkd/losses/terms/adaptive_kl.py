"""Adaptive KL (AKL, 2404.02657): forward KL where the heads differ, reverse KL where the tails do.

Ids sorted by teacher probability up to a cumulative ``mu`` are the head (always the first), the rest the tail;
g = sum |p - q| over each weighs the two. The weights are constants of the step: no gradient flows through them.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlxkd.errors import UserError
from mlxkd.losses.distribution import Distribution
from mlxkd.losses.terms import forward_kl, reverse_kl

NEEDS = "teacher"


@dataclass(frozen=True)
class Options:
    """mu: teacher mass of the head, above 0 and below 1."""

    mu: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.mu < 1:
            raise UserError(f"mu must lie between 0 and 1, not {self.mu}", where="loss.adaptive_kl")


def loss(
    student: Distribution, teacher: Distribution, options: Options, given: dict[str, mx.array]
) -> tuple[mx.array, mx.array]:
    """Values [n] and gradient [n, V]."""
    share = head_share(student.p, teacher.p, options.mu)
    forward, forward_slope = forward_kl.loss(student, teacher, forward_kl.Options(), given)
    reverse, reverse_slope = reverse_kl.loss(student, teacher, reverse_kl.Options(), given)
    values = share * forward + (1 - share) * reverse
    return values, share[:, None] * forward_slope + (1 - share)[:, None] * reverse_slope


def head_share(q: mx.array, p: mx.array, mu: float) -> mx.array:
    """Share [n] of the gap sum |p - q| that lies in the teacher's head."""
    order = mx.argsort(-p, axis=-1)
    gaps = mx.take_along_axis(mx.abs(p - q), order, axis=-1)
    mass = mx.cumsum(mx.take_along_axis(p, order, axis=-1), axis=-1)
    in_head = (mass <= mu) | (mx.arange(p.shape[-1]) == 0)
    return mx.sum(mx.where(in_head, gaps, 0), axis=-1) / mx.maximum(mx.sum(gaps, axis=-1), 1e-20)
