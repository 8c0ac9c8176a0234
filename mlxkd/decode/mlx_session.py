"""A session on any mlx-lm model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlxkd import compat
from mlxkd.decode.mlx_caches import Lengths, QuantizedRowCache, RowCache, named_leaves
from mlxkd.decode.session import Counts, Snapshot, check_counts, check_extend, check_restore, check_rewind
from mlxkd.errors import UserError

UNBOUNDED = 1 << 30
CONTEXT_KEYS = ("max_position_embeddings", "max_sequence_length", "n_positions", "n_ctx", "seq_length")


class MlxSession:
    """mlx-lm's model with caches of B ragged rows.

    Models whose layers all attend share one batched cache and can rewind. Recurrent layers, chunked
    caches and rings with kept tokens stay as mlx-lm has them: their rows run one after the other and
    ``can_rewind`` is False.

    Args:
        model: an mlx-lm model.
        config: its config.json, for the context length.
        batch_size: rows.
        max_context: tokens per row; default from the config.
        kv_bits, kv_group_size: store keys and values as affine codes (8 or 4 bits, groups along the head).

    Raises:
        UserError: quantised keys and values that this model's head size or cache kind does not allow, or a model
            whose attention cannot take the masks of ragged rows.
    """

    query_sizes: tuple[int, ...] | None = None
    computes_all_rows = False

    def __init__(
        self,
        model: nn.Module,
        config: dict[str, Any] | None = None,
        *,
        batch_size: int = 1,
        max_context: int | None = None,
        kv_bits: int | None = None,
        kv_group_size: int = 64,
    ):
        self.model, self.batch_size = model, batch_size
        # One row on a CPU loses by running ahead: 1.7 ms per step became 2.1 on a model of 260 thousand parameters.
        self.takes_device_tokens = batch_size > 1 or mx.default_device() != mx.cpu
        self._quantized = (kv_group_size, kv_bits) if kv_bits else None
        self.max_context = max_context or _context_of(config or vars(getattr(model, "args", object())))
        self.can_rewind = all(self._converted(cache, 1) is not None for cache in compat.new_cache(model))
        if kv_bits and not self.can_rewind:
            raise UserError("keys and values of this model cannot be quantised: not all its layers attend")
        self._lanes = [self._fresh_lane() for _ in range(1 if self.can_rewind else batch_size)]
        self._lengths = np.zeros(batch_size, dtype=np.int64)
        self.vocab_size = self._probe_vocabulary()
        self._kinds = ",".join(type(leaf).__name__ for leaf in _leaves(self._lanes[0]))

    @classmethod
    def from_folder(cls, name: str | Path, **options: Any) -> MlxSession:
        """A session on a model folder or Hugging Face repository; options as in the constructor."""
        model, config = compat.load_model(compat.resolve_model(name))
        return cls(model, config, **options)

    @property
    def lengths(self) -> np.ndarray:
        """int64[B]: tokens each row has seen."""
        return self._lengths.copy()

    @property
    def layout(self) -> str:
        """Cache kinds, layer count and precision of the keys and values."""
        leaves = self._kinds.split(",")
        kinds = "+".join(f"{leaves.count(kind)}x{kind}" for kind in sorted(set(leaves)))
        precision = f"kv{self._quantized[1]}g{self._quantized[0]}" if self._quantized else "kv"
        return f"mlx:{getattr(self.model, 'model_type', type(self.model).__name__)}:{kinds}:{precision}"

    def extend(self, tokens: np.ndarray | mx.array, counts: Counts | None = None) -> mx.array:
        """See ``Session.extend``; everything is lazy, so that prompts never pay for an unread head."""
        if isinstance(tokens, mx.array):
            valid = check_counts(tokens.shape, counts, self._lengths, self.max_context)
        else:
            tokens, valid = check_extend(tokens, counts, self._lengths, self.max_context, self.vocab_size)
        if len(self._lanes) == 1:
            logits = self._extend_together(tokens, valid)
        else:
            logits = self._extend_separately(tokens, valid)
        self._lengths = self._lengths + valid
        return logits

    def wait(self) -> None:
        """See ``Session.wait``."""
        mx.eval([array for lane in self._lanes for array in _lane_arrays(lane)])

    def rewind(self, lengths: Counts) -> None:
        """See ``Session.rewind``."""
        wanted = check_rewind(lengths, self._lengths, self.can_rewind)
        if not self.can_rewind:
            for row in np.flatnonzero(wanted != self._lengths):
                self._lanes[row] = self._fresh_lane()
        self._lengths = wanted

    def snapshot(self, row: int) -> Snapshot:
        """See ``Session.snapshot``: device arrays, copied once."""
        lane, inner = (0, row) if self.can_rewind else (row, 0)
        arrays: dict[str, mx.array] = {}
        for i, leaf in enumerate(_leaves(self._lanes[lane])):
            part = leaf.read_row(inner, int(self._lengths[row])) if isinstance(leaf, RowCache) else _foreign_state(leaf)
            arrays |= {f"{i}.{name}": array for name, array in part.items()}
        mx.eval(arrays)
        axes: dict[str, int | None] = dict.fromkeys(arrays, -2 if self.can_rewind else None)
        return Snapshot(int(self._lengths[row]), arrays, axes, self.layout)

    def restore(self, row: int, snapshot: Snapshot) -> None:
        """See ``Session.restore``; the snapshot's arrays are copied into the row by the next forward."""
        check_restore(snapshot, self.layout, self.max_context)
        lane, inner = (0, row) if self.can_rewind else (row, 0)
        if not self.can_rewind:
            self._lanes[lane] = self._fresh_lane()
        parts: dict[int, dict[str, mx.array]] = {}
        for name, array in snapshot.arrays.items():
            index, _, rest = name.partition(".")
            parts.setdefault(int(index), {})[rest] = mx.array(array)
        self._lengths[row] = snapshot.length
        for i, leaf in enumerate(_leaves(self._lanes[lane])):
            if isinstance(leaf, RowCache):
                leaf.write_row(inner, parts.get(i, {}))
            else:
                leaf.state = _foreign_from(parts.get(i, {}))

    def _forward(self, lane: int, tokens: np.ndarray | mx.array, before: Lengths) -> mx.array:
        for leaf in _leaves(self._lanes[lane]):
            if isinstance(leaf, RowCache):
                leaf.lengths = before
        given = tokens if isinstance(tokens, mx.array) else mx.array(tokens)
        logits: mx.array = self.model(given, cache=self._lanes[lane])
        return logits

    def _extend_together(self, tokens: np.ndarray | mx.array, valid: np.ndarray) -> mx.array:
        """One forward from the first to the last row that takes part: a prompt alone costs one row."""
        busy = np.flatnonzero(valid)
        first, last = (int(busy[0]), int(busy[-1])) if len(busy) else (0, 0)
        before = Lengths(self._lengths[first : last + 1], first)
        if not before.even and tokens.shape[1] == 1 and 2 * len(before.valid) > self.batch_size:
            # one scatter into all rows costs less than a write for each
            first, last, before = 0, self.batch_size - 1, Lengths(self._lengths)
        logits = self._forward(0, tokens[first : last + 1], before)
        around = (first, self.batch_size - last - 1)
        return mx.pad(logits, [around, (0, 0), (0, 0)]) if any(around) else logits

    def _extend_separately(self, tokens: np.ndarray | mx.array, valid: np.ndarray) -> mx.array:
        rows = []
        for row, count in enumerate(valid):
            width = tokens.shape[1]
            if count == 0:
                rows.append(mx.zeros((1, width, self.vocab_size)))
                continue
            logits = self._forward(row, tokens[row : row + 1, :count], Lengths(self._lengths[row : row + 1]))
            rows.append(mx.pad(logits, [(0, 0), (0, width - int(count)), (0, 0)]))
        return mx.concatenate(rows, axis=0)

    def _fresh_lane(self) -> list[Any]:
        return self._fresh_caches(self.batch_size if self.can_rewind else 1)

    def _fresh_caches(self, rows: int) -> list[Any]:
        return [self._converted(cache, rows) or cache for cache in compat.new_cache(self.model)]

    def _converted(self, cache: Any, rows: int) -> Any | None:
        """Our cache in place of mlx-lm's, or None where the kind keeps no history."""
        kinds = compat.cache_module()
        if type(cache) is kinds.CacheList:
            parts = [self._converted(part, rows) for part in cache.caches]
            return None if any(part is None for part in parts) else kinds.CacheList(*parts)
        window = cache.max_size if type(cache) is kinds.RotatingKVCache and cache.keep == 0 else None
        if type(cache) is not kinds.KVCache and window is None:
            return None
        grouped = compat.masks_grouped_scores(self.model)
        if self._quantized:
            return QuantizedRowCache(rows, window, *self._quantized, grouped=grouped)
        return RowCache(rows, window, grouped=grouped)

    def _probe_vocabulary(self) -> int:
        """Width of the head, from a ragged forward whose graph is never evaluated."""
        rows = min(self.batch_size, 2) if self.can_rewind else 1
        caches = self._fresh_caches(rows)
        for leaf in _leaves(caches):
            if isinstance(leaf, RowCache):
                leaf.lengths = Lengths(np.arange(rows))
        try:
            return int(self.model(mx.zeros((rows, 2), dtype=mx.int32), cache=caches).shape[-1])
        except (ValueError, TypeError, AttributeError) as error:  # whatever mlx-lm's model code stumbles over
            kind = getattr(self.model, "model_type", type(self.model).__name__)
            what = "quantised keys and values" if self._quantized else f"{rows} row{'s' * (rows > 1)} of tokens"
            raise UserError(f"mlx-lm's {kind} cannot run with {what}: {error}") from error


