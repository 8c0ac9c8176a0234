"""Answer requests under the clock: the engine's own tokens, on the kernels the model was loaded with."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxkd.data.render import prompt_text
from mlxkd.decode.constrained import ToolGrammars
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
    clocks: dict[str, RequestClock] = {}
    texts = [""] * len(cases)
    waiting = list(range(len(cases)))
    while waiting or engine.rows:
        while waiting and engine.free_rows:
            number = waiting.pop(0)
            case = cases[number]
            constraint = grammar(case["tools"]) if grammar else None
            options = GenerateOptions(max_tokens=max_tokens, stop_after_tool_call=False, constraint=constraint)
            should_call = bool(expected_calls(case["messages"][-1]))
            clock = clocks[str(number)] = RequestClock(parser, case["tools"], should_call=should_call)
            text = prompt_text(list(case["messages"][:-1]), tokenizer, case["tools"], where=case.get("source", ""))
            prompt = tuple(tokenizer.encode(text, add_special_tokens=False))
            clock.mark("tokenize")
            engine.admit(Request(prompt, options, name=str(number)))
            mx.synchronize()  # the prompt's work is only queued when admit returns
            clock.mark("prefill")
        for event in engine.step():
            clocks[event.request].token(event.token, event.text, step=event.forward, at=event.time_ns * 1e-9)
            texts[int(event.request)] += event.text
            if event.finish and on_answer:
                on_answer()
    return [(clocks[str(number)].finish(), text) for number, text in enumerate(texts)]


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

    def forced(self) -> list[int]:
        return self._counted(self.inner.forced)

    def finished(self) -> bool:
        return self._counted(self.inner.finished)

    def _counted(self, call: Callable[..., T], *given: int) -> T:
        started = time.perf_counter()
        found = call(*given)
        self.costs.following += time.perf_counter() - started
        return found
