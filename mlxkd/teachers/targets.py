"""What a teacher says about the supervised positions of a batch. Losses see these, never the teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxkd.losses.forms import Dense


@dataclass(frozen=True)
class DenseTargets:
    """Hidden states and the head that turns them into logits, chunk by chunk; the full logits never exist.

    Args:
        hidden: [N, Dt], the teacher's post-norm states at the supervised positions.
        head: [n, Dt] to logits [n, V], scale and cap included.
        vocabulary: number of leading token ids that teacher and student share; padding rows lie beyond.
        weights: float32 [N] or None; how much this teacher counts at each position.
    """

    hidden: mx.array
    head: Callable[[mx.array], mx.array]
    vocabulary: int
    weights: np.ndarray | None = None

    @property
    def count(self) -> int:
        return int(self.hidden.shape[0])

    @property
    def form(self) -> Dense:
        return Dense()

    def check(self, temperatures: Sequence[float]) -> None:
        """Serves every temperature."""

    def chunk(self, start: int, stop: int) -> dict[str, mx.array]:
        return {"logits": self.head(self.hidden[start:stop])[:, : self.vocabulary]}
