"""Cross-entropy with the token that follows, -log q(label): plain supervised fine-tuning.

What the student wrote itself is no label: where ``on_student`` is given, those positions count as 0, as in GKD.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlxkd.losses.distribution import Distribution

NEEDS = "labels"


@dataclass(frozen=True)
class Options:
    """None."""


def loss(
    student: Distribution, labels: mx.array, options: Options, given: dict[str, mx.array]
) -> tuple[mx.array, mx.array]:
    """Values [n] and gradient [n, V]; dCE/dz = q - onehot(label)."""
    at = labels[:, None]
    gradient = mx.put_along_axis(student.p, at, mx.take_along_axis(student.p, at, axis=-1) - 1, axis=-1)
    values = -mx.take_along_axis(student.log, at, axis=-1)[:, 0]
    if "on_student" not in given:
        return values, gradient
    of_data = mx.logical_not(given["on_student"])
    return values * of_data, gradient * of_data[:, None]
