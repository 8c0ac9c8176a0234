"""What quantisation does inside a model: hidden states and attention, float against quantised, on fixed tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxkd.quant.pack import clone


class _Recorder:
    """Stands for a layer of a clone and notes what goes in or comes out; everything else is the layer's own."""

    def __init__(self, inner: nn.Module, inputs: list[mx.array], outputs: list[mx.array]):
        self._inner, self._inputs, self._outputs = inner, inputs, outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        self._inputs.append(x)
        result = self._inner(x, *args, **kwargs)
        self._outputs.append(result[0] if isinstance(result, tuple) else result)
        return result


@dataclass(frozen=True)
class Trace:
    """What one model does on the probe tokens.

    Args:
        hidden: output of each layer, float32 [batch, positions, width].
        entropy: mean attention entropy of each layer in nats; None where the attention cannot be recomputed.
        logits: float32 [batch, positions, vocabulary].
    """

    hidden: tuple[mx.array, ...]
    entropy: tuple[float | None, ...]
    logits: mx.array


def trace(model: nn.Module, tokens: mx.array) -> Trace:
    """Run a model of mlx-lm's on tokens int [batch, positions] and keep what happens in every layer.

    Works on a clone, so neither the model nor its class is touched.
    """
    twin = clone(model)
    layers = twin.layers
    originals, inputs = list(layers), []
    outputs: list[mx.array] = []
    for i, layer in enumerate(originals):
        seen: list[mx.array] = []
        if "self_attn" in layer:
            attention = layer.self_attn
            layer.self_attn = _Recorder(attention, seen, [])
            inputs.append((attention, seen))
        else:
            inputs.append((None, seen))
        layers[i] = _Recorder(layer, [], outputs)
    logits = twin(tokens).astype(mx.float32)
    hidden = tuple(x.astype(mx.float32) for x in outputs)
    entropy = [_entropy(attention, seen[0]) if seen else None for attention, seen in inputs]
    mx.eval(hidden, logits, [e for e in entropy if e is not None])
    return Trace(hidden, tuple(None if e is None else float(e) for e in entropy), logits)


def _entropy(attention: Any, x: mx.array) -> mx.array | None:
    """Mean entropy of causal attention, recomputed from the layer's own projections; None for unusual ones."""
    heads = getattr(attention, "n_heads", None)
    groups = getattr(attention, "n_kv_heads", heads)
    if heads is None or any(name not in attention for name in ("q_proj", "k_proj", "rope")):
        return None
    batch, length, _ = x.shape
    q = attention.q_proj(x).reshape(batch, length, heads, -1)
    k = attention.k_proj(x).reshape(batch, length, groups, -1)
    q, k = (attention[n](v) if n in attention else v for n, v in (("q_norm", q), ("k_norm", k)))
    q, k = (attention.rope(v.transpose(0, 2, 1, 3)).astype(mx.float32) for v in (q, k))
    scores = getattr(attention, "scale", q.shape[-1] ** -0.5) * q @ mx.repeat(k, heads // groups, 1).swapaxes(-1, -2)
    causal = mx.array(np.tril(np.ones((length, length), bool)))
    logs = nn.log_softmax(mx.where(causal, scores, -1e9), axis=-1)
    return mx.mean(-mx.sum(mx.where(causal, mx.exp(logs) * logs, 0.0), axis=-1))


def cosine(a: mx.array, b: mx.array) -> float:
    """Mean cosine similarity over positions of two [batch, positions, width] arrays; NaN where either is not finite."""
    norms = mx.maximum(mx.linalg.norm(a, axis=-1) * mx.linalg.norm(b, axis=-1), 1e-30)
    return float(mx.mean(mx.sum(a * b, axis=-1) / norms))


def relative_error(a: mx.array, b: mx.array) -> float:
    """|b - a| / |a| over the whole array (Frobenius)."""
    return float(mx.sqrt(mx.sum(mx.square(b - a)) / mx.maximum(mx.sum(mx.square(a)), 1e-30)))
