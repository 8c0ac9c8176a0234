"""The one decode loop: rows of requests, each round one forward of the worker, with or without drafts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from mlxkd.decode.detokenize import detokenizer_factory
from mlxkd.decode.prefill import Prefiller, PrefixStore
from mlxkd.decode.readout import greedy, on_host
from mlxkd.decode.requests import ActiveRow, Event, Request, Turn
from mlxkd.decode.sampling import Law, law, log_probability, point
from mlxkd.decode.session import Array, ContextOverflow, Session
from mlxkd.decode.speculative import Draft, verify
from mlxkd.errors import UserError


class Drafter(Protocol):
    """Proposes tokens ahead of the worker."""

    def propose(self, rows: dict[int, ActiveRow], limits: dict[int, int]) -> dict[int, Draft]:
        """At most ``limits[row]`` tokens to follow each row's history."""
        ...

    def release(self, row: int) -> None:
        """The request of this row is over."""
        ...


class DraftLength(Protocol):
    """Decides how many tokens to draft and learns from what happened."""

    def choose(self) -> int:
        """Draft length of the next round; 0 is plain decoding."""
        ...

    def observe(self, drafted: int, accepted: int, draft_seconds: float, verify_seconds: float) -> None:
        """What a round of ``drafted`` proposals for one row brought and cost."""
        ...


@dataclass
class Statistics:
    """What the engine did so far. Times in seconds."""

    forwards: int = 0
    row_forwards: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    accepted_at: list[int] = field(default_factory=list)
    drafted_at: list[int] = field(default_factory=list)

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted over drafted tokens."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_forward(self) -> float | None:
        """New tokens of a row per worker forward of that row."""
        return self.tokens / self.row_forwards if self.row_forwards else None

    def count(self, drafted: int, accepted: int) -> None:
        """Add one judged draft."""
        self.drafted += drafted
        self.accepted += accepted
        for counts, upto in ((self.drafted_at, drafted), (self.accepted_at, accepted)):
            counts.extend([0] * (drafted - len(counts)))
            for position in range(upto):
                counts[position] += 1


def turn_of(tokenizer: Any) -> Turn:
    """What ends an answer for this tokenizer."""
    start, end = getattr(tokenizer, "tool_call_start", None), getattr(tokenizer, "tool_call_end", None)
    eos = getattr(tokenizer, "eos_token_ids", None) or {tokenizer.eos_token_id}
    return Turn(frozenset(int(token) for token in eos if token is not None), start or "", end or "")


