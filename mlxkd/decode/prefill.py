"""Prompts into sessions, through the prompt cache, which is filled after the first token and not before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from mlxkd.decode.requests import ActiveRow
from mlxkd.decode.session import Session, Snapshot

PREFILL_CHUNK = 512
"""Prompt tokens per forward; bounds the memory of attention scores."""


class PrefixStore(Protocol):
    """A prompt cache: see ``mlxkd.decode.prompt_cache``."""

    def lookup(self, tokens: Sequence[int]) -> Snapshot | None:
        """The longest stored prefix of ``tokens``."""
        ...

    def insert(self, tokens: Sequence[int], snapshot: Snapshot) -> None:
        """Keep the state after ``tokens``."""
        ...


class Prefiller:
    """Feeds prompts to the rows of a session.

    Args:
        session: the worker.
        cache: prompt cache of this worker, or None.
    """

    def __init__(self, session: Session, cache: PrefixStore | None):
        self._session, self._cache = session, cache
        self._unkept: set[int] = set()

    def admit(self, row: int, active: ActiveRow) -> int:
        """Reset a row and process all but the newest token of a prompt; returns the tokens found in the cache."""
        lengths = self._session.lengths
        lengths[row] = 0
        self._session.rewind(lengths)
        known = active.history[:-1]
        cached = fed = self._restore(row, active, known)
        for stop in [mark for mark in sorted(active.request.checkpoints) if cached < mark < len(known)]:
            self._feed(row, known[:stop], fed)
            fed = stop
            if self._stores(active):
                self._insert(row, known[:stop])
        self._feed(row, known, fed)
        if self._stores(active) and cached < len(known):
            self._unkept.add(row)
        return cached

    def keep(self, rows: Mapping[int, ActiveRow]) -> None:
        """Insert the prompts of these rows into the cache, if that is still to be done."""
        for row in self._unkept & rows.keys():
            self._unkept.discard(row)
            self._insert(row, rows[row].request.prompt[:-1])

    def move(self, source: int, target: int) -> None:
        """A request changed its row."""
        if source in self._unkept:
            self._unkept.discard(source)
            self._unkept.add(target)

    def finish(self, row: int, active: ActiveRow) -> None:
        """The answer is over: keep it too, for a next turn."""
        self._unkept.discard(row)
        if self._stores(active):
            self._insert(row, active.history[: int(self._session.lengths[row])])

    def _stores(self, active: ActiveRow) -> bool:
        return self._cache is not None and active.options.use_prompt_cache

    def _restore(self, row: int, active: ActiveRow, known: Sequence[int]) -> int:
        if self._cache is None or not active.options.use_prompt_cache:
            return 0
        found = self._cache.lookup(known)
        if found is None or found.length == 0:
            return 0
        self._session.restore(row, found)
        return found.length

    def _insert(self, row: int, tokens: Sequence[int]) -> None:
        assert self._cache is not None
        snapshot = self._session.snapshot(row)
        if snapshot.length > len(tokens) and snapshot.can_cut:
            snapshot = snapshot.cut(0, len(tokens))
        if snapshot.length == len(tokens):
            self._cache.insert(tokens, snapshot)

    def _feed(self, row: int, tokens: Sequence[int], start: int) -> None:
        for at in range(start, len(tokens), PREFILL_CHUNK):
            part = tokens[at : min(at + PREFILL_CHUNK, len(tokens))]
            block = np.zeros((self._session.batch_size, len(part)), dtype=np.int32)
            block[row] = part
            counts = np.zeros(self._session.batch_size, dtype=np.int64)
            counts[row] = len(part)
            self._session.extend(block, counts)
