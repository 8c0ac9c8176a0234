"""Key-value caches for mlx-lm models whose rows have lengths of their own.

mlx-lm's batch cache pads on the left, so that taking tokens back from one row means rolling all of
them. Here every row writes at its own length and a mask hides what lies beyond: rewinding is a
change of one number, and stale keys are overwritten before they are ever read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

GROWTH = 256
"""Tokens by which buffers grow."""


class Lengths:
    """The tokens of neighbouring rows and what follows from them; made once per forward for all layers.

    Args:
        valid: int64[n], valid tokens of each row.
        first: the buffers' row that ``valid`` begins with; rows around these sit out a forward.
    """

    def __init__(self, valid: np.ndarray, first: int = 0):
        self.valid, self.first = valid, first
        shortest, self.longest = int(valid.min()), int(valid.max())
        self.even = shortest == self.longest
        self._advanced: dict[int, Lengths] = {}
        self._targets: dict[tuple[int, ...], mx.array] = {}

    @property
    def rows(self) -> slice:
        """The rows within the buffers."""
        return slice(self.first, self.first + len(self.valid))

    @cached_property
    def offset(self) -> int | mx.array:
        """Position of the next token: one int while all rows agree (the plain kernels), else int32[n]."""
        return self.longest if self.even else mx.array(self.valid.astype(np.int32))

    def advanced(self, n: int) -> Lengths:
        """After ``n`` more tokens in every row."""
        if n not in self._advanced:
            self._advanced[n] = Lengths(self.valid + n, self.first)
        return self._advanced[n]

    def targets(self, shape: tuple[int, ...]) -> mx.array:
        """int32 of ``shape`` [n, H, q, D]: where along the tokens each new element goes."""
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
        grouped: the model masks scores [n, H, heads per H, q, T], one axis more than elsewhere.
    """

    def __init__(self, rows: int, window: int | None = None, *, grouped: bool = False):
        self.rows, self.window, self.grouped = rows, window, grouped
        self.keys: Any = None
        self.values: Any = None
        self.lengths = Lengths(np.zeros(rows, dtype=np.int64))
        """Valid tokens of the rows that take part in the next forward."""

    @property
    def offset(self) -> int | mx.array:
        """Position of the next token, see ``Lengths.offset``."""
        return self.lengths.offset

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """What ``n`` new queries may see: None, "causal" or bool[rows or 1, 1, n, T] (grouped: [.., 1, 1, n, T])."""
        window = window_size or self.window
        total = self.lengths.longest + n
        if self.lengths.even and not return_array and (window is None or total <= window):
            return None if n == 1 else "causal"
        starts = self.lengths.valid[:1] if self.lengths.even else self.lengths.valid
        heads = (1, 1) if self.grouped else (1,)
        queries = (starts[:, None] + np.arange(n)).astype(np.int32).reshape(-1, *heads, n, 1)
        keys = mx.arange(total)
        mask = mx.array(queries) >= keys
        return mask if window is None else mask & (keys > mx.array(queries - window))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Write [rows, H, n, D] behind each row; returns keys and values up to the longest row."""
        n = keys.shape[2]
        self.keys = _each(self._written, self._encode(keys), self.keys)
        self.values = _each(self._written, self._encode(values), self.values)
        rows, total = self.lengths.rows, self.lengths.longest + n
        self.lengths = self.lengths.advanced(n)

        def seen(buffer: mx.array) -> mx.array:
            return buffer[rows, :, :total]

        return _each(seen, self.keys), _each(seen, self.values)

    def arrays(self) -> list[mx.array]:
        """The buffers, for evaluation."""
        return [array for _, array in named_leaves((self.keys, self.values)) if array is not None]

    def read_row(self, row: int, length: int) -> dict[str, mx.array]:
        """Copies of the first ``length`` tokens of one row, [1, H, length, D] each, by name."""
        if self.keys is None:
            return {}
        named = named_leaves({"keys": self.keys, "values": self.values})
        return {name: mx.contiguous(array[row : row + 1, :, :length]) for name, array in named}

    def write_row(self, row: int, arrays: dict[str, mx.array]) -> None:
        """Replace one row by what ``read_row`` returned; the arrays themselves never change."""
        for name in ("keys", "values") if arrays else ():
            part = _nested(arrays, name)
            setattr(self, name, _each(lambda new, old: self._placed(new, old, row), part, getattr(self, name)))

    def _placed(self, new: mx.array, buffer: mx.array | None, row: int) -> mx.array:
        buffer = self._with_room(buffer, new, new.shape[2] + 1)
        buffer[row : row + 1, :, : new.shape[2]] = new
        return buffer

    def _encode(self, x: mx.array) -> Any:
        return x

    def _written(self, new: mx.array, buffer: mx.array | None) -> mx.array:
        lengths, n = self.lengths, new.shape[2]
        buffer = self._with_room(buffer, new, lengths.longest + n)
        if lengths.even:
            buffer[lengths.rows, :, lengths.longest : lengths.longest + n] = new
        elif len(lengths.valid) == self.rows:
            buffer = mx.put_along_axis(buffer, lengths.targets(new.shape), new, axis=2)
        else:  # a scatter into a part of the rows would copy that part
            for i, start in enumerate(lengths.valid.tolist()):
                row = lengths.first + i
                buffer[row : row + 1, :, start : start + n] = new[i : i + 1]
        return buffer

    def _with_room(self, buffer: mx.array | None, like: mx.array, tokens: int) -> mx.array:
        """At least ``tokens`` per row; grown by concatenation, so that the old array stays as it was."""
        held = 0 if buffer is None else buffer.shape[2]
        if held >= tokens and buffer is not None:
            return buffer
        _, heads, _, size = like.shape
        more = mx.zeros((self.rows, heads, -(-tokens // GROWTH) * GROWTH - held, size), like.dtype)
        return more if buffer is None else mx.concatenate([buffer, more], axis=2)


class QuantizedRowCache(RowCache):
    """A ``RowCache`` that stores affine codes; mlx-lm's attention recognises it by ``bits``."""

    def __init__(self, rows: int, window: int | None, group_size: int, bits: int, *, grouped: bool = False):
        super().__init__(rows, window, grouped=grouped)
        self.group_size, self.bits = group_size, bits

    def _encode(self, x: mx.array) -> Any:
        return tuple(mx.quantize(x, group_size=self.group_size, bits=self.bits))


def _each(function: Callable[..., mx.array], tree: Any, *others: Any) -> Any:
    """``function`` on arrays, or on the members of tuples (codes, scales, biases); None stands for a tuple of None.

    Plain instead of a tree map: it runs for every layer at every token.
    """
    if not isinstance(tree, tuple):
        return function(tree, *others)
    beside = [(None,) * len(tree) if other is None else other for other in others]
    return tuple(function(*parts) for parts in zip(tree, *beside, strict=True))


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Leaves of nested lists, tuples and dictionaries with their dotted paths; None is a leaf too."""
    leaves: Any = tree_flatten(tree, is_leaf=lambda value: not isinstance(value, list | tuple | dict))
    return [(str(name), value) for name, value in leaves]


def _nested(arrays: dict[str, mx.array], name: str) -> Any:
    """The array called ``name``, or the tuple of ``name.0``, ``name.1``, ... (codes, scales, biases)."""
    if name in arrays:
        return arrays[name]
    return tuple(arrays[key] for key in sorted(arrays) if key.startswith(f"{name}."))
