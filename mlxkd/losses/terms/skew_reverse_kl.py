"""Skewed reverse KL (DistiLLM, 2402.03898): KL(q || (1 - a) p + a q)."""

from __future__ import annotations

import mlx.core as mx

from mlxkd.losses.distribution import Distribution, mixture, through_softmax
from mlxkd.losses.skew import SkewOptions as Options

NEEDS = "teacher"

__all__ = ["NEEDS", "Options", "loss", "skewed"]


def loss(
    student: Distribution, teacher: Distribution, options: Options, given: dict[str, mx.array]
) -> tuple[mx.array, mx.array]:
    """Values [n] and gradient [n, V]; with m the mix, d/dq = log(q / m) + 1 - a q / m."""
    return skewed(student, teacher, mx.array(options.alpha))


def skewed(student: Distribution, teacher: Distribution, alpha: mx.array) -> tuple[mx.array, mx.array]:
    """The same for ``alpha`` a scalar or [n, 1]."""
    middle = mixture(student, teacher, alpha)
    gap = student.log - middle.log
    return mx.sum(student.p * gap, axis=-1), through_softmax(student, gap - alpha * student.p / middle.p)