def _context_of(config: dict[str, Any]) -> int:
    text = config.get("text_config")
    merged = {**config, **text} if isinstance(text, dict) else config
    found = [merged[key] for key in CONTEXT_KEYS if isinstance(merged.get(key), int)]
    return int(found[0]) if found else UNBOUNDED


def _leaves(caches: Sequence[Any]) -> Iterator[Any]:
    for cache in caches:
        if isinstance(getattr(cache, "caches", None), list | tuple):
            yield from _leaves(cache.caches)
        else:
            yield cache


def _lane_arrays(lane: Sequence[Any]) -> list[mx.array]:
    found: list[mx.array] = []
    for leaf in _leaves(lane):
        arrays = leaf.arrays() if isinstance(leaf, RowCache) else [a for _, a in named_leaves(leaf.state)]
        found += [array for array in arrays if isinstance(array, mx.array)]
    return found


def _foreign_state(cache: Any) -> dict[str, mx.array]:
    """The state of an mlx-lm cache as named arrays; ints and None become marked arrays."""
    if cache.empty():
        return {}
    named = {}
    for name, value in named_leaves(cache.state):
        if isinstance(value, mx.array):
            named[name] = value[...]
        elif value is None:
            named[f"{name}:none"] = mx.zeros((1,), dtype=mx.int32)
        else:
            named[f"{name}:int"] = mx.array([int(value)])
    return named


def _foreign_from(named: dict[str, mx.array]) -> Any:
    def value(name: str, array: mx.array) -> Any:
        kind = name.partition(":")[2]
        return None if kind == "none" else int(np.array(array)[0]) if kind == "int" else array[...]

    return tree_unflatten([(name.partition(":")[0], value(name, array)) for name, array in named.items()])
