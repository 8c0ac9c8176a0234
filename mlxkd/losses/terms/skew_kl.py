"""Skewed forward KL (DistiLLM, 2402.03898): KL(p || a p + (1 - a) q). A little teacher in the mix bounds the ratio."""

from __future__ import annotations

import mlx.core as mx

from mlxkd.losses.distribution import Distribution, mixture, through_softmax
from mlxkd.losses.skew import SkewOptions as Options

NEEDS = "teacher"

__all__ = ["NEEDS", "Options", "loss", "skewed"]


def loss(
    student: Distribution, teacher: Distribution, options: Options, given: dict[str, mx.array]
) -> tuple[mx.array, mx.array]:
    """Values [n] and gradient [n, V]; with m the mix, d/dq = -(1 - a) p / m."""
    return skewed(student, teacher, mx.array(options.alpha))


def skewed(student: Distribution, teacher: Distribution, alpha: mx.array) -> tuple[mx.array, mx.array]:
    """The same for ``alpha`` a scalar or [n, 1]."""
    middle = mixture(teacher, student, alpha)
    values = mx.sum(teacher.p * (teacher.log - middle.log), axis=-1)
    return values, through_softmax(student, (alpha - 1) * teacher.p / middle.p)
