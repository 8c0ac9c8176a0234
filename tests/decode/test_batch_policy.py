"""The batch policy's rule, memory and words; queues that finish unevenly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from table_session import PlainTokenizer, Table, TableSession

from mlxkd.decode.engine import Engine
from mlxkd.decode.generate import collect, complete
from mlxkd.decode.mlx_session import MlxSession
from mlxkd.decode.policy import (
    PolicyCache,
    QueueMeasurement,
    choose,
    hardware_profile,
    measure_queue,
    measure_sizes,
    offline_choice,
)
from mlxkd.decode.requests import GenerateOptions, Request
from mlxkd.errors import UserError

BASE = QueueMeasurement(1, 100.0, 10.0)


@pytest.mark.parametrize(
    ("two", "four", "batch", "words"),
    [
        ((150.0, 7.0), (240.0, 5.0), 4, "batch 4: 240 tokens/s (2.40x), p95 completion 0.50x"),
        ((150.0, 7.0), (240.0, 11.5), 2, "batch 4: 240 tokens/s (2.40x), p95 completion 1.15x: delays more than 10%"),
        ((109.0, 9.5), (105.0, 9.9), 1, "batch 2: 109 tokens/s (1.09x), p95 completion 0.95x: gains less than 10%"),
        ((150.0, 7.0), (140.0, 7.5), 2, "offline: batch 2."),
    ],
)
def test_offline_takes_the_fastest_that_keeps_both_promises(two: Any, four: Any, batch: int, words: str) -> None:
    choice = choose("offline", [BASE, QueueMeasurement(2, *two), QueueMeasurement(4, *four)])
    assert choice.batch == batch and words in choice.explanation


def test_interactive_is_always_one() -> None:
    choice = choose("interactive", [BASE, QueueMeasurement(4, 999.0, 1.0)])
    assert choice.batch == 1 and "nobody waits" in choice.explanation
    with pytest.raises(UserError, match="unknown workload 'ofline'"):
        choose("ofline")
    with pytest.raises(UserError, match="needs a measurement of one row"):
        choose("offline", [QueueMeasurement(2, 1.0, 1.0)])


def queue(lengths: tuple[int, ...]) -> list[Request]:
    return [Request((i % 4, 1), GenerateOptions(n), str(i)) for i, n in enumerate(lengths)]


def test_choices_are_measured_once_per_hardware_and_model(tmp_path: Path) -> None:
    opened: list[int] = []

    def open_engine(batch: int) -> Engine:
        opened.append(batch)
        return Engine(TableSession(Table(4, seed=1), batch), PlainTokenizer())

    cache = PolicyCache(tmp_path / "policy.json")
    requests = queue((5, 9, 3, 7))
    first = offline_choice(cache, "m", open_engine, requests)
    assert offline_choice(cache, "m", open_engine, requests) == first and opened == [1, 2, 4]
    assert [m.batch for m in first.measurements] == [1, 2, 4] and first.batch in (1, 2, 4)
    assert hardware_profile("m", (1, 2, 4)) != hardware_profile("n", (1, 2, 4))
    offline_choice(cache, "n", open_engine, requests)
    assert len(opened) == 6
    (tmp_path / "policy.json").write_text("{")
    with pytest.raises(UserError, match="no batch policy"):
        cache.get("x")
    with pytest.raises(UserError, match="leave out 1"):
        measure_sizes(open_engine, requests, (2, 4))


def test_a_queue_measurement_counts_waiting() -> None:
    one = measure_queue(Engine(TableSession(Table(4, seed=1)), PlainTokenizer()), queue((40, 40, 40, 40)))
    assert one.batch == 1 and one.throughput * one.p95_completion == pytest.approx(160, rel=0.2)


def test_requests_move_down_when_the_queue_runs_dry(stories: Any) -> None:
    """Rows that end early leave gaps; moving the last request into a gap must not change its answer."""
    model, tokenizer, config = stories
    requests = [Request((1, 300 + i), GenerateOptions(n), str(i)) for i, n in enumerate((3, 20, 5, 25))]
    session = MlxSession(model, config, batch_size=4)
    engine = Engine(session, tokenizer)
    widths = []
    inner = session.model

    class Watching:
        model_type = inner.model_type

        def __call__(self, tokens: Any, **given: Any) -> Any:
            widths.append(tokens.shape[0])
            return inner(tokens, **given)

    session.model = Watching()
    together = collect(engine.run(requests))
    assert set(widths[1:]) >= {4, 2, 1} and widths[-1] == 1
    for request in requests:
        alone = complete(Engine(MlxSession(model, config), tokenizer), request.prompt, request.options)
        assert together[request.name].tokens == alone.tokens
