"""Driving a session of any backend through a workload, with one clock per request."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from bench.power import PowerMeter
from bench.runners._job import Job, Outcome
from bench.workloads import Case
from mlxkd.decode.draft_length import FixedLength
from mlxkd.decode.drafting import NgramDrafter
from mlxkd.decode.engine import Engine
from mlxkd.decode.opening import Worker, rows_for
from mlxkd.decode.policy import BatchChoice, choose
from mlxkd.decode.prompt_cache import PromptCache
from mlxkd.decode.requests import GenerateOptions, Request
from mlxkd.decode.session import Session
from mlxkd.decode.tokens import Prompts
from mlxkd.errors import UserError
from mlxkd.evaluation.clocks import RequestClock, Timing
from mlxkd.evaluation.speed import run_timed
from mlxkd.evaluation.toolcalls.parsing import Parser, parser_for
from mlxkd.evaluation.toolcalls.scoring import score
from mlxkd.runtime import peak_process_memory

DRAFTED = 4  # n-gram drafts per step; verification of so few costs about one step
CACHE_BYTES = 1 << 28


def prompt_of(prompts: Prompts, case: Case) -> tuple[int, ...]:
    """The prompt's tokens: through the chat template where there is one."""
    return prompts.chat(case.messages, case.tools) if prompts.has_template else prompts.raw(case.text)


class Drive:
    """A worker, the requests of a workload, and how they are decoded."""

    def __init__(self, worker: Worker, job: Job):
        self.worker, self.job, self.load = worker, job, job.load()
        self.prompts = Prompts(worker.tokenizer)
        self.parser: Parser | None = parser_for(worker.tokenizer) if self.prompts.has_template else None

    def choice(self) -> BatchChoice:
        """The rows that were asked for, or those of the batch policy that `mlxkd generate` follows."""
        if self.job.batch != "auto":
            return BatchChoice(self.job.batch, "as asked")
        if not self.load.queue:
            return choose("interactive")
        options = GenerateOptions(self.load.max_tokens)
        requests = [Request(prompt_of(self.prompts, c), options, str(i)) for i, c in enumerate(self.load.cases)]
        return rows_for("offline", self.worker, requests)

    def engine(self, session: Session) -> Engine:
        """A fresh engine over a session."""
        drafting: dict[str, Any] = {}
        if self.job.draft == "ngram":
            drafting = {"drafter": NgramDrafter(), "length": FixedLength(DRAFTED)}
        cache = PromptCache(CACHE_BYTES).for_model("this process") if self.load.cached else None
        return Engine(session, self.worker.tokenizer, cache=cache, **drafting)

    def run(self, engine: Engine, cases: Sequence[Case]) -> tuple[list[Timing], list[str]]:
        """Decode the cases on the engine's rows; timings and texts in their order.

        With a queue every clock starts at once, so that waiting counts.
        """
        clocks = map(self._clock, cases)
        started = zip(cases, list(clocks) if self.load.queue else clocks, strict=True)

        def begun() -> Iterator[tuple[Request, RequestClock]]:
            for number, (case, clock) in enumerate(started):
                prompt = prompt_of(self.prompts, case)
                clock.mark("tokenize")
                yield Request(prompt, GenerateOptions(self.load.max_tokens), str(number)), clock

        timings, texts = zip(*run_timed(engine, begun()), strict=True)
        return list(timings), list(texts)

    def _clock(self, case: Case) -> RequestClock:
        return RequestClock(self.parser, case.tools, should_call=bool((case.expected or {}).get("tool_calls")))


def measure(worker: Worker, job: Job, *, load_seconds: float, device: str, backend: str) -> Outcome:
    """One warm-up that is thrown away, then the workload once."""
    drive = Drive(worker, job)
    cases = drive.load.cases
    if not cases:
        raise UserError("the workload has no request")
    choice = drive.choice()
    session = worker.session(choice.batch)
    started = time.perf_counter()
    drive.run(drive.engine(session), cases[: choice.batch])
    first = time.perf_counter() - started
    session.rewind([0] * choice.batch)
    engine = drive.engine(session)
    with PowerMeter() as meter:
        started = time.perf_counter()
        timings, texts = drive.run(engine, cases)
        wall = time.perf_counter() - started
    series = samples(timings)
    details: dict[str, Any] = {"rows": choice.explanation} if choice.measurements else {}
    joules, reason = meter.joules()
    if joules is None:
        details["energy"] = reason
    else:
        series["joules_per_token"] = [joules / sum(t.tokens for t in timings)]
    counters = _counters(engine, timings, wall, choice.batch)
    counters |= {"load_seconds": load_seconds, "first_run_seconds": first, "peak_bytes": float(peak_process_memory())}
    return Outcome(
        samples=series, counters=counters, answers=texts, scores=scores(drive.parser, cases, texts),
        device=device, backend=backend, details=details,
    )  # fmt: skip


def _counters(engine: Engine, timings: Sequence[Timing], wall: float, batch: int) -> dict[str, float | None]:
    made = engine.statistics
    return {
        "batch": float(batch),
        "throughput": sum(t.tokens for t in timings) / wall,
        "acceptance_rate": made.acceptance_rate,
        "tokens_per_forward": made.tokens_per_forward,
        "prompt_tokens": float(made.prompt_tokens),
        "cached_tokens": float(made.cached_tokens),
    }


def samples(timings: Sequence[Timing]) -> dict[str, list[float | None]]:
    """Series of a round. What can never exist (an interval of one token) is left out; what should have, is None."""
    calls = [t for t in timings if t.should_call]
    found: dict[str, list[float | None]] = {
        "ttft_ms": [_ms(t.ttft) for t in timings],
        "tokenize_ms": [_ms(t.tokenize) for t in timings if t.tokenize is not None],
        "prefill_ms": [
            _ms(t.prefill - t.tokenize) for t in timings if t.prefill is not None and t.tokenize is not None
        ],
        "first_step_ms": [_ms(t.first_step) for t in timings if t.first_step is not None],
        "tpot_ms": [_ms(t.tpot) for t in timings if t.tpot is not None],
        "itl_ms": [_ms(gap) for t in timings for gap, _ in t.gaps],
        "tps": [t.tps for t in timings if t.tps is not None],
        "request_ms": [_ms(t.times[-1] if t.times else None) for t in timings],
        "ttfa_ms": [_ms(t.ttfa) for t in calls],
        "ttfa_tokens": [t.ttfa_tokens for t in calls],
        "ttfa_steps": [t.ttfa_steps for t in calls],
        "ttfa_overhead_tokens": [t.overhead_tokens for t in calls],
    }
    return {name: values for name, values in found.items() if values}


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def scores(parser: Parser | None, cases: Sequence[Case], texts: Sequence[str]) -> dict[str, list[float]]:
    """Tool-call scores of the cases whose answer is known."""
    if parser is None or any(case.expected is None for case in cases):
        return {}
    judged = [score([case.expected or {}], case.tools, text, parser) for case, text in zip(cases, texts, strict=True)]
    return {
        "call_exact": [float(s.exact) for s in judged],
        "schema_valid": [float(s.schema_valid) for s in judged],
        "name_ok": [float(s.name_ok) for s in judged],
    }
