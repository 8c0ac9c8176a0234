"""Reading logits: on the device where only the best token matters, on the host for everything else."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlxkd.decode.session import Array


def greedy(logits: Array, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Best tokens and their log-probabilities under the unmasked model.

    Args:
        logits: [B, q, V] of any backend and float type.
        allowed: bool[B, q, V] mask, or None.

    Returns:
        int64[B, q] and float64[B, q] (nats); of equal logits the smallest id wins.
    """
    if isinstance(logits, mx.array):
        values = logits.astype(mx.float32)
        candidates = values if allowed is None else mx.where(mx.array(allowed), values, -mx.inf)
        best = mx.argmax(candidates, axis=-1)
        chosen = mx.take_along_axis(values, best[..., None], axis=-1)[..., 0] - mx.logsumexp(values, axis=-1)
        mx.eval(best, chosen)
        return np.array(best, dtype=np.int64), np.array(chosen, dtype=np.float64)
    return _greedy_on_host(np.asarray(logits, dtype=np.float64), allowed)


def _greedy_on_host(values: np.ndarray, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    candidates = values if allowed is None else np.where(allowed, values, -np.inf)
    ids = candidates.argmax(axis=-1)
    top = values.max(axis=-1)
    lse = top + np.log(np.exp(values - top[..., None]).sum(axis=-1))
    return ids, np.take_along_axis(values, ids[..., None], axis=-1)[..., 0] - lse


def on_host(logits: Array, row: int, count: int) -> np.ndarray:
    """float64[count, V]: the first positions of one row."""
    part = logits[row, :count]
    if isinstance(part, mx.array):
        part = np.array(part.astype(mx.float32))
    return np.asarray(part, dtype=np.float64)
