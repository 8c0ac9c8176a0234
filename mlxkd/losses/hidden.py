"""Hidden-state matching with learned projectors.

1 - cos(W h_s, h_t) or the mean squared difference, at chosen layers, over the supervised positions or all that
these can see. The projectors are a module: beside the student in one module (``WithProjectors``) they train, save and
resume with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxkd.data.batching import Batch
from mlxkd.errors import UserError

KINDS = ("cosine", "mse")
POSITIONS = ("supervised", "visible")
FINAL = -1  # the post-norm states that enter the head


class Projectors(nn.Module):
    """One matrix without bias per pair of layers, [Dt, Ds]; the identity where the widths are equal.

    Args:
        pairs: how many.
        student_width, teacher_width: Ds and Dt.
    """

    def __init__(self, pairs: int, student_width: int, teacher_width: int):
        super().__init__()
        start = mx.eye(teacher_width, student_width)
        if student_width != teacher_width:
            start = mx.random.normal(start.shape) * student_width**-0.5
        self.weights = [start for _ in range(pairs)]


class WithProjectors(nn.Module):
    """A student and its projectors, for the optimiser and for checkpoints."""

    def __init__(self, student: nn.Module, projectors: Projectors):
        super().__init__()
        self.student, self.projectors = student, projectors


@dataclass(frozen=True)
class HiddenMatch:
    """What to match.

    Args:
        layers: (student layer, teacher layer) pairs; -1 is the state that enters the head.
        projectors: one per pair.
        kind: "cosine" or "mse".
        weight: factor in the loss.
        positions: "supervised" matches where labels carry loss, by their weight; "visible" matches, each with weight 1,
            all positions that a supervised one can attend to, so that keys and values of the context are learned too.

    Raises:
        UserError: an unknown kind or choice of positions, no pair, or projectors of another number.
    """

    layers: tuple[tuple[int, int], ...]
    projectors: Projectors
    kind: str = "cosine"
    weight: float = 1.0
    positions: str = "supervised"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"kind must be one of {', '.join(KINDS)}, not {self.kind!r}", where="loss.hidden")
        if self.positions not in POSITIONS:
            raise UserError(
                f"positions must be one of {', '.join(POSITIONS)}, not {self.positions!r}", where="loss.hidden"
            )
        if not self.layers or len(self.layers) != len(self.projectors.weights):
            raise UserError(
                f"{len(self.layers)} pairs of layers and {len(self.projectors.weights)} projectors", where="loss.hidden"
            )

    @property
    def key(self) -> str:
        """Its name in logs."""
        return f"hidden_{self.kind}"

    def where(self, batch: Batch) -> np.ndarray:
        """Flat positions (int64 [N]) of ``batch`` at which states are matched."""
        return batch.visible if self.positions == "visible" else batch.supervised

    def weights(self, batch: Batch) -> mx.array:
        """The weight (float32 [N]) of each of them."""
        at = self.where(batch)
        return mx.ones(len(at)) if self.positions == "visible" else mx.array(batch.weights.reshape(-1)[at])

    def gather(self, states: Sequence[mx.array], batch: Batch) -> list[mx.array]:
        """[N, D] at those positions, of each [B, S, D]."""
        at = mx.array(self.where(batch))
        return [x.reshape(-1, x.shape[-1])[at] for x in states]

    def loss(self, student: Sequence[mx.array], teacher: Sequence[mx.array], weights: mx.array) -> mx.array:
        """Weighted sum over positions and pairs.

        Args:
            student, teacher: per pair [N, Ds] and [N, Dt].
            weights: float32 [N].
        """
        total = mx.zeros(())
        for h, t, w in zip(student, teacher, self.projectors.weights, strict=True):
            values = _distance(self.kind, h.astype(mx.float32) @ w.T, t.astype(mx.float32))
            total = total + mx.sum(values * weights)
        return total


def _distance(kind: str, a: mx.array, b: mx.array) -> mx.array:
    if kind == "mse":
        return mx.mean(mx.square(a - b), axis=-1)
    lengths = mx.linalg.norm(a, axis=-1) * mx.linalg.norm(b, axis=-1)
    return 1 - mx.sum(a * b, axis=-1) / mx.maximum(lengths, 1e-8)
