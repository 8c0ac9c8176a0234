"""DistiLLM-2's pairing (2503.07067): skewed forward KL on the data's text, skewed reverse KL on the student's.

``on_student`` says which positions the student wrote; without it the term refuses to start. With ``adaptive`` each text
has an alpha of its own, ``contrastive_alpha``, which ``mlxkd.losses.curriculum`` computes from how far the student is
from the teacher on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlxkd.losses.distribution import Distribution
from mlxkd.losses.skew import SkewOptions
from mlxkd.losses.terms import skew_kl, skew_reverse_kl

NEEDS = "teacher"
INPUTS = ("on_student",)


@dataclass(frozen=True)
class Options(SkewOptions):
    """alpha: of the mix, the largest where adaptive; adaptive: give each text its own."""

    adaptive: bool = False


def further_inputs(options: Options) -> tuple[str, ...]:
    """What else has to be given for every position under these options."""
    return ("contrastive_alpha",) if options.adaptive else ()


def loss(
    student: Distribution, teacher: Distribution, options: Options, given: dict[str, mx.array]
) -> tuple[mx.array, mx.array]:
    """Values [n] and gradient [n, V]."""
    mine = given["on_student"]
    alpha = given["contrastive_alpha"][:, None] if options.adaptive else mx.array(options.alpha)
    forward, forward_slope = skew_kl.skewed(student, teacher, alpha)
    reverse, reverse_slope = skew_reverse_kl.skewed(student, teacher, alpha)
    return mx.where(mine, reverse, forward), mx.where(mine[:, None], reverse_slope, forward_slope)
