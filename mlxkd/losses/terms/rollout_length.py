"""Shorter rollouts by the score function: the gradient of E[cost] is E[cost * d log q(y)] (Williams 1992).

``length_advantage`` is each sampled token's cost minus a baseline, from
``mlxkd.losses.latency.inputs.rollout_length``; without it the term refuses to start. The value is a surrogate: only
its gradient means anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlxkd.errors import UserError
from mlxkd.losses.distribution import Distribution

NEEDS = "labels"
INPUTS = ("length_advantage",)


@dataclass(frozen=True)
class Options:
    """``margin``: tolerated excess over the teacher's length, as a share of it."""

    margin: float = 0.15

    def __post_init__(self) -> None:
        if self.margin < 0:
            raise UserError("margin must not be negative", where="loss.rollout_length")


def loss(
    student: Distribution, labels: mx.array, options: Options, given: dict[str, mx.array]
) -> tuple[mx.array, mx.array]:
    """Values [n], advantage * log q(label), and gradient [n, V]."""
    at, advantage = labels[:, None], given["length_advantage"]
    onehot = mx.put_along_axis(mx.zeros_like(student.p), at, mx.ones(at.shape), axis=-1)
    return advantage * mx.take_along_axis(student.log, at, axis=-1)[:, 0], advantage[:, None] * (onehot - student.p)
