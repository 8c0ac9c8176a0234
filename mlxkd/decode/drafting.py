"""Where drafts come from: the grammar, the text so far, or a smaller model of the same tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlxkd.decode.engine import Drafter
from mlxkd.decode.prefill import PREFILL_CHUNK
from mlxkd.decode.readout import greedy, on_host
from mlxkd.decode.requests import ActiveRow
from mlxkd.decode.sampling import Law, law, point
from mlxkd.decode.session import Session
from mlxkd.decode.speculative import Draft
from mlxkd.errors import UserError


class GrammarDrafter:
    """The usual spelling of a call wherever the request's grammar leaves it no choice; point masses."""

    def propose(self, rows: dict[int, ActiveRow], limits: dict[int, int]) -> dict[int, Draft]:
        """See ``Drafter.propose``."""
        found = {}
        for row, active in rows.items():
            if active.matcher is not None and limits.get(row, 0):
                found[row] = Draft(active.matcher.likely()[: limits[row]])
        return found

    def release(self, row: int) -> None:
        """Nothing is kept."""


class NgramDrafter:
    """Prompt lookup: what followed the latest earlier occurrence of the last n tokens; point masses.

    Args:
        longest, shortest: sizes of n-gram tried, longest first.
    """

    def __init__(self, longest: int = 3, shortest: int = 1):
        if not 1 <= shortest <= longest:
            raise UserError(f"n-grams of {shortest} to {longest} tokens make no sense")
        self._sizes = tuple(range(longest, shortest - 1, -1))
        self._indexes: dict[int, tuple[ActiveRow, dict[tuple[int, ...], int], int]] = {}

    def propose(self, rows: dict[int, ActiveRow], limits: dict[int, int]) -> dict[int, Draft]:
        """See ``Drafter.propose``."""
        return {row: self._lookup(row, active, limits[row]) for row, active in rows.items() if limits.get(row, 0)}

    def release(self, row: int) -> None:
        """Forget the index of this row."""
        self._indexes.pop(row, None)

    def _lookup(self, row: int, active: ActiveRow, limit: int) -> Draft:
        history = active.history
        index = self._updated(row, active)
        for size in self._sizes:
            if len(history) > size:
                follows = index.get(tuple(history[-size:]))
                if follows is not None:
                    return Draft(history[follows : follows + limit])
        return Draft()

    def _updated(self, row: int, active: ActiveRow) -> dict[tuple[int, ...], int]:
        """Map of n-gram to the position after it, for all n-grams that something follows."""
        owner, index, indexed = self._indexes.get(row, (active, {}, 0))
        if owner is not active:
            index, indexed = {}, 0
        history = active.history
        for end in range(max(indexed, 1), len(history)):
            for size in self._sizes:
                if end >= size:
                    index[tuple(history[end - size : end])] = end
        self._indexes[row] = (active, index, len(history))
        return index


