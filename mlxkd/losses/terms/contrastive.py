"""DistiLLM-2's pairing (2503.07067): skewed forward KL on teacher text, skewed reverse KL on student text.

``on_student`` says which positions the student wrote; without it the term refuses to start. ``alpha`` may be
given per position and then replaces the option; ``mlxkd.losses.curriculum`` computes it from how far the
student is from the teacher on each text.
"""

from __future__ import annotations

import mlx.core as mx

from mlxkd.losses.distribution import Distribution
from mlxkd.losses.skew import SkewOptions as Options
from mlxkd.losses.terms import skew_kl, skew_reverse_kl

NEEDS = "teacher"
INPUTS = ("on_student",)

__all__ = ["INPUTS", "NEEDS", "Options", "loss"]


def loss(
    student: Distribution, teacher: Distribution, options: Options, given: dict[str, mx.array]
) -> tuple[mx.array, mx.array]:
    """Values [n] and gradient [n, V]."""
    mine = given["on_student"]
    forward, forward_slope = skew_kl.loss(student, teacher, options, given)
    reverse, reverse_slope = skew_reverse_kl.loss(student, teacher, options, given)
    return mx.where(mine, reverse, forward), mx.where(mine[:, None], reverse_slope, forward_slope)
