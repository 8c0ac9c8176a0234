"""The one decode loop: rows of requests, each round one forward of the worker, with or without drafts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import numpy as np

from mlxkd.decode.detokenize import detokenizer_factory
from mlxkd.decode.prefill import Prefiller, PrefixStore
from mlxkd.decode.readout import Masks, Reader
from mlxkd.decode.requests import ActiveRow, Event, Request, Turn
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

    def observe(self, asked: int, drafted: int, accepted: int, draft_seconds: float, verify_seconds: float) -> None:
        """What a round of ``drafted`` proposals for one row brought and cost, where ``asked`` had been chosen."""
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
        self._ahead: Round | None = None
        self._chosen: int | None = None

    @property
    def free_rows(self) -> list[int]:
        """Rows without a request."""
        return [row for row in range(self.session.batch_size) if row not in self.rows]

    def admit(self, *requests: Request) -> list[int]:
        """Give each request a free row and process the prompts together; returns the rows.

        Raises:
            UserError: too few free rows, or an empty prompt.
            ContextOverflow: a prompt leaves no room for an answer; nothing is changed.
        """
        for request in requests:
            self._check(request)
        if len(requests) > len(self.free_rows):
            busy = f"all {self.session.batch_size} rows are busy" if not self.free_rows else "too few rows are free"
            raise UserError(busy, hint="step the engine first")
        admitted = {
            row: ActiveRow(request, self._turn, self._detokenizer())
            for row, request in zip(self.free_rows, requests, strict=False)
        }
        self._prompts.keep(self.rows)
        started = time.perf_counter()
        self._prompts.admit(admitted)
        self.statistics.prefill_seconds += time.perf_counter() - started
        self.statistics.prompt_tokens += sum(len(active.history) for active in admitted.values())
        self.statistics.cached_tokens += sum(active.cached_tokens for active in admitted.values())
        self.rows |= admitted
        return list(admitted)

    def _check(self, request: Request) -> None:
        if not request.prompt:
            raise UserError("the prompt is empty", hint="start from the beginning-of-text token")
        if len(request.prompt) > self.session.max_context:
            raise ContextOverflow(
                f"a prompt of {len(request.prompt)} tokens does not fit into {self.session.max_context}",
                hint="shorten the prompt or open a session with a larger context",
            )

    def step(self) -> list[Event]:
        """One round: draft, one forward of the worker, settle; returns the new tokens of all rows.

        Where the next tokens are known on the device, their forward starts before these are handled.
        """
        self._prompts.keep({row: active for row, active in self.rows.items() if active.new_tokens})
        started = time.perf_counter()
        current, self._ahead = self._ahead, None
        if current is None or not current.alive(self.rows):
            current = self._start()
        if self._runs_ahead(current):
            self._ahead = self._launch(current.reader.best_on_device, dict.fromkeys(self.rows, Draft()))
        return self._settle(current, started)

    def run(self, requests: Iterable[Request], admitted: Callable[[Request], None] | None = None) -> Iterator[Event]:
        """Decode a queue, admitting the next requests as soon as rows are free.

        Args:
            requests: taken only when there is a row for them, so they may be made on the way.
            admitted: told of each request whose prompt has been processed.
        """
        waiting, more = iter(requests), True
        while more or self.rows:
            if more and (free := len(self.free_rows)):
                taken = list(islice(waiting, free))
                more = len(taken) == free
                if taken:
                    self.admit(*taken)
                for request in taken if admitted is not None else ():
                    admitted(request)
            if not more and self._ahead is None:
                self._compact()
            if self.rows:
                yield from self.step()

    def cancel(self, row: int) -> None:
        """Forget the request of a row."""
        self.rows.pop(row)
        if self.drafter is not None:
            self.drafter.release(row)

    @property
    def _compactable(self) -> bool:
        """Whether moving requests down halves the rows that a forward spans, where the session pays by span."""
        if self.drafter is not None or self.session.computes_all_rows or not self.rows:
            return False
        return max(self.rows) + 1 >= 2 * len(self.rows)

    def _compact(self) -> None:
        """Move requests to the lowest rows."""
        while self._compactable:
            source, target = max(self.rows), self.free_rows[0]
            self.session.restore(target, self.session.snapshot(source))
            self.rows[target] = self.rows.pop(source)
            self._prompts.move(source, target)

    def _start(self) -> Round:
        """The round that follows from what is on the host: drafts, masks, and one forward."""
        started = time.perf_counter()
        drafts = {row: Draft() for row in self.rows}
        wanted = self._choose()
        if self.drafter is not None and wanted:
            lengths = self.session.lengths
            limits = {row: self._limit(row, int(lengths[row]), wanted) for row in self.rows}
            drafts |= self.drafter.propose(self.rows, limits)
        masks = {row: active.masks(drafts[row].tokens) for row, active in self.rows.items()}
        drafts = {row: drafts[row].cut(len(masks[row]) - 1) for row in self.rows}
        given = {row: [self.rows[row].pending, *draft.tokens] for row, draft in drafts.items()}
        tokens = np.zeros((self.session.batch_size, max(map(len, given.values()))), dtype=np.int32)
        for row, own in given.items():
            tokens[row, : len(own)] = own
        seconds = time.perf_counter() - started
        self.statistics.draft_seconds += seconds
        return self._launch(tokens, drafts, masks, seconds)

    def _choose(self) -> int:
        """The draft length of the next round, chosen once."""
        if self._chosen is None:
            self._chosen = self.length.choose() if self.length is not None else 0
        return self._chosen

    def _launch(
        self, tokens: Array, drafts: dict[int, Draft], masks: Masks | None = None, draft_seconds: float = 0.0
    ) -> Round:
        asked, self._chosen = self._choose(), None
        counts = np.zeros(self.session.batch_size, dtype=np.int64)
        for row, draft in drafts.items():
            counts[row] = 1 + len(draft.tokens)
        self.statistics.forwards += 1
        reader = Reader(self.session.extend(tokens, counts), self.rows, drafts, masks)
        return Round(dict(self.rows), asked, drafts, reader, self.statistics.forwards, draft_seconds)

    def _runs_ahead(self, current: Round) -> bool:
        """Whether the next forward may start from tokens that the host has not seen.

        Only greedy rows without grammars and drafts, none of which is known to end now; not before a request's
        first token, which it would delay; and not while requests should move to lower rows first.
        """
        if not self.session.takes_device_tokens or self._compactable or current.rows != self.rows:
            return False
        if any(draft.tokens for draft in current.drafts.values()):
            return False
        goes_on = all(
            active.plain
            and 0 < active.new_tokens < active.options.max_tokens - 1
            and len(active.history) < self.session.max_context
            for active in self.rows.values()
        )
        return goes_on and self._choose() == 0

    def _limit(self, row: int, length: int, wanted: int) -> int:
        active = self.rows[row]
        left = active.options.max_tokens - active.new_tokens - 1
        return max(0, min(wanted, left, self.session.max_context - length - 1))

    def _settle(self, current: Round, started: float) -> list[Event]:
        alive = current.alive(self.rows)
        judged = {row: self._judge(row, current) for row in alive}
        verify_seconds = time.perf_counter() - started - current.draft_seconds
        self.statistics.verify_seconds += verify_seconds
        self.statistics.row_forwards += len(alive)
        events: list[Event] = []
        for row, (accepted, following) in judged.items():
            draft = current.drafts[row]
            self.statistics.count(len(draft.tokens), accepted)
            if self.length is not None:
                self.length.observe(current.asked, len(draft.tokens), accepted, current.draft_seconds, verify_seconds)
            events += self._emit(row, [*draft.tokens[:accepted], following], accepted, current)
        self._trim()
        return events

    def _judge(self, row: int, current: Round) -> tuple[int, int]:
        return verify(lambda i: current.reader.law(row, i), current.drafts[row], self.rows[row].streams)

    def _emit(self, row: int, settled: list[int], accepted: int, current: Round) -> list[Event]:
        active = self.rows[row]
        events: list[Event] = []
        for i, token in enumerate(settled):
            room = len(active.history) < self.session.max_context
            logprob = current.reader.logprob(row, i, token)
            events.append(active.settle(token, logprob, current.forward, i < accepted, room))
            if active.finish:
                break
        self.statistics.tokens += len(events)
        return events

    def _trim(self) -> None:
        """Take back what was fed beyond the settled tokens, and free the rows that ended."""
        lengths = self.session.lengths
        wanted = lengths.copy()
        pending = 0 if self._ahead is not None else 1  # already fed by the round that runs ahead
        for row, active in self.rows.items():
            wanted[row] = min(int(lengths[row]), len(active.history) - pending)
        if (wanted != lengths).any():
            self.session.rewind(wanted)
        for row in [row for row, active in self.rows.items() if active.finish]:
            self._prompts.finish(row, self.rows[row])
            self.cancel(row)


@dataclass(frozen=True)
class Round:
    """One forward of the worker on its way.

    Args:
        rows: the requests that took part, by row.
        asked: the draft length chosen for it.
        drafts: their proposals.
        reader: the worker's laws.
        forward: its number.
        draft_seconds: what drafting cost.
    """

    rows: dict[int, ActiveRow]
    asked: int
    drafts: dict[int, Draft]
    reader: Reader
    forward: int
    draft_seconds: float

    def alive(self, rows: dict[int, ActiveRow]) -> list[int]:
        """The rows whose request is still the one that took part."""
        return [row for row, active in self.rows.items() if rows.get(row) is active]