class Engine:
    """Decodes up to ``session.batch_size`` requests together.

    Args:
        session: the worker.
        tokenizer: of the worker (mlx-lm's wrapper or a transformers tokenizer).
        drafter: proposes tokens; needs a session that can rewind.
        length: chooses the draft length; required with a drafter.
        cache: prompt cache of this worker.

    Raises:
        UserError: a drafter with a session that cannot rewind.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Any,
        *,
        drafter: Drafter | None = None,
        length: DraftLength | None = None,
        cache: PrefixStore | None = None,
    ):
        if drafter is not None and not session.can_rewind:
            raise UserError(
                "this model's state cannot rewind, so drafts cannot be rejected", hint="decode without --draft"
            )
        if (drafter is None) != (length is None):
            raise ValueError("a drafter and its length policy come together")
        self.session = session
        self.drafter, self.length = drafter, length
        self.statistics = Statistics()
        self._prompts = Prefiller(session, cache)
        self.rows: dict[int, ActiveRow] = {}
        self._turn = turn_of(tokenizer)
        self._detokenizer = detokenizer_factory(tokenizer)

    @property
    def free_rows(self) -> list[int]:
        """Rows without a request."""
        return [row for row in range(self.session.batch_size) if row not in self.rows]

    def admit(self, request: Request) -> int:
        """Give a request a free row and process its prompt; returns the row.

        Raises:
            UserError: no free row, or an empty prompt.
            ContextOverflow: the prompt leaves no room for an answer; nothing is changed.
        """
        if not request.prompt:
            raise UserError("the prompt is empty", hint="start from the beginning-of-text token")
        if len(request.prompt) > self.session.max_context:
            raise ContextOverflow(
                f"a prompt of {len(request.prompt)} tokens does not fit into {self.session.max_context}",
                hint="shorten the prompt or open a session with a larger context",
            )
        if not self.free_rows:
            raise UserError(f"all {self.session.batch_size} rows are busy", hint="step the engine first")
        row = self.free_rows[0]
        active = ActiveRow(request, self._turn, self._detokenizer())
        self._prompts.keep(self.rows)
        started = time.perf_counter()
        active.cached_tokens = self._prompts.admit(row, active)
        self.statistics.prefill_seconds += time.perf_counter() - started
        self.statistics.prompt_tokens += len(active.history)
        self.statistics.cached_tokens += active.cached_tokens
        self.rows[row] = active
        return row

    def step(self) -> list[Event]:
        """One round: draft, one forward of the worker, settle; returns the new tokens of all rows."""
        self._prompts.keep({row: active for row, active in self.rows.items() if active.new_tokens})
        started = time.perf_counter()
        drafts, masks = self._drafts()
        drafted = time.perf_counter()
        logits = self._forward(drafts)
        return self._settle(logits, drafts, masks, drafted - started, drafted)

    def run(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Decode a queue, admitting the next request as soon as a row is free."""
        waiting = list(reversed(requests))
        while waiting or self.rows:
            while waiting and self.free_rows:
                self.admit(waiting.pop())
            if not waiting and self.drafter is None:
                self._compact()
            yield from self.step()

    def cancel(self, row: int) -> None:
        """Forget the request of a row."""
        self.rows.pop(row)
        if self.drafter is not None:
            self.drafter.release(row)

    def _compact(self) -> None:
        """Move requests to the lowest rows where the session does not pay for rows above the last busy one."""
        if not getattr(self.session, "idle_tail_is_free", False):
            return
        while self.rows and self.free_rows and max(self.rows) > self.free_rows[0]:
            source, target = max(self.rows), self.free_rows[0]
            self.session.restore(target, self.session.snapshot(source))
            self.rows[target] = self.rows.pop(source)
            self._prompts.move(source, target)

    def _drafts(self) -> tuple[dict[int, Draft], dict[int, list[np.ndarray | None]]]:
        drafts = {row: Draft() for row in self.rows}
        wanted = self.length.choose() if self.length is not None else 0
        if self.drafter is not None and wanted:
            lengths = self.session.lengths
            limits = {row: self._limit(row, int(lengths[row]), wanted) for row in self.rows}
            drafts |= self.drafter.propose(self.rows, limits)
        masks = {row: active.masks(drafts[row].tokens) for row, active in self.rows.items()}
        return {row: drafts[row].cut(len(masks[row]) - 1) for row in self.rows}, masks

    def _limit(self, row: int, length: int, wanted: int) -> int:
        active = self.rows[row]
        left = active.options.max_tokens - active.new_tokens - 1
        return max(0, min(wanted, left, self.session.max_context - length - 1))

    def _forward(self, drafts: dict[int, Draft]) -> Array:
        width = 1 + max(len(draft.tokens) for draft in drafts.values())
        tokens = np.zeros((self.session.batch_size, width), dtype=np.int32)
        counts = np.zeros(self.session.batch_size, dtype=np.int64)
        for row, draft in drafts.items():
            given = [self.rows[row].pending, *draft.tokens]
            tokens[row, : len(given)] = given
            counts[row] = len(given)
        self.statistics.forwards += 1
        self.statistics.row_forwards += len(drafts)
        return self.session.extend(tokens, counts)

    def _settle(
        self,
        logits: Array,
        drafts: dict[int, Draft],
        masks: dict[int, list[np.ndarray | None]],
        draft_seconds: float,
        started: float,
    ) -> list[Event]:
        reader = _Reader(logits, self.rows, drafts, masks)
        judged = {row: self._judge(row, draft, reader) for row, draft in drafts.items()}
        verify_seconds = time.perf_counter() - started
        self.statistics.draft_seconds += draft_seconds
        self.statistics.verify_seconds += verify_seconds
        events: list[Event] = []
        for row, (accepted, following) in judged.items():
            self.statistics.count(len(drafts[row].tokens), accepted)
            if self.length is not None:
                self.length.observe(len(drafts[row].tokens), accepted, draft_seconds, verify_seconds)
            settled = [*drafts[row].tokens[:accepted], following]
            events += self._emit(row, settled, accepted, reader)
        self._trim()
        return events

    def _judge(self, row: int, draft: Draft, reader: _Reader) -> tuple[int, int]:
        return verify(lambda i: reader.law(row, i), draft, self.rows[row].streams)

    def _emit(self, row: int, settled: list[int], accepted: int, reader: _Reader) -> list[Event]:
        active = self.rows[row]
        events: list[Event] = []
        for i, token in enumerate(settled):
            room = len(active.history) < self.session.max_context
            logprob = reader.logprob(row, i, token)
            events.append(active.settle(token, logprob, self.statistics.forwards, i < accepted, room))
            if active.finish:
                break
        self.statistics.tokens += len(events)
        return events

    def _trim(self) -> None:
        """Take back what was fed beyond the settled tokens, and free the rows that ended."""
        lengths = self.session.lengths
        wanted = lengths.copy()
        for row, active in self.rows.items():
            wanted[row] = min(int(lengths[row]), len(active.history) - 1)
        if (wanted != lengths).any():
            self.session.rewind(wanted)
        for row in [row for row, active in self.rows.items() if active.finish]:
            self._prompts.finish(row, self.rows[row])
            self.cancel(row)


