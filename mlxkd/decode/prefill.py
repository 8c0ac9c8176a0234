"""Prompts into sessions, through the prompt cache, which is filled after the first token and not before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mlxkd.decode.requests import ActiveRow
from mlxkd.decode.session import Session, Snapshot

PREFILL_CHUNK = 512
"""Prompt tokens per forward; bounds the memory of attention scores."""

MAX_PADDING = 2
"""How many times the work of separate forwards a shared one may be, padding and idle rows included."""


class PrefixStore(Protocol):
    """A prompt cache: see ``mlxkd.decode.prompt_cache``."""

    def lookup(self, tokens: Sequence[int]) -> Snapshot | None:
        """The longest stored prefix of ``tokens``."""
        ...

    def insert(self, tokens: Sequence[int], snapshot: Snapshot) -> None:
        """Keep the state after ``tokens``."""
        ...


@dataclass
class _Prompt:
    """A prompt on its way: ``stops`` are the lengths still to reach, the last one its end."""

    active: ActiveRow
    tokens: list[int]
    stops: list[int]
    fed: int

    def next_part(self) -> list[int]:
        """The tokens of the next forward."""
        return self.tokens[self.fed : min(self.fed + PREFILL_CHUNK, self.stops[0])]


class Prefiller:
    """Feeds prompts to the rows of a session.

    Args:
        session: the worker.
        cache: prompt cache of this worker, or None.
    """

    def __init__(self, session: Session, cache: PrefixStore | None):
        self._session, self._cache = session, cache
        self._unkept: set[int] = set()

    def admit(self, rows: Mapping[int, ActiveRow]) -> None:
        """Reset rows and process all but the newest token of their prompts.

        Without a cache the prompts share forwards; with one they come one by one, so that each finds the last.
        """
        lengths = self._session.lengths
        lengths[list(rows)] = 0
        self._session.rewind(lengths)
        if self._cache is None:
            self._process(rows)
        else:
            for row, active in rows.items():
                self.keep(rows)
                self._process({row: active})

    def _process(self, rows: Mapping[int, ActiveRow]) -> None:
        prompts = {row: self._begin(row, active) for row, active in rows.items()}
        left = {row for row, prompt in prompts.items() if prompt.next_part()}
        while left:
            parts = {row: prompts[row].next_part() for row in left}
            together = self._together({row: len(part) for row, part in parts.items()})
            self._feed({row: parts[row] for row in together})
            for row in together:
                self._advance(row, prompts[row], len(parts[row]))
            left = {row for row in left if prompts[row].next_part()}
        for row, prompt in prompts.items():
            if self._stores(prompt.active) and prompt.active.cached_tokens < len(prompt.tokens):
                self._unkept.add(row)

    def _begin(self, row: int, active: ActiveRow) -> _Prompt:
        tokens = active.history[:-1]
        cached = active.cached_tokens = self._restore(row, active, tokens)
        marks = [mark for mark in sorted(active.request.checkpoints) if cached < mark < len(tokens)]
        return _Prompt(active, tokens, [*marks, len(tokens)], cached)

    def _advance(self, row: int, prompt: _Prompt, count: int) -> None:
        prompt.fed += count
        if prompt.fed == prompt.stops[0] < len(prompt.tokens):
            prompt.stops.pop(0)
            if self._stores(prompt.active):
                self._insert(row, prompt.tokens[: prompt.fed])

    def _together(self, counts: Mapping[int, int]) -> set[int]:
        """The rows of the next forward: all of them while padding costs little, else the longest alone."""
        longest = max(counts, key=lambda row: counts[row])
        size = self._session.batch_size
        apart = sum(counts.values()) * (size if self._session.computes_all_rows else 1)
        span = size if self._session.computes_all_rows else max(counts) - min(counts) + 1
        return set(counts) if span * counts[longest] <= MAX_PADDING * apart else {longest}

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

    def _feed(self, parts: Mapping[int, Sequence[int]]) -> None:
        block = np.zeros((self._session.batch_size, max(map(len, parts.values()))), dtype=np.int32)
        counts = np.zeros(self._session.batch_size, dtype=np.int64)
        for row, part in parts.items():
            block[row, : len(part)] = part
            counts[row] = len(part)
        self._session.extend(block, counts)
        self._session.wait()
