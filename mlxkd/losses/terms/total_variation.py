"""Total variation distance, sum |p - q| / 2: bounded, symmetric, indifferent to the size of ratios."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlxkd.losses.distribution import Distribution, through_softmax

NEEDS = "teacher"


@dataclass(frozen=True)
class Options:
    """None."""


def loss(
    student: Distribution, teacher: Distribution, options: Options, given: dict[str, mx.array]
) -> tuple[mx.array, mx.array]:
    """Values [n] and (sub)gradient [n, V]; d/dq = sign(q - p) / 2."""
    gap = student.p - teacher.p
    return 0.5 * mx.sum(mx.abs(gap), axis=-1), through_softmax(student, 0.5 * mx.sign(gap))
