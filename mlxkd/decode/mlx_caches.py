"""Key-value caches for mlx-lm models whose rows have lengths of their own.

mlx-lm's batch cache pads on the left, so that taking tokens back from one row means rolling all of
them. Here every row writes at its own length and a mask hides what lies beyond: rewinding is a
change of one number, and stale keys are overwritten before they are ever read.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

GROWTH = 256
"""Tokens by which buffers grow."""


class Lengths:
    """How many tokens of each row are valid, and what follows from it; made once per forward for all layers.

    Args:
        valid: int[B].
    """

    def __init__(self, valid: np.ndarray):
        self.valid = valid.astype(np.int64)
        self.even = bool((self.valid == self.valid[0]).all())
        self.longest = int(self.valid.max())
        self._advanced: dict[int, Lengths] = {}
        self._targets: dict[tuple[int, ...], mx.array] = {}

    @cached_property
    def offset(self) -> int | mx.array:
        """Position of the next token: one int while all rows agree (the plain kernels), else int32[B]."""
        return int(self.valid[0]) if self.even else mx.array(self.valid.astype(np.int32))

    def advanced(self, n: int) -> Lengths:
        """After ``n`` more tokens in every row."""
        if n not in self._advanced:
            self._advanced[n] = Lengths(self.valid + n)
        return self._advanced[n]

    def targets(self, shape: tuple[int, ...]) -> mx.array:
        """int32 of ``shape`` [B, H, n, D]: where along the tokens each new element goes."""
        if shape not in self._targets:
            where = (self.valid[:, None] + np.arange(shape[2])).astype(np.int32)[:, None, :, None]
            self._targets[shape] = mx.array(np.broadcast_to(where, shape))
        return self._targets[shape]


class RowCache:
    """Keys and values of one attention layer for B rows; speaks mlx-lm's cache protocol.

    Args:
        rows: B.
        window: how many latest tokens a query sees; None for all. All tokens are kept, so that a
            sliding-window layer can rewind, which a wrapped ring cannot.
    """

    def __init__(self, rows: int, window: int | None = None):
        self.rows, self.window = rows, window
        self.keys: Any = None
        self.values: Any = None
        self.lengths = Lengths(np.zeros(rows))
        """Valid tokens of each row; the last rows of the buffers sit out a forward by having no length."""

    @property
    def offset(self) -> int | mx.array:
        """Position of the next token, see ``Lengths.offset``."""
        return self.lengths.offset

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """What ``n`` new queries may see: None, "causal" or bool[B or 1, 1, n, T]."""
        window = window_size or self.window
        total = self.lengths.longest + n
        if self.lengths.even and not return_array and (window is None or total <= window):
            return None if n == 1 else "causal"
        starts = self.lengths.valid[:1] if self.lengths.even else self.lengths.valid
        queries = (starts[:, None] + np.arange(n)).astype(np.int32)[:, None, :, None]
        keys = mx.arange(total)
        mask = mx.array(queries) >= keys
        return mask if window is None else mask & (keys > mx.array(queries - window))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Write [B, H, n, D] behind each row; returns keys and values up to the longest row."""
        n = keys.shape[2]
        self.keys = self._write(self.keys, self._encode(keys), n)
        self.values = self._write(self.values, self._encode(values), n)
        self.lengths = self.lengths.advanced(n)
        return self._fetch(self.keys), self._fetch(self.values)

    def arrays(self) -> list[mx.array]:
        """The buffers, for evaluation."""
        return [array for _, array in named_leaves((self.keys, self.values)) if array is not None]

    def read_row(self, row: int) -> dict[str, mx.array]:
        """Copies of the valid part of one row, [1, H, length, D] each, by name."""
        if self.keys is None:
            return {}
        length = int(self.lengths.valid[row])
        named = named_leaves({"keys": self.keys, "values": self.values})
        return {name: mx.contiguous(array[row : row + 1, :, :length]) for name, array in named}

    def write_row(self, row: int, arrays: dict[str, mx.array], length: int) -> None:
        """Replace one row by what ``read_row`` returned; the arrays are shared, never changed."""
        lengths = self.lengths.valid.copy()
        lengths[row] = length
        self.lengths = Lengths(lengths)
        if not arrays:
            return
        for name in ("keys", "values"):
            setattr(self, name, self._place(getattr(self, name), _nested(arrays, name), row))

    def _place(self, buffer: Any, part: Any, row: int) -> Any:
        if self.rows == 1:
            return tree_map(lambda a: a[...], part)  # a new array object over the same memory
        room = -(-(self.lengths.longest + 1) // GROWTH) * GROWTH
        if buffer is None:
            buffer = tree_map(lambda a: mx.zeros((self.rows, a.shape[1], room, a.shape[3]), a.dtype), part)
        buffer = tree_map(lambda a: _grow(a, room), buffer)

        def put(a: mx.array, b: mx.array) -> mx.array:
            a[row : row + 1, :, : b.shape[2]] = b
            return a

        return tree_map(put, buffer, part)

    def _encode(self, x: mx.array) -> Any:
        return x

    def _write(self, buffer: Any, new: Any, n: int) -> Any:
        total = self.lengths.longest + n
        room = -(-total // GROWTH) * GROWTH
        if buffer is None:
            buffer = tree_map(lambda a: mx.zeros((self.rows, a.shape[1], room, a.shape[3]), a.dtype), new)
        buffer = tree_map(lambda a: _grow(a, room) if a.shape[2] < total else a, buffer)
        return tree_map(self._put_even if self.lengths.even else self._put_ragged, buffer, new)

    def _put_even(self, buffer: mx.array, new: mx.array) -> mx.array:
        start = self.lengths.longest
        buffer[: len(self.lengths.valid), :, start : start + new.shape[2]] = new
        return buffer

    def _put_ragged(self, buffer: mx.array, new: mx.array) -> mx.array:
        if len(self.lengths.valid) == self.rows:
            return mx.put_along_axis(buffer, self.lengths.targets(new.shape), new, axis=2)
        for row, start in enumerate(self.lengths.valid.tolist()):  # a scatter would copy the rows that sit out
            buffer[row : row + 1, :, start : start + new.shape[2]] = new[row : row + 1]
        return buffer

    def _fetch(self, buffer: Any) -> Any:
        total, active = self.lengths.longest, len(self.lengths.valid)
        return tree_map(lambda a: a[:active, :, :total], buffer)

    def single(self, row: int) -> RowCache:
        """A cache of one row that continues this one; ``write_row`` brings it back."""
        other = self._like(1)
        other.write_row(0, self.read_row(row), int(self.lengths.valid[row]))
        return other

    def _like(self, rows: int) -> RowCache:
        return RowCache(rows, self.window)


class QuantizedRowCache(RowCache):
    """A ``RowCache`` that stores affine codes; mlx-lm's attention recognises it by ``bits``."""

    def __init__(self, rows: int, window: int | None, group_size: int, bits: int):
        super().__init__(rows, window)
        self.group_size, self.bits = group_size, bits

    def _like(self, rows: int) -> RowCache:
        return QuantizedRowCache(rows, self.window, self.group_size, self.bits)

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
