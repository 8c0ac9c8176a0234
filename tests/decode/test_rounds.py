"""Rounds of the engine: prompts admitted together, and forwards that start before their tokens were read."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from decode_models import tiny
from table_session import PlainTokenizer, Table, TableSession

from mlxkd.decode.draft_length import FixedLength
from mlxkd.decode.drafting import ModelDrafter, NgramDrafter
from mlxkd.decode.engine import Engine
from mlxkd.decode.generate import collect, complete
from mlxkd.decode.mlx_session import MlxSession
from mlxkd.decode.prompt_cache import PromptCache
from mlxkd.decode.requests import GenerateOptions, Request
from mlxkd.errors import UserError


class Recording(MlxSession):
    """Keeps the shape of each call and whether its tokens came from the device."""

    def extend(self, tokens: Any, counts: Any = None) -> Any:
        calls = self.__dict__.setdefault("calls", [])
        calls.append((tokens.shape, isinstance(tokens, mx.array), np.flatnonzero(counts).tolist()))
        return super().extend(tokens, counts)


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return (1, *np.random.default_rng(seed).integers(3, 60, length - 1).tolist())


def alone(name: str, requests: list[Request]) -> dict[str, tuple[int, ...]]:
    """Answers of rows without mates whose every forward waits for the host."""
    model, config = tiny(name)
    session = MlxSession(model, config)
    session.takes_device_tokens = False
    return {r.name: complete(Engine(session, PlainTokenizer()), r.prompt, r.options).tokens for r in requests}


@pytest.mark.parametrize("name", ["llama", "gemma3", "lfm2"])
def test_running_ahead_changes_no_answer(name: str) -> None:
    """Stop tokens end rows at rounds that nothing foretells, so that forwards on their way lose rows."""
    model, config = tiny(name)
    found = alone(name, [Request(prompt(5, i), GenerateOptions(14, stop_tokens=frozenset()), str(i)) for i in range(7)])
    options = [GenerateOptions(14, stop_tokens=frozenset(found[str(i)][6 + i % 3 : 7 + i % 3])) for i in range(7)]
    requests = [Request(prompt(5, i), options[i], str(i)) for i in range(7)]
    expected = alone(name, requests)
    session = Recording(model, config, batch_size=3)
    engine = Engine(session, PlainTokenizer())
    for _ in range(2):  # the second queue meets what the first left on its way
        got = collect(engine.run(requests))
        assert {name: got[name].tokens for name in expected} == expected
    assert sum(device for _, device, _ in session.calls) > len(session.calls) // 4


def test_drafting_nothing_runs_ahead_like_plain_decoding() -> None:
    """With a drafter whose length is 0 the worker gets the very same calls as without one."""
    model, config = tiny("llama")
    requests = [Request(prompt(5, i), GenerateOptions(14, stop_tokens=frozenset()), str(i)) for i in range(3)]
    calls: list[Any] = []
    plain: dict[str, Any] = {}
    for drafting in (plain, {"drafter": NgramDrafter(), "length": FixedLength(0)}):
        session = Recording(model, config, batch_size=3)
        got = collect(Engine(session, PlainTokenizer(), **drafting).run(requests))
        assert {name: answer.tokens for name, answer in got.items()} == alone("llama", requests)
        calls.append(session.calls)
    assert calls[0] == calls[1] and sum(device for _, device, _ in calls[1]) > 8


def test_a_length_chosen_ahead_is_the_one_that_is_used() -> None:
    """Drafts and plain rounds by turns: each choice is asked for once and told of with its own outcome."""

    class ByTurns:
        def __init__(self) -> None:
            self.chosen: list[int] = []
            self.told: list[int] = []

        def choose(self) -> int:
            self.chosen.append((0, 0, 0, 2, 0)[len(self.chosen) % 5])
            return self.chosen[-1]

        def observe(self, asked: int, drafted: int, accepted: int, draft_seconds: float, verify_seconds: float) -> None:
            assert accepted <= drafted <= asked
            self.told.append(asked)

    model, config = tiny("llama")
    requests = [Request(prompt(5), GenerateOptions(30, stop_tokens=frozenset()))]
    session = Recording(model, config)
    session.takes_device_tokens = True
    length = ByTurns()
    drafter = ModelDrafter(MlxSession(model, config))
    got = collect(Engine(session, PlainTokenizer(), drafter=drafter, length=length).run(requests))
    assert got["0"].tokens == alone("llama", requests)["0"]
    assert length.told == length.chosen and 2 in length.told
    assert any(device for _, device, _ in session.calls)


def test_the_first_token_waits_for_no_second_forward() -> None:
    model, config = tiny("llama")
    session = Recording(model, config)
    session.takes_device_tokens = True
    engine = Engine(session, PlainTokenizer())
    engine.admit(Request(prompt(6), GenerateOptions(4)))
    engine.step()
    assert [device for _, device, _ in session.calls] == [False, False]
    engine.step()
    assert [device for _, device, _ in session.calls] == [False, False, False, True]


def test_a_cancelled_row_leaves_a_round_on_its_way() -> None:
    model, config = tiny("llama")
    engine = Engine(MlxSession(model, config, batch_size=2), PlainTokenizer())
    requests = [Request(prompt(4, i), GenerateOptions(9), str(i)) for i in range(3)]
    expected = alone("llama", requests)
    engine.admit(*requests[:2])
    events = [event for _ in range(3) for event in engine.step()]
    engine.cancel(0)
    engine.admit(requests[2])
    events += engine.run([])
    got = collect(events)
    assert got["1"].tokens == expected["1"] and got["2"].tokens == expected["2"] and len(got["0"].tokens) == 3


def test_prompts_share_forwards_while_padding_is_small() -> None:
    model, config = tiny("llama")
    session = Recording(model, config, batch_size=4)
    engine = Engine(session, PlainTokenizer())
    sizes = (9, 12, 10, 8)
    rows = engine.admit(*(Request(prompt(n, n), GenerateOptions(3), str(n)) for n in sizes))
    assert rows == [0, 1, 2, 3] and [call[0] for call in session.calls] == [(4, 11)]
    requests = [Request(prompt(n, n), GenerateOptions(3), str(n)) for n in sizes]
    assert {n: c.tokens for n, c in collect(engine.run([])).items()} == alone("llama", requests)
    session.calls.clear()
    engine.admit(*(Request(prompt(n, n), GenerateOptions(3), str(n)) for n in (40, 3, 2)))
    assert [call[2] for call in session.calls] == [[0], [1, 2]]


def test_with_a_cache_each_prompt_finds_the_one_before() -> None:
    session = TableSession(Table(4, seed=1), 3)
    engine = Engine(session, PlainTokenizer(), cache=PromptCache(1 << 20).for_model("table"))
    shared = (1, 2, 3, 1, 2, 3, 0, 1)
    engine.admit(*(Request((*shared, last), GenerateOptions(2), str(last)) for last in (1, 2, 3)))
    assert engine.statistics.cached_tokens == 2 * len(shared)


def test_requests_beyond_the_free_rows_are_refused_before_anything_happens() -> None:
    engine = Engine(TableSession(Table(4, seed=1), 2), PlainTokenizer())
    with pytest.raises(UserError, match="too few rows are free"):
        engine.admit(*(Request((1, 2), GenerateOptions(2), str(i)) for i in range(3)))
    with pytest.raises(UserError, match="the prompt is empty"):
        engine.admit(Request((1,)), Request(()))
    assert not engine.rows and not engine.session.lengths.any()
