"""Where keys and values of a row lie, and which of them a query may see: host-side arithmetic, no Core ML.

A chunk holds at most two caches: one for layers that see everything, one for layers with a sliding window.
Each packs its layers' keys and values into one array [2 * layers * batch, kv_heads, slots, width]; index
(layer * batch + row) * 2 is the row's keys, the next its values. The token at position p lies in slot p, or in
slot p % ring where the cache is a ring.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

ALIGNMENT = 32  # states on the Neural Engine want their last two axes in multiples of this (coremltools #2631)


def aligned(n: int) -> int:
    """The next multiple of 32."""
    return -(-n // ALIGNMENT) * ALIGNMENT


class Cache(BaseModel):
    """One packed cache of a chunk.

    Args:
        name: name of the state or input, without the batch suffix.
        layers: how many layers it holds.
        head_dim: used part of the last axis, whose size is ``width``.
        slots: size of the token axis, whose first ``ring`` (all, where None) are used.
        window: tokens a query sees, itself included; None for all.
        ring: modulus of a ring buffer; slots behind it take the padding of calls that end at the ring's edge.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    width: int
    slots: int
    window: int | None = None
    ring: int | None = None

    def shape(self, batch: int) -> tuple[int, int, int, int]:
        """Shape of the packed array."""
        return (2 * self.layers * batch, self.kv_heads, self.slots, self.width)

    def new_shape(self, batch: int, query: int) -> tuple[int, int, int, int]:
        """Shape of one call's new keys and values in the explicit layout."""
        return (2 * self.layers * batch, self.kv_heads, query, self.width)

    def slot(self, positions: np.ndarray) -> np.ndarray:
        """Slots of positions."""
        return positions % self.ring if self.ring else positions

    def span(self, start: int) -> int:
        """How many tokens from position ``start`` on lie in successive slots."""
        return self.ring - start % self.ring if self.ring else self.slots - start

    def oldest_needed(self, length: int) -> int:
        """First position that the next query of a row of this length sees."""
        return 0 if self.window is None else max(0, length - self.window + 1)

    def intact(self, length: int, written: int) -> bool:
        """Whether a row cut to ``length`` still has all it needs after slots up to ``written`` were written."""
        needed = self.oldest_needed(length)
        return self.ring is None or needed >= length or needed + self.ring >= written

    def held(self, last: np.ndarray) -> np.ndarray:
        """Position in each slot when ``last`` [...] is the newest one to look at; -1 for none. [..., slots]."""
        slots = np.arange(self.slots)
        if self.ring is None:
            return np.where(slots <= last[..., None], slots, -1)
        newest = last[..., None] - (last[..., None] - slots) % self.ring
        return np.where((slots < self.ring) & (newest >= 0), newest, -1)

    def visible(self, queries: np.ndarray, held: np.ndarray) -> np.ndarray:
        """Which held positions [..., slots] each query position [...] sees; bool [..., slots]."""
        seen = (held >= 0) & (held <= queries[..., None])
        return seen if self.window is None else seen & (held > queries[..., None] - self.window)


def mask(
    cache: Cache, layout: Literal["state", "explicit"], starts: np.ndarray, query: int, value: float
) -> np.ndarray:
    """Additive mask of one call, float16 [B, 1, query, keys].

    Args:
        starts: int64[B], position of each row's first new token.
        value: what hidden keys get.

    In the state layout the keys are the cache's slots, new tokens written. In the explicit layout they are the
    slots before the call, then the new tokens themselves.
    """
    queries = starts[:, None] + np.arange(query)
    if layout == "state":
        seen = cache.visible(queries, cache.held(queries))
    else:
        before = cache.held(np.broadcast_to(starts[:, None] - 1, queries.shape))
        new = np.broadcast_to(queries[:, None, :], (len(starts), query, query))
        seen = np.concatenate([cache.visible(queries, before), cache.visible(queries, new)], axis=-1)
    return np.where(seen, 0.0, value).astype(np.float16)[:, None]