class ModelDrafter:
    """A smaller model of the same tokenizer, on a session of its own (another device, if wished).

    Sampling requests draw drafts from the drafter's law under the request's own options and grammar
    mask, and hand that law to the judge.

    Args:
        session: as many rows as the worker's; must rewind.

    Raises:
        UserError: a session that cannot rewind.
    """

    def __init__(self, session: Session):
        if not session.can_rewind:
            raise UserError("this drafter's state cannot rewind", hint="choose a drafter whose layers all attend")
        self.session = session
        self._fed: dict[int, list[int]] = {}

    def propose(self, rows: dict[int, ActiveRow], limits: dict[int, int]) -> dict[int, Draft]:
        """See ``Drafter.propose``; nothing runs for rows whose limit is 0."""
        wanted = {row: limits[row] for row in rows if limits.get(row, 0)}
        room = self.session.max_context
        wanted = {row: k for row, n in wanted.items() if (k := min(n, room - len(rows[row].history) + 1)) > 0}
        if not wanted:
            return {}
        walks = {row: _Walk(rows[row]) for row in wanted}
        logits, last = self._catch_up({row: rows[row].history for row in wanted})
        for step in range(max(wanted.values())):
            drawing = [row for row in wanted if step < wanted[row] and not walks[row].ended]
            self._draw(drawing, walks, logits, last)
            going = [row for row in drawing if step + 1 < wanted[row] and not walks[row].ended]
            if not going:
                break
            logits, last = self._extend({row: [walks[row].tokens[-1]] for row in going})
        return {row: walk.close() for row, walk in walks.items()}

    def release(self, row: int) -> None:
        """See ``Drafter.release``."""
        self._fed.pop(row, None)

    def _draw(self, rows: Sequence[int], walks: dict[int, _Walk], logits: Any, last: dict[int, int]) -> None:
        best = None
        for row in rows:
            walk = walks[row]
            if walk.device_greedy:
                best = np.asarray(greedy(logits)[0]) if best is None else best
                walk.take(point(int(best[row, last[row]])))
            else:
                walk.take(walk.law(on_host(logits[:, last[row] :], row, 1)[0]))

    def _catch_up(self, histories: dict[int, list[int]]) -> tuple[Any, dict[int, int]]:
        """Bring the drafter to the end of each history; logits after the last token of each."""
        lengths = self.session.lengths
        for row in range(self.session.batch_size):
            fed = self._fed.get(row, [])
            if row in histories:
                # The newest token is always fed again or anew, so that its logits exist.
                lengths[row] = _common(fed, histories[row][:-1])
                self._fed[row] = fed[: lengths[row]]
            elif not fed:
                lengths[row] = 0
        self.session.rewind(lengths)
        missing = {row: history[int(lengths[row]) :] for row, history in histories.items()}
        while max(len(tokens) for tokens in missing.values()) > PREFILL_CHUNK:
            long = {row: tokens[: PREFILL_CHUNK // 2] for row, tokens in missing.items() if len(tokens) > PREFILL_CHUNK}
            self._extend(long)
            self.session.wait()
            missing |= {row: missing[row][len(part) :] for row, part in long.items()}
        return self._extend(missing)

    def _extend(self, parts: dict[int, list[int]]) -> tuple[Any, dict[int, int]]:
        width = max(len(tokens) for tokens in parts.values())
        block = np.zeros((self.session.batch_size, width), dtype=np.int32)
        counts = np.zeros(self.session.batch_size, dtype=np.int64)
        for row, tokens in parts.items():
            block[row, : len(tokens)] = tokens
            counts[row] = len(tokens)
            self._fed.setdefault(row, []).extend(tokens)
        return self.session.extend(block, counts), {row: len(tokens) - 1 for row, tokens in parts.items()}


class FirstOf:
    """Asks several drafters in order; each row takes the first that proposes anything."""

    def __init__(self, *drafters: Drafter):
        self._drafters = drafters

    def propose(self, rows: dict[int, ActiveRow], limits: dict[int, int]) -> dict[int, Draft]:
        """See ``Drafter.propose``."""
        found: dict[int, Draft] = {}
        for drafter in self._drafters:
            open_rows = {row: active for row, active in rows.items() if row not in found}
            proposed = drafter.propose(open_rows, {row: limits[row] for row in open_rows})
            found |= {row: draft for row, draft in proposed.items() if draft.tokens}
        return found

    def release(self, row: int) -> None:
        """See ``Drafter.release``."""
        for drafter in self._drafters:
            drafter.release(row)


class _Walk:
    """One row's draft as it grows; the grammar walks along and is brought back at the end."""

    def __init__(self, active: ActiveRow):
        self._active = active
        self.tokens: list[int] = []
        self.laws: list[Law] = []
        self.ended = False
        self._consumed = 0

    @property
    def device_greedy(self) -> bool:
        """Whether the best token of the raw logits is the whole law."""
        sampling = self._active.options.sampling
        return sampling.temperature == 0 and not sampling.needs_history and self._active.matcher is None

    def law(self, logits: np.ndarray) -> Law:
        """The drafter's law here, under the request's own processors."""
        matcher, sampling = self._active.matcher, self._active.options.sampling
        history = [*self._active.history, *self.tokens] if sampling.needs_history else ()
        return law(logits, sampling, history, matcher.mask() if matcher else None)

    def take(self, found: Law) -> None:
        """Draw from the law and advance."""
        token = found.draw(self._active.streams.draft.random())
        self.tokens.append(token)
        self.laws.append(found)
        self.ended = token in self._active.stop_tokens
        matcher = self._active.matcher
        if matcher is not None and not self.ended:
            matcher.consume(token)
            self._consumed += 1
            self.ended = matcher.finished()

    def close(self) -> Draft:
        """The draft; the grammar is back where it was."""
        if self._active.matcher is not None:
            self._active.matcher.rollback(self._consumed)
        return Draft(self.tokens, self.laws)


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common prefix."""
    length = min(len(left), len(right))
    if list(left[:length]) == list(right[:length]):
        return length
    return next(i for i in range(length) if left[i] != right[i])
