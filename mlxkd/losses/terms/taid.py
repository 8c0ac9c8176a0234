"""TAID (2501.16937): forward KL to a teacher that starts near the student and moves away from it.

The target is softmax((1 - t) student + t teacher) over logits, the student's share a constant of the step. ``t``
rises linearly with training, which is the paper's lower bound; a resumed run needs no state for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlxkd.errors import UserError
from mlxkd.losses.distribution import Distribution, softmax
from mlxkd.losses.terms import forward_kl

NEEDS = "teacher"


@dataclass(frozen=True)
class Options:
    """start, end: the teacher's share of the target at the beginning and at the end of training."""

    start: float = 0.4
    end: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end <= 1:
            raise UserError(f"need 0 <= start <= end <= 1, not {self.start} and {self.end}", where="loss.taid")


def live(options: Options, progress: float) -> dict[str, float]:
    """The teacher's share "t" when ``progress`` (0 to 1) of the training is done."""
    return {"t": options.start + (options.end - options.start) * min(max(progress, 0.0), 1.0)}


def loss(
    student: Distribution, teacher: Distribution, options: Options, given: dict[str, mx.array]
) -> tuple[mx.array, mx.array]:
    """Values [n] and gradient [n, V]; dL/dz = q - target."""
    target = softmax((1 - given["t"]) * student.log + given["t"] * teacher.log)
    return forward_kl.loss(student, target, forward_kl.Options(), given)
