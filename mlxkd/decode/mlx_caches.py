"""Key-value caches for mlx-lm models whose rows have lengths of their own.

mlx-lm's batch cache pads on the left, so that taking tokens back from one row means rolling all of
them. Here every row writes at its own length and a mask hides what lies beyond: rewinding is a
change of one number, and stale keys are overwritten before they are ever read.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

GROWTH = 256
"""Tokens by which buffers grow."""


class RowCache:
    """Keys and values of one attention layer for B rows; speaks mlx-lm's cache protocol.

    Args:
        rows: B.
        window: how many latest tokens a query sees; None for all. All tokens are kept, so that a
            sliding-window layer can rewind, which a wrapped ring cannot.
    """

    def __init__(self, rows: int, window: int | None = None):
        self.window = window
        self.keys: Any = None
        self.values: Any = None
        self.lengths = np.zeros(rows, dtype=np.int64)
        self._visible: mx.array | None = None

    @property
    def offset(self) -> int | mx.array:
        """Position of the next token: one int while all rows agree (the plain kernels), else int32[B]."""
        first = int(self.lengths[0])
        return first if (self.lengths == first).all() else mx.array(self.lengths.astype(np.int32))

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """What ``n`` new queries may see: None, "causal" or bool[B or 1, 1, n, T]."""
        window = window_size or self.window
        total = int(self.lengths.max()) + n
        even = bool((self.lengths == self.lengths[0]).all())
        if even and not return_array and (window is None or total <= window):
            return None if n == 1 else "causal"
        starts = mx.array((self.lengths[:1] if even else self.lengths).astype(np.int32))
        queries = starts[:, None] + mx.arange(n)[None]
        distance = queries[:, None, :, None] - mx.arange(total)[None, None, None]
        mask = distance >= 0
        return mask if window is None else mask & (distance < window)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Write [B, H, n, D] behind each row; returns keys and values up to the longest row."""
        n = keys.shape[2]
        self.keys = self._write(self.keys, self._encode(keys), n)
        self.values = self._write(self.values, self._encode(values), n)
        self.lengths = self.lengths + n
        return self._fetch(self.keys), self._fetch(self.values)

    def set_lengths(self, lengths: np.ndarray) -> None:
        """Declare how many tokens of each row are valid."""
        self.lengths = lengths.astype(np.int64)

    def arrays(self) -> list[mx.array]:
        """The buffers, for evaluation."""
        return [array for _, array in named_leaves((self.keys, self.values)) if array is not None]

    def read_row(self, row: int) -> dict[str, mx.array]:
        """Copies of the valid part of one row, [1, H, length, D] each, by name."""
        if self.keys is None:
            return {}
        length = int(self.lengths[row])
        named = named_leaves({"keys": self.keys, "values": self.values})
        return {name: mx.contiguous(array[row : row + 1, :, :length]) for name, array in named}

    def write_row(self, row: int, arrays: dict[str, mx.array], length: int) -> None:
        """Replace one row by what ``read_row`` returned; the arrays are shared, never changed."""
        self.lengths = self.lengths.copy()
        self.lengths[row] = length
        if not arrays:
            return
        for name in ("keys", "values"):
            setattr(self, name, self._place(getattr(self, name), _nested(arrays, name), row))

    def _place(self, buffer: Any, part: Any, row: int) -> Any:
        if len(self.lengths) == 1:
            return tree_map(lambda a: a[...], part)  # a new array object over the same memory
        room = -(-int(self.lengths.max() + 1) // GROWTH) * GROWTH
        if buffer is None:
            buffer = tree_map(lambda a: mx.zeros((len(self.lengths), a.shape[1], room, a.shape[3]), a.dtype), part)
        buffer = tree_map(lambda a: _grow(a, room), buffer)

        def put(a: mx.array, b: mx.array) -> mx.array:
            a[row : row + 1, :, : b.shape[2]] = b
            return a

        return tree_map(put, buffer, part)

    def _encode(self, x: mx.array) -> Any:
        return x

    def _write(self, buffer: Any, new: Any, n: int) -> Any:
        total = int(self.lengths.max()) + n
        room = -(-total // GROWTH) * GROWTH
        if buffer is None:
            buffer = tree_map(lambda a: mx.zeros((*a.shape[:2], room, a.shape[3]), a.dtype), new)
        buffer = tree_map(lambda a: _grow(a, room) if a.shape[2] < total else a, buffer)
        start = int(self.lengths[0])
        if (self.lengths == start).all():

            def put(a: mx.array, b: mx.array) -> mx.array:
                a[..., start : start + n, :] = b
                return a

            return tree_map(put, buffer, new)
        where = mx.array((self.lengths[:, None] + np.arange(n)).astype(np.int32))[:, None, :, None]
        return tree_map(lambda a, b: mx.put_along_axis(a, mx.broadcast_to(where, b.shape), b, axis=2), buffer, new)

    def _fetch(self, buffer: Any) -> Any:
        total = int(self.lengths.max())
        return tree_map(lambda a: a[:, :, :total], buffer)


class QuantizedRowCache(RowCache):
    """A ``RowCache`` that stores affine codes; mlx-lm's attention recognises it by ``bits``."""

    def __init__(self, rows: int, window: int | None, group_size: int, bits: int):
        super().__init__(rows, window)
        self.group_size, self.bits = group_size, bits

    def _encode(self, x: mx.array) -> Any:
        return mx.quantize(x, group_size=self.group_size, bits=self.bits)


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Leaves of nested lists, tuples and dictionaries with their dotted paths; None is a leaf too."""
    leaves: Any = tree_flatten(tree, is_leaf=lambda value: not isinstance(value, list | tuple | dict))
    return [(str(name), value) for name, value in leaves]


def _grow(array: mx.array, room: int) -> mx.array:
    """At least ``room`` tokens; grown by concatenation, so that the old array stays as it was."""
    missing = room - array.shape[2]
    if missing <= 0:
        return array
    return mx.concatenate([array, mx.zeros((*array.shape[:2], missing, array.shape[3]), array.dtype)], axis=2)


def _nested(arrays: dict[str, mx.array], name: str) -> Any:
    """The array called ``name``, or the tuple of ``name.0``, ``name.1``, ... (codes, scales, biases)."""
    if name in arrays:
        return arrays[name]
    return tuple(arrays[key] for key in sorted(arrays) if key.startswith(f"{name}."))
