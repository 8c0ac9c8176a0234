"""Driving a session of any backend through a workload, with one clock per request."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from bench.power import PowerMeter
from bench.runners._job import Job, Outcome
from bench.workloads import Case, Load
from mlxkd.decode.draft_length import FixedLength
from mlxkd.decode.drafting import NgramDrafter
from mlxkd.decode.engine import Engine
from mlxkd.decode.prompt_cache import PromptCache
from mlxkd.decode.requests import GenerateOptions, Request
from mlxkd.decode.session import Session
from mlxkd.decode.tokens import Prompts
from mlxkd.errors import UserError
from mlxkd.evaluation.clocks import RequestClock, Timing
from mlxkd.evaluation.toolcalls.parsing import Parser, parser_for
from mlxkd.evaluation.toolcalls.scoring import score
from mlxkd.runtime import peak_process_memory

DRAFTED = 4  # n-gram drafts per step; verification of so few costs about one step
CACHE_BYTES = 1 << 28


class Local:
    """A loaded target: opens sessions, renders prompts, reads calls.

    ``batches`` are the numbers of rows worth trying when the batch is chosen automatically.
    """

    def __init__(self, tokenizer: Any, open_session: Any, batches: Sequence[int] = (1, 2, 4)):
        self.tokenizer, self.open_session, self.batches = tokenizer, open_session, tuple(batches)
        self.prompts = Prompts(tokenizer)
        self.parser: Parser | None = parser_for(tokenizer) if self.prompts.has_template else None

    def tokens(self, case: Case) -> tuple[int, ...]:
        """The prompt's tokens: through the chat template where there is one."""
        if self.prompts.has_template:
            return self.prompts.chat(case.messages, case.tools)
        return self.prompts.raw(case.text)

    def engine(self, session: Session, job: Job, load: Load) -> Engine:
        """A fresh engine over a session."""
        drafting: dict[str, Any] = {}
        if job.draft == "ngram":
            drafting = {"drafter": NgramDrafter(), "length": FixedLength(DRAFTED)}
        cache = PromptCache(CACHE_BYTES).for_model("this process") if load.cached else None
        return Engine(session, self.tokenizer, cache=cache, **drafting)


def drive(local: Local, engine: Engine, load: Load, cases: Sequence[Case], seed: int) -> tuple[list[Timing], list[str]]:
    """Decode all cases on the engine's rows; returns their timings and texts in order.

    With a queue every clock starts at once, so that waiting counts.
    """

    def clock(case: Case) -> RequestClock:
        return RequestClock(local.parser, case.tools, should_call=bool((case.expected or {}).get("tool_calls")))

    clocks = {i: clock(case) for i, case in enumerate(cases)} if load.queue else {}
    texts, timings = [""] * len(cases), {}
    waiting = list(range(len(cases)))[::-1]
    while waiting or engine.rows:
        while waiting and engine.free_rows:
            index = waiting.pop()
            clocks.setdefault(index, clock(cases[index]))
            prompt = local.tokens(cases[index])
            clocks[index].mark("tokenize")
            options = GenerateOptions(load.max_tokens)
            engine.admit(Request(prompt, options, str(index)))
            clocks[index].mark("prefill")
        for event in engine.step():
            index = int(event.request)
            clocks[index].token(event.token, event.text, step=event.forward, at=event.time_ns / 1e9)
            texts[index] += event.text
            if event.finish:
                timings[index] = clocks[index].finish()
    return [timings[i] for i in range(len(cases))], texts


def measure(local: Local, job: Job, *, load_seconds: float, device: str, backend: str) -> Outcome:
    """One warm-up that is thrown away, then the workload once."""
    load = job.load()
    if not load.cases:
        raise UserError("the workload has no request")
    batch = 1 if not load.queue and job.batch == "auto" else job.batch
    tried: dict[str, float] = {}
    if batch == "auto":
        batch, tried = _best_batch(local, job, load)
    session = local.open_session(int(batch))
    started = time.perf_counter()
    drive(local, local.engine(session, job, load), load, load.cases[: int(batch)], job.seed)
    first = time.perf_counter() - started
    session.rewind([0] * int(batch))
    engine = local.engine(session, job, load)
    with PowerMeter() as meter:
        started = time.perf_counter()
        timings, texts = drive(local, engine, load, load.cases, job.seed)
        wall = time.perf_counter() - started
    series = samples(timings)
    details: dict[str, Any] = {"batch_tried": tried} if tried else {}
    joules, reason = meter.joules()
    if joules is None:
        details["energy"] = reason
    else:
        series["joules_per_token"] = [joules / sum(t.tokens for t in timings)]
    counters = _counters(engine, timings, wall, int(batch))
    counters |= {"load_seconds": load_seconds, "first_run_seconds": first, "peak_bytes": float(peak_process_memory())}
    return Outcome(
        samples=series, counters=counters, answers=texts, scores=scores(local.parser, load.cases, texts),
        device=device, backend=backend, details=details,
    )  # fmt: skip


def _best_batch(local: Local, job: Job, load: Load) -> tuple[int, dict[str, float]]:
    """The batch with which the queue's 95th completion comes first, on the first eight requests."""
    tried = {}
    cases = load.cases[:8]
    for batch in local.batches:
        session = local.open_session(batch)
        drive(local, local.engine(session, job, load), load, cases[:batch], job.seed)
        session.rewind([0] * batch)
        timings, _ = drive(local, local.engine(session, job, load), load, cases, job.seed)
        ends = sorted(t.times[-1] for t in timings)
        tried[str(batch)] = ends[-(len(ends) // 20) - 1]
    return int(min(tried, key=lambda b: tried[b])), tried


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
