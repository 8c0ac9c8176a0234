"""A decoder whose law is a table of the last tokens: exact, tiny, in plain NumPy; and a pruned real model."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxkd import compat
from mlxkd.decode.session import Counts, Snapshot, check_extend, check_restore, check_rewind


class Table:
    """Logits of every context of up to ``order`` tokens."""

    def __init__(self, vocabulary: int, seed: int, order: int = 4, spread: float = 1.5):
        self.vocabulary, self.order, self._seed, self._spread = vocabulary, order, seed, spread
        self._known: dict[tuple[int, ...], np.ndarray] = {}

    def logits(self, context: tuple[int, ...]) -> np.ndarray:
        context = tuple(context[-self.order :])
        if context not in self._known:
            rng = np.random.default_rng([self._seed, *context])
            self._known[context] = self._spread * rng.standard_normal(self.vocabulary)
        return self._known[context]


class TableSession:
    query_sizes: tuple[int, ...] | None = None
    can_rewind = True
    computes_all_rows = False
    takes_device_tokens = False
    layout = "table"

    def __init__(self, table: Table, batch_size: int = 1, max_context: int = 1000):
        self.table, self.batch_size, self.max_context = table, batch_size, max_context
        self.vocab_size = table.vocabulary
        self._rows: list[list[int]] = [[] for _ in range(batch_size)]
        self.calls: list[tuple[int, ...]] = []

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self._rows], dtype=np.int64)

    def extend(self, tokens: np.ndarray, counts: Counts | None = None) -> np.ndarray:
        tokens, valid = check_extend(tokens, counts, self.lengths, self.max_context, self.vocab_size)
        self.calls.append(tokens.shape)
        out = np.full((*tokens.shape, self.vocab_size), np.nan)
        for row, count in enumerate(valid):
            for i in range(count):
                self._rows[row].append(int(tokens[row, i]))
                out[row, i] = self.table.logits(tuple(self._rows[row]))
        return out

    def wait(self) -> None:
        pass

    def rewind(self, lengths: Counts) -> None:
        wanted = check_rewind(lengths, self.lengths, True)
        self._rows = [row[:length] for row, length in zip(self._rows, wanted, strict=True)]

    def snapshot(self, row: int) -> Snapshot:
        seen = np.array(self._rows[row], dtype=np.int32)[:, None]
        return Snapshot(len(seen), {"seen": seen}, {"seen": -2}, self.layout)

    def restore(self, row: int, snapshot: Snapshot) -> None:
        check_restore(snapshot, self.layout, self.max_context)
        self._rows[row] = [int(token) for token in np.asarray(snapshot.arrays["seen"])[: snapshot.length, 0]]


class PlainTokenizer:
    """Token i is the letter i; nothing ends an answer."""

    eos_token_id = None
    bos_token_id = None

    def decode(self, tokens: list[int], **_: Any) -> str:
        return "".join(chr(ord("a") + token % 26) for token in tokens)


def pruned(model: nn.Module, config: dict[str, Any], keep: tuple[int, ...]) -> tuple[nn.Module, dict[str, Any]]:
    """The model with only some of its layers."""
    smaller = {**config, "num_hidden_layers": len(keep)}
    student = compat.build_model(smaller)
    weights = []
    for name, value in tree_flatten(model.parameters()):
        head, dot, tail = name.partition(".layers.")
        if not dot:
            weights.append((name, value))
            continue
        layer, _, rest = tail.partition(".")
        if int(layer) in keep:
            weights.append((f"{head}.layers.{keep.index(int(layer))}.{rest}", value))
    student.load_weights(weights, strict=True)
    return student, smaller
