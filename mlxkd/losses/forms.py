"""How a teacher's word about a chunk becomes a comparison with the student. Pure and hashable; no data.

A form turns any divergence between two distributions into values and a gradient over the whole vocabulary, so
that a loss is written once and works with every kind of target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlxkd.losses.distribution import Distribution, softmax

Divergence = Callable[[Distribution, Distribution], tuple[mx.array, mx.array]]


class Form(Protocol):
    """The maths of one kind of target."""

    def prepare(self, arrays: dict[str, mx.array], temperature: float) -> Any:
        """What the teacher says about the chunk at this temperature; terms with one temperature share it."""
        ...

    def compare(self, divergence: Divergence, student: Distribution, teacher: Any) -> tuple[mx.array, mx.array]:
        """Values [n] and gradient [n, V] with respect to the tempered student logits."""
        ...


class Targets(Protocol):
    """What a teacher says about the supervised positions of a batch; the data behind a form.

    ``count`` positions, over the first ``vocabulary`` token ids; ``weights`` (float32 [count] or None) multiplies
    the loss weights where this teacher speaks for some positions only.
    """

    @property
    def count(self) -> int: ...

    @property
    def vocabulary(self) -> int: ...

    @property
    def weights(self) -> np.ndarray | None: ...

    @property
    def form(self) -> Form: ...

    def check(self, temperatures: Sequence[float]) -> None:
        """Raises UserError when the targets cannot serve one of the temperatures."""
        ...

    def chunk(self, start: int, stop: int) -> dict[str, mx.array]:
        """The arrays of positions [start, stop), rows first."""
        ...


@dataclass(frozen=True)
class Dense:
    """Every logit: arrays ``logits`` [n, V]."""

    def prepare(self, arrays: dict[str, mx.array], temperature: float) -> Distribution:
        return softmax(arrays["logits"], temperature)

    def compare(
        self, divergence: Divergence, student: Distribution, teacher: Distribution
    ) -> tuple[mx.array, mx.array]:
        return divergence(student, teacher)
