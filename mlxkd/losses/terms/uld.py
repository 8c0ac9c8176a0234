"""Universal logit distillation (2402.12030): sorted probabilities compared by rank, for unrelated vocabularies.

sum_i |p_(i) - q_(i)| over the byte-aligned groups of tokens; the shorter vocabulary is padded with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlxkd.losses.cross import Aligned, ranked_difference
from mlxkd.losses.distribution import Distribution

NEEDS = "aligned"


@dataclass(frozen=True)
class Options:
    """None."""


def loss(
    student: Distribution, teacher: Aligned, options: Options, given: dict[str, mx.array]
) -> tuple[mx.array, mx.array]:
    """Values [n], zero but at the last position of each group, and the gradient [n, V]."""
    merged = teacher.merge(student)
    values, slope = ranked_difference(merged.q, teacher.p)
    return teacher.spread(student, merged, values, slope)
