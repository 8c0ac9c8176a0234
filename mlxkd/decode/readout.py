"""Reading logits: on the device where only the best token matters, on the host for everything else."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import mlx.core as mx
import numpy as np

from mlxkd.decode.requests import ActiveRow
from mlxkd.decode.sampling import Law, law, log_probability, point
from mlxkd.decode.session import Array
from mlxkd.decode.speculative import Draft

Masks = dict[int, list[np.ndarray | None]]
"""Per row the allowed tokens bool[V] at each draft position and after the last; None allows all."""


def greedy(logits: Array, allowed: np.ndarray | None = None) -> tuple[Array, Array]:
    """Best tokens and their log-probabilities under the unmasked model.

    Args:
        logits: [B, q, V] of any backend and float type.
        allowed: bool[B, q, V] mask, or None.

    Returns:
        int[B, q] and float[B, q] (nats), on the device and under way where the logits are; of equal logits the
        smallest id wins.
    """
    if isinstance(logits, mx.array):
        values = logits.astype(mx.float32)
        if allowed is None:
            best, score = mx.argmax(values, axis=-1), mx.max(values, axis=-1)
        else:
            best = mx.argmax(mx.where(mx.array(allowed), values, -mx.inf), axis=-1)
            score = mx.take_along_axis(values, best[..., None], axis=-1)[..., 0]
        logprob = score - mx.logsumexp(values, axis=-1)
        mx.async_eval(best, logprob)
        return best, logprob
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


class Reader:
    """The worker's laws of one round, each computed once, on the device where greedy allows it.

    Args:
        logits: float[B, q, V] of the forward.
        rows: the requests that took part.
        drafts: their proposals.
        masks: grammar masks; None without any.
    """

    def __init__(self, logits: Array, rows: Mapping[int, ActiveRow], drafts: Mapping[int, Draft], masks: Masks | None):
        self._logits, self._drafts, self._masks = logits, drafts, masks
        self._rows = dict(rows)
        self._greedy_rows = {row for row, active in rows.items() if active.greedy}
        self._host: dict[int, np.ndarray] = {}
        if self._greedy_rows:
            self.best_on_device, self._logprob_on_device = greedy(logits, self._stacked_masks())

    @cached_property
    def _best(self) -> list[list[int]]:
        return self.best_on_device.tolist()

    @cached_property
    def _best_logprob(self) -> list[list[float]]:
        return self._logprob_on_device.tolist()

    def law(self, row: int, position: int) -> Law:
        """The law after the first ``position`` drafts of a row."""
        if row in self._greedy_rows:
            return point(self._best[row][position])
        active = self._rows[row]
        sampling = active.options.sampling
        history = [*active.history, *self._drafts[row].tokens[:position]] if sampling.needs_history else ()
        allowed = self._masks[row][position] if self._masks else None
        return law(self._values(row)[position], sampling, history, allowed)

    def logprob(self, row: int, position: int, token: int) -> float:
        """The worker's own log-probability of a settled token."""
        if row in self._greedy_rows and self._best[row][position] == token:
            return self._best_logprob[row][position]
        return log_probability(self._values(row)[position], token)

    def _values(self, row: int) -> np.ndarray:
        if row not in self._host:
            self._host[row] = on_host(self._logits, row, 1 + len(self._drafts[row].tokens))
        return self._host[row]

    def _stacked_masks(self) -> np.ndarray | None:
        masks = self._masks
        if masks is None or all(mask is None for row in self._greedy_rows for mask in masks[row]):
            return None
        stacked = np.ones(self._logits.shape, dtype=bool)
        for row in self._greedy_rows:
            for position, mask in enumerate(masks[row]):
                if mask is not None:
                    stacked[row, position] = mask
        return stacked
