"""Rotary tables, masks and cache slots of a call: as inputs from the host, or from the position in the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ane.convert.architecture import Architecture, Layer
from ane.convert.constants import builder
from ane.convert.options import Options
from ane.runtime.kv import Cache

MASK_VALUE = -40000.0  # Apple's choice for float16: exp of it is zero, and sums with it stay finite

Tables = dict[int, tuple[Any, Any]]


def host_inputs(
    arch: Architecture, layers: tuple[Layer, ...], caches: list[Cache], options: Options, batch: int, query: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of the inputs that the host fills for each call."""
    for number in sorted({layer.rotary for layer in layers if layer.rotary is not None}):
        for name in ("cos", "sin"):
            yield f"{name}_{number}", (batch, 1, query, arch.head_dim)
    for cache in caches:
        keys = cache.slots + (query if options.kv == "explicit" else 0)
        yield f"mask_{cache.name}", (batch, 1, query, keys)
    if options.kv == "state":
        if any(cache.ring is None for cache in caches):
            yield "position", (batch,)
        if any(cache.ring is not None for cache in caches):
            yield "slot", (batch,)


def host_masks(
    arch: Architecture, layers: tuple[Layer, ...], caches: list[Cache], inputs: dict[str, Any]
) -> tuple[Tables, dict[str, Any], dict[str, list[Any]]]:
    """(rotary tables, masks, first slots) from the inputs of `host_inputs`."""
    numbers = {layer.rotary for layer in layers if layer.rotary is not None}
    tables = {number: (inputs[f"cos_{number}"], inputs[f"sin_{number}"]) for number in numbers}
    masks = {cache.name: inputs[f"mask_{cache.name}"] for cache in caches}
    rows = {name: _rows(inputs[name]) for name in ("position", "slot") if name in inputs}
    starts = {cache.name: rows.get("slot" if cache.ring else "position", []) for cache in caches}
    return tables, masks, starts


def _rows(vector: Any) -> list[Any]:
    """int32 [batch] to one [1] per row."""
    batch = vector.shape[0]
    if batch == 1:
        return [vector]
    return list(builder().split(x=vector, num_splits=batch, axis=0))


class ModelPositions:
    """The same from ``position``, int32 [batch]: each row's first new position."""

    def __init__(self, arch: Architecture, options: Options, batch: int, query: int, position: Any):
        self.mb, self.arch, self.options = builder(), arch, options
        self.batch, self.query, self.position = batch, query, position
        column = self.mb.reshape(x=position, shape=[batch, 1])
        self.positions = self.mb.add(x=column, y=np.arange(query, dtype=np.int32)[None])

    def tables(self, numbers: Iterable[int | None]) -> Tables:
        """Rows of the constant cos and sin tables, [batch, 1, tokens, head_dim]."""
        found: Tables = {}
        for number in sorted(n for n in numbers if n is not None):
            # A call at the end of the context pads beyond it.
            cos, sin = self.arch.rotaries[number].table(np.arange(self.options.tokens + self.query))
            found[number] = (self._rows_of(cos), self._rows_of(sin))
        return found

    def _rows_of(self, table: np.ndarray) -> Any:
        rows = self.mb.gather(x=table, indices=self.positions, axis=0, validate_indices=False)
        return self.mb.expand_dims(x=rows, axes=[1])

    def slots(self, cache: Cache) -> list[Any]:
        """First slot of each row."""
        if cache.ring is None:
            return _rows(self.position)
        return _rows(self.mb.mod(x=self.position, y=np.int32(cache.ring)))

    def mask(self, cache: Cache) -> Any:
        """Additive mask, the same that `ane.runtime.kv.mask` makes on the host."""
        mb = self.mb
        queries = mb.reshape(x=self.positions, shape=[self.batch, 1, self.query, 1])
        if self.options.kv == "state":
            return self._additive(self._seen(cache, queries, queries))
        last = mb.sub(x=mb.reshape(x=self.position, shape=[self.batch, 1, 1, 1]), y=np.int32(1))
        before = self._additive(self._seen(cache, queries, last))
        new = np.arange(self.query, dtype=np.int32)
        apart = new[:, None] - new[None, :]
        seen = (apart >= 0) & (apart < (cache.window or self.query))
        fixed = np.where(seen, 0.0, MASK_VALUE).astype(np.float16)[None, None]
        among = np.broadcast_to(fixed, (self.batch, 1, self.query, self.query)).copy()
        if before.shape[2] != self.query:
            before = mb.tile(x=before, reps=[1, 1, self.query, 1])
        return mb.concat(values=[before, among], axis=-1)

    def _seen(self, cache: Cache, queries: Any, last: Any) -> Any:
        """Which slots a query sees when ``last`` is the newest position written; bool."""
        mb = self.mb
        slots = np.arange(cache.slots, dtype=np.int32)[None, None, None]
        if cache.ring is None:
            seen = mb.less_equal(x=slots, y=last)
            held: Any = slots
        else:
            turns = np.int32(cache.ring * (cache.slots // cache.ring + 1))  # keeps the dividend positive
            back = mb.mod(x=mb.add(x=last, y=turns - slots), y=np.int32(cache.ring))
            held = mb.sub(x=last, y=back)
            seen = mb.greater_equal(x=held, y=np.int32(0))
            if cache.slots > cache.ring:
                seen = mb.logical_and(x=seen, y=slots < cache.ring)
        if cache.window is None:
            return seen
        recent = mb.greater(x=held, y=mb.sub(x=queries, y=np.int32(cache.window)))
        return mb.logical_and(x=seen, y=recent)

    def _additive(self, seen: Any) -> Any:
        """0 where seen, `MASK_VALUE` elsewhere; both sums are exact in float16."""
        mb = self.mb
        return mb.add(x=mb.mul(x=mb.cast(x=seen, dtype="fp16"), y=np.float16(-MASK_VALUE)), y=np.float16(MASK_VALUE))
