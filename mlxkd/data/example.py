"""One training example: tokens, a loss weight for each, and what the tokens are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

RANGES = ("turns", "calls")  # of the meta data: token ranges, or None where there is none


@dataclass(frozen=True)
class Span:
    """Tokens ``[start, end)`` of one kind ("name", "key", "value", "structure", "evidence", "end", ...).

    A token that crosses the border of a span belongs to it; spans may therefore share a token.
    """

    start: int
    end: int
    kind: str


@dataclass(frozen=True)
class Example:
    """A rendered record.

    Args:
        tokens: int32 [n].
        weights: float32 [n]; ``weights[i]`` is the loss weight of PREDICTING ``tokens[i]`` (0 for context).
            ``weights[0]`` is 0: nothing predicts the first token. Shifting happens once, in ``Batches``.
        spans: token spans, ordered by start.
        source: where the record came from, "file:line".
        meta: what else the losses need (turn borders, whether a tool should be called, ...). Ranges count from the
            first token; in a piece of a longer example they may reach beyond it on either side.
    """

    tokens: np.ndarray
    weights: np.ndarray
    spans: tuple[Span, ...] = ()
    source: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.tokens.shape != self.weights.shape or self.tokens.ndim != 1:
            raise ValueError(f"tokens {self.tokens.shape} and weights {self.weights.shape} must be equal vectors")
        if len(self.weights) and self.weights[0] != 0:
            raise ValueError("weights[0] must be 0: nothing predicts the first token")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def supervised(self) -> int:
        """Number of tokens that carry loss."""
        return int(np.count_nonzero(self.weights))


def windows(example: Example, length: int) -> list[Example]:
    """Split a long example so that every token but the first is still predicted exactly once.

    Args:
        example: any length.
        length: positions per piece; a piece has at most ``length + 1`` tokens and starts with the last
            token of the piece before.

    Spans are cut at the borders of a piece. The ranges of turns and calls are moved, not cut: the whole turn's length
    still counts where only a part of it is here.
    """
    if len(example) <= length + 1:
        return [example]
    return [_piece(example, start, start + length + 1) for start in range(0, len(example) - 1, length)]


def _piece(example: Example, start: int, stop: int) -> Example:
    weights = example.weights[start:stop].copy()
    weights[0] = 0.0
    spans = tuple(
        Span(max(s.start, start) - start, min(s.end, stop) - start, s.kind)
        for s in example.spans
        if s.start < stop and s.end > start
    )
    ranges = {name: [_moved(r, start) for r in example.meta[name]] for name in RANGES if name in example.meta}
    return Example(example.tokens[start:stop].copy(), weights, spans, example.source, {**example.meta, **ranges})


def _moved(where: tuple[int, int] | None, start: int) -> tuple[int, int] | None:
    return None if where is None else (where[0] - start, where[1] - start)
