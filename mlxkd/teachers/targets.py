"""What a teacher says about the supervised positions of a batch. Losses see these, never the teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxkd.errors import UserError, unknown
from mlxkd.losses.forms import Dense, Form
from mlxkd.losses.sparse import Bucket, Renormalised, Sampled


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
        logits = self.head(self.hidden[start:stop])[:, : self.vocabulary]
        return {"logits": logits} | _weights(self.weights, slice(start, stop))


@dataclass(frozen=True)
class SparseTargets:
    """A few ids per position, from a cache or a server.

    Args:
        ids: int32 [N, K].
        logprobs: [N, K], log-probabilities at temperature 1 (draws: logarithms of their weights).
        tails: [N, T], log of the mass beyond the ids at each temperature.
        temperatures: those of ``tails``.
        vocabulary: number of token ids the teacher spoke about.
        kind: "bucket", "renormalised" or "sampled".
        weights: float32 [N] or None; how much this teacher counts at each position.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    tails: np.ndarray
    temperatures: tuple[float, ...]
    vocabulary: int
    kind: str = "bucket"
    weights: np.ndarray | None = None

    @property
    def count(self) -> int:
        return len(self.ids)

    @property
    def form(self) -> Form:
        if self.kind not in FORMS:
            raise unknown("form of sparse targets", self.kind, FORMS)
        return Bucket(self.temperatures) if self.kind == "bucket" else FORMS[self.kind]()

    def check(self, temperatures: Sequence[float]) -> None:
        """Raises UserError for a temperature whose tail was not stored: it cannot be computed from another's."""
        missing = [t for t in temperatures if t not in self.temperatures]
        if missing and self.kind != "renormalised":
            raise UserError(
                f"temperature {missing[0]:g} is not in the teacher cache, which holds "
                + ", ".join(f"{t:g}" for t in self.temperatures),
                where="loss",
                hint=f"run `mlxkd teach` with --temperature {missing[0]:g} into another folder",
            )

    def chunk(self, start: int, stop: int) -> dict[str, mx.array]:
        part = slice(start, stop)
        arrays = {"ids": mx.array(self.ids[part]), "logprobs": mx.array(self.logprobs[part])}
        return arrays | {"tail": mx.array(self.tails[part])} | _weights(self.weights, part)


FORMS: dict[str, Callable[..., Form]] = {"bucket": Bucket, "renormalised": Renormalised, "sampled": Sampled}


def _weights(weights: np.ndarray | None, part: slice) -> dict[str, mx.array]:
    return {} if weights is None else {"weights": mx.array(weights[part], dtype=mx.float32)}
