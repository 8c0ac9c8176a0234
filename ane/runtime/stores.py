"""The keys and values of a session, per package: in Core ML states, or in arrays that the host hands in."""

from __future__ import annotations

from typing import Any

import numpy as np

from ane.convert.bundle import Package
from ane.runtime.kv import Cache


def by_row(cache: Cache, packed: np.ndarray, batch: int) -> np.ndarray:
    """View [layers, batch, 2, kv_heads, tokens, width] of a packed array; axis 2 is keys, values."""
    return packed.reshape(cache.layers, batch, 2, *packed.shape[1:])


class StateStore:
    """Caches inside Core ML states; the runner owns the arrays."""

    def __init__(self, runner: Any, package: Package, batch: int, function: str):
        self.runner, self.package, self.batch = runner, package, batch
        self.state = runner.make_state(function) if package.caches else None

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """Cache inputs of the next call: none."""
        return {}

    def accept(self, outputs: dict[str, np.ndarray], starts: np.ndarray, counts: np.ndarray) -> None:
        """Take the results of a call: the program wrote them itself."""

    def read(self, cache: Cache, row: int) -> np.ndarray:
        """A row's part of a cache, a copy [layers, 2, kv_heads, slots, width]."""
        packed = self.runner.read_state(self.state, self._name(cache))
        return by_row(cache, packed, self.batch)[:, row].copy()

    def write(self, cache: Cache, row: int, value: np.ndarray) -> None:
        """Put ``value`` [layers, 2, kv_heads, tokens, width] into a row's first slots."""
        packed = self.runner.read_state(self.state, self._name(cache))
        by_row(cache, packed, self.batch)[:, row, ..., : value.shape[-2], :] = value
        self.runner.write_state(self.state, self._name(cache), packed)

    def _name(self, cache: Cache) -> str:
        return f"{cache.name}_b{self.batch}"


class ExplicitStore:
    """Caches as the host's own arrays: read-only inputs, new keys and values as outputs."""

    state = None

    def __init__(self, package: Package, batch: int):
        self.package, self.batch = package, batch
        self.arrays = {f"{c.name}_b{batch}": np.zeros(c.shape(batch), np.float16) for c in package.caches}

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """Cache inputs of the next call."""
        return self.arrays

    def accept(self, outputs: dict[str, np.ndarray], starts: np.ndarray, counts: np.ndarray) -> None:
        """Write each row's first ``counts`` new tokens into its slots."""
        for cache in self.package.caches:
            name = f"{cache.name}_b{self.batch}"
            old = by_row(cache, self.arrays[name], self.batch)
            new = by_row(cache, outputs[f"new_{name}"], self.batch)
            for row in range(self.batch):
                count = int(counts[row])
                slots = cache.slot(starts[row] + np.arange(count))
                old[:, row][..., slots, :] = new[:, row][..., :count, :]

    def read(self, cache: Cache, row: int) -> np.ndarray:
        """As `StateStore.read`."""
        return by_row(cache, self.arrays[f"{cache.name}_b{self.batch}"], self.batch)[:, row].copy()

    def write(self, cache: Cache, row: int, value: np.ndarray) -> None:
        """As `StateStore.write`."""
        by_row(cache, self.arrays[f"{cache.name}_b{self.batch}"], self.batch)[:, row, ..., : value.shape[-2], :] = value
