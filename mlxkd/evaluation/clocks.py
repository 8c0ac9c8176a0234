"""Times of one request and of many: first token, every token, first valid tool call.

Definitions (all from one monotonic clock, one event per token on the host):

- ``ttft``: request accepted to first token; split into tokenize, prefill and first step.
- ``tpot``: (last - first) / (n - 1) of one request, n >= 2. ``tps`` is its inverse: n - 1 intervals, never n.
- ``itl``: gaps between tokens; tokens of one model step arrive together, as one gap of m tokens.
- ``ttfa``: request accepted to the token that completes the first call which parses and satisfies the schema of the
  tool it names. Counted in seconds, tokens and model steps. A request that never gets there is censored: infinite in
  the quantiles, counted beside, never dropped.
- ``overhead_tokens``: tokens before the one that opens the first call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from mlxkd.evaluation.toolcalls import schema
from mlxkd.evaluation.toolcalls.parsing import Cursor, Parser
from mlxkd.metric import Metric, from_samples

Clock = Callable[[], float]


class Detokenizer(Protocol):
    """Turns tokens into the text that became certain with each."""

    def add(self, token: int) -> str: ...


@dataclass(frozen=True)
class Timing:
    """What was observed of one request; times in seconds since it was accepted, None where it never happened.

    Args:
        should_call: the expected answer calls a tool; only such requests count towards ttfa.
        tokens: generated tokens, the end token included.
        tokenize, prefill: ends of these phases, where they were marked.
        times: arrival of each token.
        steps: number of the model step that brought each token.
        opened: index of the token with which the first call opens.
        valid: index of the token that completes the first valid call.
    """

    should_call: bool = True
    tokens: int = 0
    tokenize: float | None = None
    prefill: float | None = None
    times: tuple[float, ...] = ()
    steps: tuple[int, ...] = ()
    opened: int | None = None
    valid: int | None = None

    @property
    def ttft(self) -> float | None:
        """Seconds to the first token."""
        return self.times[0] if self.times else None

    @property
    def first_step(self) -> float | None:
        """Seconds between the end of prompt processing and the first token."""
        return None if self.prefill is None or not self.times else self.times[0] - self.prefill

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first."""
        return (self.times[-1] - self.times[0]) / (self.tokens - 1) if self.tokens > 1 else None

    @property
    def tps(self) -> float | None:
        """Tokens per second between the first and the last token."""
        elapsed = self.times[-1] - self.times[0] if self.tokens > 1 else 0.0
        return (self.tokens - 1) / elapsed if elapsed > 0 else None

    @property
    def gaps(self) -> list[tuple[float, int]]:
        """(seconds, tokens) of each model step after the first."""
        starts = [i for i, step in enumerate(self.steps) if i == 0 or step != self.steps[i - 1]]
        ends = [*starts[1:], len(self.steps)]
        pairs = list(zip(starts, ends, strict=True))
        return [(self.times[start] - self.times[start - 1], end - start) for start, end in pairs[1:]]

    @property
    def ttfa(self) -> float | None:
        """Seconds to the first valid call."""
        return None if self.valid is None else self.times[self.valid]

    @property
    def ttfa_tokens(self) -> int | None:
        """Tokens up to and with the one that completes the first valid call."""
        return None if self.valid is None else self.valid + 1

    @property
    def ttfa_steps(self) -> int | None:
        """Model steps up to and with the one that completes the first valid call."""
        return None if self.valid is None else len(set(self.steps[: self.valid + 1]))

    @property
    def overhead_tokens(self) -> int | None:
        """Tokens before the first call opens."""
        return self.opened


