"""What is asked of the engine and what it answers, token by token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from mlxkd.decode.detokenize import Detokenizer
from mlxkd.decode.sampling import SamplingOptions
from mlxkd.decode.speculative import Streams
from mlxkd.errors import UserError

Finish = Literal["stop", "length", "tool_call", "grammar", "context"]


class Matcher(Protocol):
    """The state of a grammar along one request."""

    def mask(self) -> np.ndarray | None:
        """bool[V] of allowed next tokens; None where everything is allowed."""
        ...

    def accepts(self, token: int) -> bool:
        """Whether ``token`` may come next."""
        ...

    def consume(self, token: int) -> None:
        """Advance by an allowed token."""
        ...

    def rollback(self, tokens: int) -> None:
        """Undo the last ``consume`` calls."""
        ...

    def likely(self) -> list[int]:
        """Tokens worth proposing: those without a choice in the usual spelling. The law may allow others."""
        ...

    def finished(self) -> bool:
        """Whether the grammar allows nothing more."""
        ...


class Constraint(Protocol):
    """A grammar; shared by requests."""

    def matcher(self) -> Matcher:
        """A fresh state at the start of the answer."""
        ...


@dataclass(frozen=True)
class GenerateOptions:
    """Options of one request.

    Args:
        max_tokens: new tokens at most.
        sampling: how tokens are drawn.
        stop_tokens: tokens that end the answer; None takes the tokenizer's own.
        stop_after_tool_call: end as soon as one tool call is complete.
        constraint: a grammar that the answer must follow.
        use_prompt_cache: look the prompt up in the engine's cache and keep it there.

    Raises:
        UserError: ``max_tokens`` below 1.
    """

    max_tokens: int = 256
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    stop_tokens: frozenset[int] | None = None
    stop_after_tool_call: bool = True
    constraint: Constraint | None = None
    use_prompt_cache: bool = True

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UserError(f"max_tokens = {self.max_tokens} is out of range", hint="ask for at least 1 token")


@dataclass(frozen=True)
class Request:
    """A prompt and its options.

    Args:
        prompt: tokens; the newest is fed with the first step, all others before.
        options: how to answer.
        name: returns in every event.
        checkpoints: lengths (message boundaries, say) at which a state that cannot be cut is cached too.
    """

    prompt: tuple[int, ...]
    options: GenerateOptions = field(default_factory=GenerateOptions)
    name: str = "0"
    checkpoints: tuple[int, ...] = ()


@dataclass(frozen=True)
class Event:
    """One new token.

    Args:
        request: name of the request.
        token: its id.
        text: the text that became certain with it.
        logprob: nats under the worker alone, before penalties and masks.
        finish: why the answer ended, on its last event.
        forward: number of the worker's forward that settled this token (a burst shares one number).
        drafted: whether it was proposed before the worker saw it.
        time_ns: monotonic clock when the token was settled on the host.
    """

    request: str
    token: int
    text: str
    logprob: float
    finish: Finish | None
    forward: int
    drafted: bool
    time_ns: int = field(default_factory=time.perf_counter_ns)


@dataclass(frozen=True)
class Turn:
    """Tokens and texts that end an answer, of one tokenizer."""

    stop_tokens: frozenset[int] = frozenset()
    tool_start: str = ""
    tool_end: str = ""


class ActiveRow:
    """A request that occupies a row: its tokens so far and everything that depends on them."""

    def __init__(self, request: Request, turn: Turn, detokenizer: Detokenizer):
        self.request, self.turn = request, turn
        self.options = request.options
        self.history: list[int] = list(request.prompt)
        self.streams = Streams(request.options.sampling.seed)
        self.matcher = request.options.constraint.matcher() if request.options.constraint else None
        self.stop_tokens = turn.stop_tokens if self.options.stop_tokens is None else self.options.stop_tokens
        self.finish: Finish | None = None
        self.cached_tokens = 0
        self._detokenizer = detokenizer
        self._tail = ""
        self._in_call = False

    @property
    def greedy(self) -> bool:
        """Whether only the likeliest allowed token counts, whatever came before."""
        sampling = self.options.sampling
        return sampling.temperature == 0 and not sampling.needs_history

    @property
    def plain(self) -> bool:
        """Whether the likeliest token of all is the next: greedy without a grammar."""
        return self.greedy and self.matcher is None

    @property
    def pending(self) -> int:
        """The newest token, which no forward has seen yet."""
        return self.history[-1]

    @property
    def new_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.history) - len(self.request.prompt)

    def masks(self, draft: Sequence[int]) -> list[np.ndarray | None]:
        """Grammar masks at each draft position and after the last; shorter where the grammar refuses a draft."""
        if self.matcher is None:
            return [None] * (len(draft) + 1)
        found, consumed = [self.matcher.mask()], 0
        for token in draft:
            if not self.matcher.accepts(token):
                break
            if token in self.stop_tokens:
                found.append(None)  # nothing after the end is kept
                break
            self.matcher.consume(token)
            consumed += 1
            if self.matcher.finished():
                found.append(None)
                break
            found.append(self.matcher.mask())
        self.matcher.rollback(consumed)
        return found

    def settle(self, token: int, logprob: float, forward: int, drafted: bool, room: bool) -> Event:
        """Append a settled token; ``room`` says whether the context can take another."""
        self.history.append(token)
        stopped = token in self.stop_tokens
        text = "" if stopped else self._detokenizer.add(token)
        if self.matcher is not None and not stopped:
            self.matcher.consume(token)
        self.finish = "stop" if stopped else self._reason(text, room)
        if self.finish:
            text += self._detokenizer.finish()
        return Event(self.request.name, token, text, logprob, self.finish, forward, drafted)

    def _reason(self, text: str, room: bool) -> Finish | None:
        if self.options.stop_after_tool_call and self._completes_call(text):
            return "tool_call"
        if self.matcher is not None and self.matcher.finished():
            return "grammar"
        if self.new_tokens >= self.options.max_tokens:
            return "length"
        return None if room else "context"

    def _completes_call(self, text: str) -> bool:
        start, end = self.turn.tool_start, self.turn.tool_end
        if not start or not end or not text:
            return False
        self._tail += text
        if not self._in_call:
            at = self._tail.find(start)
            self._in_call = at >= 0
            self._tail = self._tail[at + len(start) :] if at >= 0 else self._tail[-len(start) :]
        if self._in_call and end in self._tail:
            return True
        if self._in_call:
            self._tail = self._tail[-len(end) - len(text) :]
        return False
