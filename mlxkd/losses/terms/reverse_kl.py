"""Reverse KL, KL(q || p) = sum q (log q - log p): the student commits to what the teacher finds likely (MiniLLM)."""

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
    """Values [n] and gradient [n, V]; dKL/dz = q (log q - log p - KL)."""
    gap = student.log - teacher.log
    values = mx.sum(student.p * gap, axis=-1)
    return values, student.p * (gap - values[:, None])
