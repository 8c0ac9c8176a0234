"""Answer requests under the clock: the engine's own tokens, on the kernels the model was loaded with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import mlx.nn as nn
import numpy as np

from mlxkd.data.render import prompt_text
from mlxkd.decode.constrained import ToolGrammars
from mlxkd.decode.engine import Engine
from mlxkd.decode.requests import Constraint, GenerateOptions, Matcher, Request
from mlxkd.evaluation.answers import GrammarOf, engine_for
from mlxkd.evaluation.clocks import RequestClock, Timing
from mlxkd.evaluation.toolcalls.parsing import parser_for
from mlxkd.evaluation.toolcalls.scoring import expected_calls

T = TypeVar("T")


def time_answers(
    model: nn.Module,
    tokenizer: Any,
    cases: Sequence[dict[str, Any]],
    *,
    max_tokens: int,
    rows: int = 1,
    grammar: GrammarOf | None = None,
    on_answer: Callable[[], None] | None = None,
) -> list[tuple[Timing, str]]:
    """Greedy answers with their timings, in the order of the cases.

    Args:
        model: float or packed; packed ones run on their quantised kernels.
        cases: ``{"messages", "tools"}``; the last message is the expected answer and is not shown. "source", where
            it is given, stands in faults.
        max_tokens: new tokens at most.
        rows: requests decoded together. Latencies describe a lone request only with 1; counts of tokens and
            steps do not depend on it.
        grammar: the constraint for the tools on offer. It is compiled before the request's clock starts, as a server
            that knows its tools would have it; ``TimedGrammars`` tells what that takes.
        on_answer: called once per finished answer.

    Raises:
        UserError: a conversation that the chat template refuses, or tools that cannot be enforced.
    """
    engine = engine_for(model, tokenizer, min(rows, max(1, len(cases))), constrained=grammar is not None)
    parser = parser_for(tokenizer)

    def begun() -> Iterator[tuple[Request, RequestClock]]:
        for number, case in enumerate(cases):
            constraint = grammar(case["tools"]) if grammar else None
            options = GenerateOptions(max_tokens=max_tokens, stop_after_tool_call=False, constraint=constraint)
            should_call = bool(expected_calls(case["messages"][-1]))
            clock = RequestClock(parser, case["tools"], should_call=should_call)
            text = prompt_text(list(case["messages"][:-1]), tokenizer, case["tools"], where=case.get("source", ""))
            prompt = tuple(tokenizer.encode(text, add_special_tokens=False))
            clock.mark("tokenize")
            yield Request(prompt, options, name=str(number)), clock

    return run_timed(engine, begun(), on_answer)


def run_timed(
    engine: Engine, begun: Iterable[tuple[Request, RequestClock]], on_answer: Callable[[], None] | None = None
) -> list[tuple[Timing, str]]:
    """Decode a queue with a clock for each request; timings and texts in the order of the queue.

    Args:
        begun: requests under names of their own, and their clocks, which run and know when the prompt was ready.
            Each is taken when there is a row for it.
        on_answer: called once per finished answer.
    """
    clocks: dict[str, RequestClock] = {}
    texts: dict[str, str] = {}

    def requests() -> Iterator[Request]:
        for request, clock in begun:
            clocks[request.name], texts[request.name] = clock, ""
            yield request

    for event in engine.run(requests(), lambda request: clocks[request.name].mark("prefill")):
        clocks[event.request].token(event.token, event.text, step=event.forward, at=event.time_ns * 1e-9)
        texts[event.request] += event.text
        if event.finish and on_answer:
            on_answer()
    return [(clock.finish(), texts[name]) for name, clock in clocks.items()]


@dataclass
class TimedGrammars:
    """Grammars whose cost is counted.

    Args:
        inner: gives the constraint for the tools on offer.

    Attributes:
        compiling: seconds of each compilation that took place.
        following: seconds spent in masks, checks and advances.
    """

    inner: ToolGrammars
    compiling: list[float] = field(default_factory=list)
    following: float = 0.0

    def __call__(self, tools: Sequence[dict[str, Any]]) -> Constraint | None:
        """See ``mlxkd.evaluation.answers.GrammarOf``."""
        before, started = self.inner.compiled, time.perf_counter()
        found = self.inner(tools)
        if self.inner.compiled > before:
            self.compiling.append(time.perf_counter() - started)
        return None if found is None else _TimedConstraint(found, self)


@dataclass(frozen=True)
class _TimedConstraint:
    inner: Constraint
    costs: TimedGrammars

    def matcher(self) -> Matcher:
        return _TimedMatcher(self.inner.matcher(), self.costs)


@dataclass(frozen=True)
class _TimedMatcher:
    """A matcher that adds the time of every call to the costs."""

    inner: Matcher
    costs: TimedGrammars

    def mask(self) -> np.ndarray | None:
        return self._counted(self.inner.mask)

    def accepts(self, token: int) -> bool:
        return self._counted(self.inner.accepts, token)

    def consume(self, token: int) -> None:
        self._counted(self.inner.consume, token)

    def rollback(self, tokens: int) -> None:
        self._counted(self.inner.rollback, tokens)

    def likely(self) -> list[int]:
        return self._counted(self.inner.likely)

    def finished(self) -> bool:
        return self._counted(self.inner.finished)

    def _counted(self, call: Callable[..., T], *given: int) -> T:
        started = time.perf_counter()
        found = call(*given)
        self.costs.following += time.perf_counter() - started
        return found
