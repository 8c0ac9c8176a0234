"""Call early: cross-entropy with the call at the first positions, grammar mass, and no call where none belongs.

With A the allowed tokens of a position and m = sum of q over A (semantic loss, Xu et al. 1711.11157):

- prefix: -log q(token of the teacher's call), the opening token while the text still hesitates;
- grammar: -log m, zero for every distribution over valid continuations;
- avoid: -log(1 - m), where no tool fits the request.

``mlxkd.losses.latency.inputs.early_call`` makes the inputs; without them the term refuses to start.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlxkd.errors import UserError
from mlxkd.losses.distribution import Distribution
from mlxkd.losses.latency.bits import unpack

NEEDS = "labels"
INPUTS = ("early_label", "early_prefix", "early_grammar", "early_avoid", "early_allowed")
TINY = 1e-30


@dataclass(frozen=True)
class Options:
    """Factors of the three parts, and the share of the training over which they rise from 0.

    ``schema``: inside the call the grammar follows the schemas of the tools on offer; False leaves it to the opening.
    """

    prefix: float = 0.2
    grammar: float = 0.02
    avoid: float = 0.2
    ramp: float = 0.25
    schema: bool = True

    def __post_init__(self) -> None:
        for name in ("prefix", "grammar", "avoid", "ramp"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative", where="loss.early_call")


def live(options: Options, progress: float) -> dict[str, float]:
    """How far the ramp has risen."""
    return {"ramp": min(1.0, progress / options.ramp) if options.ramp else 1.0}


def loss(
    student: Distribution, labels: mx.array, options: Options, given: dict[str, mx.array]
) -> tuple[mx.array, mx.array]:
    """Values [n] and gradient [n, V]."""
    prefix, grammar, avoid = (
        given[f"early_{name}"] * (getattr(options, name) * given["ramp"]) for name in ("prefix", "grammar", "avoid")
    )
    at = given["early_label"][:, None]
    onehot = mx.put_along_axis(mx.zeros_like(student.p), at, mx.ones(at.shape), axis=-1)
    allowed = unpack(given["early_allowed"], student.p.shape[-1])
    inside = mx.maximum(mx.sum(student.p * allowed, axis=-1), TINY)
    outside = mx.maximum(mx.sum(student.p * (1 - allowed), axis=-1), TINY)
    values = (
        -prefix * mx.take_along_axis(student.log, at, axis=-1)[:, 0]
        - grammar * mx.log(inside)
        - avoid * mx.log(outside)
    )
    # d(-log m)/dz = q - q A / m and d(-log(1 - m))/dz = q - q (1 - A) / (1 - m)
    slope = (
        prefix[:, None] * (student.p - onehot)
        + grammar[:, None] * (student.p - student.p * allowed / inside[:, None])
        + avoid[:, None] * (student.p - student.p * (1 - allowed) / outside[:, None])
    )
    return values, slope
