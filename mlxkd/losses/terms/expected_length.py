"""Do not linger: a hinge on the expected number of tokens before the call opens.

The expectation couples all positions of a turn (see ``mlxkd.losses.latency.hazard``), so it is worked out before the
step, from the same student; here each position adds its exact share of the gradient, c_t dh_t/dz with
h_t = sum of q over the opening tokens. ``mlxkd.losses.latency.inputs.expected_length`` makes the inputs; without
them the term refuses to start.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlxkd.errors import UserError
from mlxkd.losses.distribution import Distribution
from mlxkd.losses.latency.bits import unpack

NEEDS = "labels"
INPUTS = ("length_value", "length_slope", "length_event")


@dataclass(frozen=True)
class Options:
    """``margin``: tolerated excess over the teacher's own call, as a share of its length."""

    margin: float = 0.15

    def __post_init__(self) -> None:
        if self.margin < 0:
            raise UserError("margin must not be negative", where="loss.expected_length")


def loss(
    student: Distribution, labels: mx.array, options: Options, given: dict[str, mx.array]
) -> tuple[mx.array, mx.array]:
    """Values [n] (a turn's loss stands at its first position) and gradient [n, V]."""
    event = unpack(given["length_event"], student.p.shape[-1])
    hazard = mx.sum(student.p * event, axis=-1, keepdims=True)
    return given["length_value"], given["length_slope"][:, None] * student.p * (event - hazard)
