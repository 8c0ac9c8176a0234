"""Rounds on a real model in fresh processes, a real server, and the arithmetic of what is reported."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_server import model_server

from bench import rounds, workloads
from bench.runners import endpoint
from bench.runners._job import Job
from bench.runners._local import Drive, samples
from mlxkd.decode.opening import open_worker
from mlxkd.errors import UserError
from mlxkd.evaluation.clocks import RequestClock, Timing


@pytest.fixture(scope="module")
def speed(stories_model: Path) -> Any:
    job = Job(kind="mlx", location=str(stories_model), workload="offline", requests=6, max_tokens=12, batch=2)
    return rounds.measure({"a": job, "b": job}, rounds=2)


def test_rounds_interleave_fresh_processes_and_agree(speed: Any) -> None:
    report, outcomes = speed
    assert [(r.index, r.target) for r in sorted(report.rounds, key=lambda r: (r.index, r.target))] == [
        (0, "a"), (0, "b"), (1, "a"), (1, "b")
    ]  # fmt: skip
    answers = [tuple(o.answers) for made in outcomes.values() for o in made]
    assert len(set(answers)) == 1 and all(answers[0])
    assert all(r.counters["batch"] == 2 for r in report.rounds)
    assert report.target("a").artefact == report.target("b").artefact
    assert report.target("a").backend == "mlx cpu"


def test_figures_are_the_percentiles_of_the_samples(speed: Any) -> None:
    report, _ = speed
    values = [v for r in report.rounds if r.target == "a" for v in r.samples["tpot_ms"]]
    figure = report.figures["a"]["tpot_ms"]
    assert figure["p95"] == np.quantile(values, 0.95, method="inverted_cdf") and figure["method"] == "measured"
    assert figure["n"] == len(values) == 12


def test_phases_add_up_to_the_first_token(speed: Any) -> None:
    report, _ = speed
    for found in report.rounds:
        parts = zip(*(found.samples[k] for k in ("tokenize_ms", "prefill_ms", "first_step_ms")), strict=True)
        for total, row in zip(found.samples["ttft_ms"], parts, strict=True):
            assert total == pytest.approx(sum(row), rel=1e-6)


def test_a_queue_counts_waiting(speed: Any) -> None:
    """Six requests on two rows: the last two wait for two others, so they end about three times as late."""
    report, _ = speed
    ends = report.rounds[0].samples["request_ms"]
    assert min(ends[4:]) > max(ends[:2]) * 1.5


def test_rows_are_chosen_once_by_the_policy_of_generate(
    stories_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two fresh processes: the second finds what the first measured, to the last digit."""
    monkeypatch.setenv("MLXKD_BATCH_POLICY", str(tmp_path / "policy.json"))
    job = Job(kind="mlx", location=str(stories_model), workload="offline", requests=6, max_tokens=4)
    first, second = rounds.run_job(job), rounds.run_job(job)
    (kept,) = json.loads((tmp_path / "policy.json").read_text()).values()
    assert first.details["rows"] == second.details["rows"] == kept["explanation"]
    assert [m["batch"] for m in kept["measurements"]] == [1, 2, 4]
    assert first.counters["batch"] == second.counters["batch"] == kept["batch"]
    alone = rounds.run_job(job.model_copy(update={"workload": "interactive"}))
    assert alone.counters["batch"] == 1 and "rows" not in alone.details


def test_prompts_that_wait_together_share_a_forward(stories_model: Path) -> None:
    job = Job(kind="mlx", location=str(stories_model), workload="offline", requests=5, max_tokens=3, batch=4)
    drive = Drive(open_worker(str(stories_model)), job)
    session = drive.worker.session(4)
    taking: list[int] = []
    extend = session.extend

    def watched(tokens: Any, counts: Any = None) -> Any:
        taking.append(int(np.count_nonzero(counts)))
        return extend(tokens, counts)

    session.extend = watched  # type: ignore[method-assign]
    timings, texts = drive.run(drive.engine(session), drive.load.cases)
    assert taking[0] == 4 and len(timings) == len(texts) == 5
    assert all(t.tokens == 3 and 0 < t.tokenize < t.prefill < t.times[0] for t in timings)


def test_a_round_that_cannot_run_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such model folder"):
        rounds.run_job(Job(kind="mlx", location=str(tmp_path / "nothing"), workload="interactive"))


@pytest.mark.parametrize("name", workloads.names())
def test_workloads_have_a_stable_identity(name: str) -> None:
    load = workloads.load(name)
    assert load.identity().hash == workloads.load(name).identity().hash
    assert load.identity().hash != workloads.load(name, max_tokens=63, requests=3).identity().hash
    assert load.cases


