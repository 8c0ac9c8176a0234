"""Forward KL, KL(p || q) = sum p (log p - log q): the student covers all the teacher says (Hinton, 1503.02531)."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlxkd.losses.distribution import Distribution

NEEDS = "teacher"


@dataclass(frozen=True)
class Options:
    """None."""


def loss(
    student: Distribution, teacher: Distribution, options: Options, given: dict[str, mx.array]
) -> tuple[mx.array, mx.array]:
    """Values [n] and gradient [n, V]; dKL/dz = q - p."""
    return mx.sum(teacher.p * (teacher.log - student.log), axis=-1), student.p - teacher.p
