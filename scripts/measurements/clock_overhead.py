"""What the clocks of ``evaluate`` and ``bench`` cost: the same answers with and without them, and one token of a clock.

Two real models, greedy, one request at a time, prompts from a cache: the embedded teacher on demo requests (its calls
are parsed and held against their schemas as they come) and stories260K, whose tokens are the fastest that any model
here makes. The same answers are decoded in turns, bare and through the loop that all clocked answers take; of every
token the fastest turn counts. Their difference is smaller than the noise of most machines, so the events of these
answers are also replayed through the clock alone, against the fastest token of all bare turns.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxkd import compat
from mlxkd.data.render import prompt_text
from mlxkd.decode.engine import Engine
from mlxkd.decode.mlx_session import MlxSession
from mlxkd.decode.prompt_cache import PromptCache
from mlxkd.decode.requests import Event, GenerateOptions, Request
from mlxkd.demo import DEMO_TEACHER, world
from mlxkd.evaluation.answers import cut_to_answers
from mlxkd.evaluation.clocks import RequestClock
from mlxkd.evaluation.speed import run_timed
from mlxkd.evaluation.toolcalls.parsing import Parser, parser_for
from mlxkd.metric import Metric
from mlxkd.runtime import device_name

DATA = Path(os.environ.get("MLXKD_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


@dataclass(frozen=True)
class Work:
    """A model and what it is asked; ``tools`` are those on offer, by the name of the request."""

    engine: Engine
    parser: Parser
    requests: Sequence[Request]
    tools: dict[str, Sequence[dict[str, Any]]]

    def clock(self, name: str) -> RequestClock:
        return RequestClock(self.parser, self.tools[name])

    def bare(self) -> np.ndarray:
        """Seconds of each token after its request's first."""
        return gaps([[event.time_ns * 1e-9 for event in own] for own in self.events().values()])

    def clocked(self) -> np.ndarray:
        """The same tokens under clocks."""
        timed = run_timed(self.engine, ((request, self.clock(request.name)) for request in self.requests))
        return gaps([timing.times for timing, _ in timed])

    def events(self) -> dict[str, list[Event]]:
        """What the engine says of each request."""
        found: dict[str, list[Event]] = {request.name: [] for request in self.requests}
        for event in self.engine.run(self.requests):
            found[event.request].append(event)
        return found


def gaps(times: Sequence[Sequence[float]]) -> np.ndarray:
    """Between the tokens of each request."""
    return np.concatenate([np.diff(own) for own in times])


def measure(quick: bool) -> dict[str, Metric]:
    """Shares of generation time, and microseconds of a token."""
    count, rounds = (3, 4) if quick else (8, 24)
    out: dict[str, Metric] = {}
    for name, work in (("demo", _demo(count)), ("stories260k", _stories(count))):
        events = work.events()
        turns: dict[str, list[np.ndarray]] = {"bare": [], "clocked": []}
        for turn in range(rounds):
            sides = [("bare", work.bare), ("clocked", work.clocked)]
            for side, run in sides if turn % 2 else reversed(sides):
                turns[side].append(run())
        bare, clocked = (np.stack(turns[side]).min(0) for side in ("bare", "clocked"))
        again = [np.stack(turns["bare"][half::2]).min(0).sum() for half in (0, 1)]
        event, device, n = event_seconds(work, events), device_name(), len(bare)
        note = f"of the fastest token, {bare.min() * 1e3:.2f} ms; at most 0.01 is asked"
        out[f"overhead_{name}"] = Metric(event / float(bare.min()), "share", "measured", device, n, note=note)
        note = f"{rounds} turns each; one half of the bare turns over the other: {again[0] / again[1] - 1:+.3f}"
        share = float(clocked.sum() / bare.sum()) - 1
        out[f"interleaved_{name}"] = Metric(share, "share", "measured", device, n, note=note)
        out[f"event_{name}"] = Metric(event * 1e6, "us/token", "measured", device, n)
    return out


def event_seconds(work: Work, events: dict[str, list[Event]], repeats: int = 30) -> float:
    """Least time of a clock per token: made, told of every event and finished."""
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        for name, own in events.items():
            clock = work.clock(name)
            for event in own:
                clock.token(event.token, event.text, step=event.forward, at=event.time_ns * 1e-9)
            clock.finish()
        best = min(best, time.perf_counter() - started)
    return best / sum(map(len, events.values()))


def _demo(count: int) -> Work:
    model, tokenizer, _ = compat.load(DEMO_TEACHER)
    cases = [cut_to_answers(record)[0] for record in world.conversations("known", 70_000, count)]
    texts = [prompt_text(list(case["messages"][:-1]), tokenizer, case["tools"]) for case in cases]
    tools = [case["tools"] for case in cases]
    return _work(model, tokenizer, texts, tools, 64)


def _stories(count: int) -> Work:
    model, tokenizer, _ = compat.load(DATA / "stories260K")
    story = (DATA / "tinystories" / "stories.txt").read_text(encoding="utf-8")
    texts = [story[start : start + 60] for start in range(0, 60 * count, 60)]
    tools = [next(iter(world.conversations("known", 70_000, 1)))["tools"]] * count
    return _work(model, tokenizer, texts, tools, 192)


def _work(model: Any, tokenizer: Any, texts: Sequence[str], tools: Sequence[Any], longest: int) -> Work:
    options = GenerateOptions(max_tokens=longest, stop_after_tool_call=False)
    requests = [
        Request(tuple(tokenizer.encode(text, add_special_tokens=False)), options, str(i))
        for i, text in enumerate(texts)
    ]
    offers = {request.name: offer for request, offer in zip(requests, tools, strict=True)}
    cache = PromptCache(1 << 30).for_model("this process")
    return Work(Engine(MlxSession(model), tokenizer, cache=cache), parser_for(tokenizer), requests, offers)
