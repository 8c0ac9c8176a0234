"""What the layers of two models have in common: a matrix to look at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from mlxkd.errors import UserError


class _Watched:
    """A layer that remembers what it returned; everything else is the layer's own."""

    def __init__(self, layer: Any, seen: list[Any]):
        self._layer, self._seen = layer, seen

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        out = self._layer(*inputs, **options)
        self._seen.append(out)
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


@contextmanager
def _watching(model: Any) -> Iterator[list[Any]]:
    inner = getattr(model, "model", model)
    layers, seen = inner.layers, list[Any]()
    inner.layers = [_Watched(layer, seen) for layer in layers]
    try:
        yield seen
    finally:
        inner.layers = layers


def hidden_states(model: Any, tokens: np.ndarray) -> list[np.ndarray]:
    """Outputs of every layer on ``tokens`` int32 [B, S]: float32 [B, S, D] each, in order.

    Raises:
        UserError: the model's layers are not where mlx-lm's decoders have them.
    """
    import mlx.core as mx

    if not isinstance(getattr(getattr(model, "model", model), "layers", None), list):
        raise UserError("this model keeps its layers elsewhere than mlx-lm's decoders do")
    with _watching(model) as seen:
        model(mx.array(tokens))
    return [np.array((out[0] if isinstance(out, tuple) else out).astype(mx.float32)) for out in seen]


def layer_cosine(student: Any, teacher: Any, tokens: np.ndarray) -> np.ndarray:
    """Mean cosine over positions between every student layer (rows) and teacher layer (columns).

    Raises:
        UserError: hidden widths differ, so that there is no cosine.
    """
    ours, theirs = (hidden_states(model, tokens) for model in (student, teacher))
    if ours[0].shape[-1] != theirs[0].shape[-1]:
        raise UserError(f"hidden widths differ: {ours[0].shape[-1]} and {theirs[0].shape[-1]}")

    def unit(states: np.ndarray) -> np.ndarray:
        return states / np.maximum(np.linalg.norm(states, axis=-1, keepdims=True), 1e-12)

    return np.array([[float((unit(a) * unit(b)).sum(-1).mean()) for b in theirs] for a in ours])
