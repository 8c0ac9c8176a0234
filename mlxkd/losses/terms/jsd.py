"""Generalised Jensen-Shannon divergence (GKD, 2306.13649): b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q.

By convention beta 0 is the forward and beta 1 the reverse KL. That is a jump: the divergence vanishes like
beta, so beta 0.01 has a gradient about a hundred times smaller than beta 0. ``normalise`` divides by
beta (1 - beta), which makes the two ends continuous limits.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlxkd.errors import UserError
from mlxkd.losses.distribution import TINY, Distribution
from mlxkd.losses.terms import forward_kl, reverse_kl

NEEDS = "teacher"


@dataclass(frozen=True)
class Options:
    """beta: 0 (forward KL) to 1 (reverse KL); normalise: divide by beta (1 - beta) in between."""

    beta: float = 0.5
    normalise: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise UserError(f"beta must lie between 0 and 1, not {self.beta}", where="loss.jsd")


def loss(
    student: Distribution, teacher: Distribution, options: Options, given: dict[str, mx.array]
) -> tuple[mx.array, mx.array]:
    """Values [n] and gradient [n, V]; dJSD/dz = (1 - b) q (log(q / m) - KL(q || m))."""
    beta = options.beta
    if beta in (0.0, 1.0):
        end = reverse_kl if beta else forward_kl
        return end.loss(student, teacher, end.Options(), given)
    p, q = teacher.p, student.p
    # log(q / m) and log(p / m) by log1p: for small beta they are far smaller than the logarithms they lie between.
    gap = -mx.log1p(beta * ((p - q) / mx.maximum(q, TINY)))
    to_student = mx.sum(q * gap, axis=-1)
    to_teacher = -mx.sum(p * mx.log1p((1 - beta) * ((q - p) / mx.maximum(p, TINY))), axis=-1)
    factor = 1 / (beta * (1 - beta)) if options.normalise else 1.0
    values = beta * to_teacher + (1 - beta) * to_student
    return factor * values, (factor * (1 - beta)) * q * (gap - to_student[:, None])