class RequestClock:
    """Records one request, token by token.

    Args:
        parser: of the model's call format; None where no calls are watched.
        tools: the tools on offer.
        should_call: whether the expected answer calls one.
        clock: a monotonic clock in seconds; tests inject a scripted one.
        detokenizer: for events without text.
    """

    def __init__(
        self,
        parser: Parser | None = None,
        tools: Sequence[dict[str, Any]] = (),
        *,
        should_call: bool = True,
        clock: Clock = time.perf_counter,
        detokenizer: Detokenizer | None = None,
    ):
        self._clock, self._tools, self._detokenizer = clock, tools, detokenizer
        self._cursor = Cursor(parser, tools) if parser else None
        self._times: list[float] = []
        self._steps: list[int] = []
        self._timing = Timing(should_call=should_call)
        self._began = clock()

    def mark(self, phase: str) -> None:
        """End of "tokenize" or "prefill"."""
        if phase not in ("tokenize", "prefill"):
            raise ValueError(f"unknown phase {phase!r}")
        self._timing = replace(self._timing, **{phase: self._clock() - self._began})  # type: ignore[arg-type]

    def token(self, token: int, text: str | None = None, *, step: int | None = None, at: float | None = None) -> None:
        """One token arrived on the host.

        Args:
            token: its id.
            text: the text that became certain with it; None asks the detokenizer.
            step: number of the model step that brought it; None is a step of its own.
            at: the clock's reading when it arrived; None reads the clock now.
        """
        now = self._clock() if at is None else at
        self._times.append(now - self._began)
        self._steps.append(step if step is not None else len(self._steps))
        if self._cursor is None or self._timing.valid is not None:
            return
        if text is None:
            text = self._detokenizer.add(token) if self._detokenizer else ""
        if text:
            self._watch(self._cursor, text)

    def _watch(self, cursor: Cursor, text: str) -> None:
        found = cursor.feed(text)
        index = len(self._times) - 1
        if self._timing.opened is None and cursor.opened is not None:
            self._timing = replace(self._timing, opened=index)
        if any(call for item in found for call in item.calls if schema.fault(call, self._tools) is None):
            self._timing = replace(self._timing, valid=index)

    def finish(self) -> Timing:
        """The whole observation."""
        return replace(self._timing, tokens=len(self._times), times=tuple(self._times), steps=tuple(self._steps))


@dataclass
class Summary:
    """Collects timings of a run; the first ``warm_up`` requests are counted but not used."""

    warm_up: int = 0
    timings: list[Timing] = field(default_factory=list)

    def add(self, timing: Timing) -> None:
        """Append one request."""
        self.timings.append(timing)

    def metrics(self, device: str) -> dict[str, Metric]:
        """Percentiles over requests; see the module for what each is."""
        used = self.timings[self.warm_up :]
        calls = [timing for timing in used if timing.should_call]
        gaps = [gap * 1e3 for timing in used for gap, _ in timing.gaps]
        return {
            "ttft": _milliseconds((t.ttft for t in used), device),
            "tokenize": _milliseconds((t.tokenize for t in used), device),
            "prefill": _milliseconds((_between(t.tokenize, t.prefill) for t in used), device),
            "first_step": _milliseconds((t.first_step for t in used), device),
            "tpot": _milliseconds((t.tpot for t in used), device),
            "itl": from_samples(gaps, "ms", method="measured", device=device),
            "tps": _observed((t.tps for t in used), "tokens/s", device),
            "ttfa_ms": _censored([None if t.ttfa is None else t.ttfa * 1e3 for t in calls], "ms", device),
            "ttfa_tokens": _censored([t.ttfa_tokens for t in calls], "tokens", device),
            "ttfa_steps": _censored([t.ttfa_steps for t in calls], "steps", device),
            "overhead_tokens": _censored([t.overhead_tokens for t in calls], "tokens", device),
        }


def _between(start: float | None, end: float | None) -> float | None:
    return end if end is None or start is None else end - start


def _milliseconds(values: Iterable[float | None], device: str) -> Metric:
    return _observed((None if v is None else v * 1e3 for v in values), "ms", device)


def _observed(values: Iterable[float | None], unit: str, device: str) -> Metric:
    """Where a value does not exist (one token has no interval) there is nothing to censor."""
    return from_samples([v for v in values if v is not None], unit, method="measured", device=device)


def _censored(values: Sequence[float | None], unit: str, device: str) -> Metric:
    seen = [v for v in values if v is not None]
    missing = len(values) - len(seen)
    note = f"{missing} of {len(values)} requests never got there" if missing else None
    return from_samples(seen, unit, method="measured", device=device, censored=missing, note=note)