def test_unknown_workloads_name_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown workload 'interactiv'[\s\S]*did you mean 'interactive'"):
        workloads.load("interactiv")


def test_series_leave_out_the_impossible_and_keep_the_censored() -> None:
    one = Timing(should_call=True, tokens=1, times=(0.5,), steps=(0,))
    two = Timing(should_call=True, tokens=3, times=(0.1, 0.2, 0.4), steps=(0, 1, 2), valid=2, opened=0)
    found = samples([one, two])
    assert found["tpot_ms"] == [pytest.approx(150)]
    assert found["ttfa_ms"] == [None, pytest.approx(400)] and found["ttfa_tokens"] == [None, 3]
    assert found["ttft_ms"] == [500, 100]


def test_the_clock_costs_less_than_one_percent(speed: Any) -> None:
    """Cost of recording a token, against the fastest step of the smallest real model."""
    clock, n = RequestClock(), 5000
    started = time.perf_counter()
    for _ in range(n):
        clock.token(1, "x", step=0, at=0.0)
    cost = (time.perf_counter() - started) / n * 1e3
    fastest = min(v for r in speed[0].rounds for v in r.samples["itl_ms"])
    assert cost < 0.01 * fastest


def test_kinds_of_targets(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    assert rounds.kind_of(str(tmp_path)) == "bundle"
    assert rounds.kind_of("http://localhost:1/v1") == "endpoint" and rounds.kind_of("runs/x") == "mlx"


WEATHER = {"function": {"name": "get_weather", "arguments": '{"city": "Oslo", "day"'}, "index": 0}
REST = {"index": 0, "function": {"arguments": ': "now"}'}}
STREAM = [
    (0.1, b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\ndata: {"choices": [{"del'),
    (0.2, b'ta": {"content": "Hi"}}], "system_fingerprint": "fp1"}\n'),
    (0.3, f"data: {json.dumps({'choices': [{'delta': {'tool_calls': [WEATHER]}}]})}\r\n: keep-alive\n".encode()),
    (0.4, f"data: {json.dumps({'choices': [{'delta': {'tool_calls': [REST]}}]})}\n".encode()),
    (0.5, b'data: {"choices": [], "usage": {"completion_tokens": 9, "prompt_tokens": 30}}\ndata: [DONE]\n'),
]


def test_a_stream_is_read_by_arrival_not_by_chunk() -> None:
    reply = endpoint.Reply()
    for at, line in endpoint.lines(iter(STREAM)):
        endpoint.take(reply, at, line, workloads.TOOLS)
    assert (reply.first, reply.last, reply.valid) == (0.2, 0.4, 0.4)
    assert (reply.tokens, reply.prompt_tokens, reply.fingerprint) == (9, 30, "fp1")
    assert reply.parsed()[0].arguments == {"city": "Oslo", "day": "now"}
    series = endpoint.samples([reply], workloads.load("interactive").cases[:1])
    assert series["tpot_ms"] == [pytest.approx(200 / 8)] and series["ttfa_ms"] == [pytest.approx(400)]
    with pytest.raises(UserError, match="not JSON"):
        endpoint.take(reply, 0.1, b"data: {", ())


def test_drift_names_the_first_differing_request() -> None:
    assert endpoint.drift([["a", "b"], ["a", "b"]]) == (1.0, None)
    assert endpoint.drift([["a", "b", "c"], ["a", "x", "c"]]) == (pytest.approx(2 / 3), 1)


@pytest.fixture(scope="module")
def server(stories_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real mlx_lm.server."""
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    log = tmp_path_factory.mktemp("server") / "log"
    with model_server(stories_model, log, "--chat-template", template) as base:
        yield base


def test_a_real_server_is_measured_and_deterministic(server: str, stories_model: Path) -> None:
    job = Job(kind="endpoint", location=server, workload="prefill", requests=2, model=str(stories_model), passes=2)
    found = rounds.run_job(job.model_copy(update={"workload": "interactive", "max_tokens": 8, "requests": 2}))
    assert len(found.samples["ttft_ms"]) == 2 and all(v and v > 0 for v in found.samples["ttft_ms"])
    assert endpoint.drift(found.passes) == (1.0, None)
    assert found.details["fingerprints"] != ["None"]
    assert found.samples["ttfa_ms"] == [None, None]  # the story model calls no tool: censored, not dropped
    assert found.device == f"endpoint {server}"