class _Reader:
    """The worker's laws of one round, each computed once, on the device where greedy allows it."""

    def __init__(
        self,
        logits: Array,
        rows: dict[int, ActiveRow],
        drafts: dict[int, Draft],
        masks: dict[int, list[np.ndarray | None]],
    ):
        self._logits, self._rows, self._drafts, self._masks = logits, rows, drafts, masks
        self._greedy_rows = {
            row
            for row, active in rows.items()
            if active.options.sampling.temperature == 0 and not active.options.sampling.needs_history
        }
        self._host: dict[int, np.ndarray] = {}
        if self._greedy_rows:
            self._best, self._best_logprob = greedy(logits, self._stacked_masks())

    def law(self, row: int, position: int) -> Law:
        """The law after the first ``position`` drafts of a row."""
        if row in self._greedy_rows:
            return point(int(self._best[row, position]))
        active = self._rows[row]
        sampling = active.options.sampling
        history = [*active.history, *self._drafts[row].tokens[:position]] if sampling.needs_history else ()
        return law(self._values(row)[position], sampling, history, self._masks[row][position])

    def logprob(self, row: int, position: int, token: int) -> float:
        """The worker's own log-probability of a settled token."""
        if row in self._greedy_rows and int(self._best[row, position]) == token:
            return float(self._best_logprob[row, position])
        return log_probability(self._values(row)[position], token)

    def _values(self, row: int) -> np.ndarray:
        if row not in self._host:
            self._host[row] = on_host(self._logits, row, 1 + len(self._drafts[row].tokens))
        return self._host[row]

    def _stacked_masks(self) -> np.ndarray | None:
        if all(mask is None for row in self._greedy_rows for mask in self._masks[row]):
            return None
        stacked = np.ones(self._logits.shape, dtype=bool)
        for row in self._greedy_rows:
            for position, mask in enumerate(self._masks[row]):
                if mask is not None:
                    stacked[row, position] = mask
        return stacked
