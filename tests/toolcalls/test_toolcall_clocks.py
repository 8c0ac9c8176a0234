"""Clocks under a scripted stream and a scripted clock: every figure is exact."""

from __future__ import annotations

import math
import time

import pytest
from call_texts import TEXTS, TOOLS, one, two

from mlxkd.evaluation.clocks import RequestClock, Summary, Timing
from mlxkd.evaluation.toolcalls.parsing import parser_named


class FakeClock:
    """Moves only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def play(pieces: list[str], *, name: str = "json_tools", steps: list[int] | None = None, **options: bool) -> Timing:
    """Tokenize 1 s, prefill 4 s, then one token each quarter second (a burst shares its instant)."""
    clock = FakeClock()
    request = RequestClock(parser_named(name), TOOLS, clock=clock, **options)
    clock.now += 1
    request.mark("tokenize")
    clock.now += 4
    request.mark("prefill")
    for i, piece in enumerate(pieces):
        if steps is None or i == 0 or steps[i] != steps[i - 1]:
            clock.now += 0.25
        request.token(i, piece, step=None if steps is None else steps[i])
    return request.finish()


def chunks(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize("before", ["", "Let me look that up first. "])
@pytest.mark.parametrize("name", TEXTS)
def test_time_to_the_first_valid_call_is_exact(name: str, before: str, size: int) -> None:
    text = before + two(name) + " That is all."
    # A block of one list of calls is complete with its closing marker, other blocks with the first call.
    closing = before + (two(name) if name == "pythonic" else _first(name))
    timing = play(chunks(text, size), name=name)
    last = -(-len(closing) // size)
    assert timing.ttfa_tokens == timing.ttfa_steps == last
    assert timing.ttfa == 5 + 0.25 * last
    opening = parser_named(name).grammar.open
    assert timing.overhead_tokens == -(-(len(before) + text[len(before) :].index(opening) + len(opening)) // size) - 1


def _first(name: str) -> str:
    opening, weather, _, _, _ = TEXTS[name]
    shared = name in ("minimax_m2", "muse_spark", "kimi_k2", "kimi_k3", "mistral", "minicpm5")
    return opening + weather if shared else one(name)


def test_phases_and_rates() -> None:
    timing = play(["a", "b", "c", "d"])
    assert (timing.tokenize, timing.prefill, timing.ttft, timing.first_step) == (1, 5, 5.25, 0.25)
    assert (timing.tpot, timing.tps) == (0.25, 4.0)
    assert timing.gaps == [(0.25, 1)] * 3
    assert timing.ttfa is None and timing.overhead_tokens is None


def test_a_burst_is_one_gap_of_many_tokens() -> None:
    timing = play(["a", "b", "c", "d", "e"], steps=[7, 8, 8, 8, 9])
    assert timing.gaps == [(0.25, 3), (0.25, 1)]
    assert timing.tpot == 0.5 / 4 and timing.tps == 8
    assert timing.times[1] == timing.times[3]


def test_steps_count_model_steps_not_tokens() -> None:
    pieces = chunks(one("json_tools"), 10)
    timing = play(pieces, steps=[i // 3 for i in range(len(pieces))])
    assert timing.ttfa_tokens == len(pieces)
    assert timing.ttfa_steps == -(-len(pieces) // 3)


def test_only_a_call_that_satisfies_its_schema_counts() -> None:
    wrong = '<tool_call>{"name": "get_weather", "arguments": {"days": 3}}</tool_call>'
    unknown = '<tool_call>{"name": "get_wether", "arguments": {"city": "x"}}</tool_call>'
    timing = play([wrong, unknown, one("json_tools")])
    assert (timing.overhead_tokens, timing.ttfa_tokens) == (0, 3)
    assert play([wrong, unknown]).ttfa is None


def test_requests_without_a_valid_call_are_censored_never_dropped() -> None:
    summary = Summary(warm_up=1)
    for pieces, should in [
        (["warm-up"] * 50, True),
        ([one("json_tools")], True),
        (["x", one("json_tools")], True),
        (["no"], True),
        (["fine"], False),
    ]:
        summary.add(play(pieces, should_call=should))
    figures = summary.metrics("test CPU")
    ttfa = figures["ttfa_tokens"]
    assert (ttfa.n, ttfa.censored, ttfa.p50, ttfa.p90, ttfa.p95) == (3, 1, 2, math.inf, math.inf)
    assert ttfa.note == "1 of 3 requests never got there"
    assert figures["ttft"].n == 4 and figures["ttft"].p50 == 5250
    assert figures["prefill"].value == 4000 and figures["tokenize"].value == 1000
    assert figures["tpot"].n == 1, "one token has no interval; that is not censoring"
    assert figures["ttfa_ms"].p50 == 5500


def test_watching_costs_little() -> None:
    """At most 1 % of generation at 200 tokens a second: 50 microseconds a token, long arguments included."""
    text = '<tool_call>{"name": "get_weather", "arguments": {"city": "' + "word " * 1500 + '"}}</tool_call>'
    pieces = chunks(text, 4)
    request = RequestClock(parser_named("json_tools"), TOOLS)
    start = time.process_time()
    for i, piece in enumerate(pieces):
        request.token(i, piece)
    assert (time.process_time() - start) / len(pieces) < 50e-6
    assert request.finish().ttfa_tokens == len(pieces)
