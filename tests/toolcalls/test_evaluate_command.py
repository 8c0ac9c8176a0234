"""`mlxkd evaluate` as a person runs it: a model folder in, figures out."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from call_texts import TOOLS
from click.testing import CliRunner, Result
from mlx.utils import tree_map
from toy_tokenizer import CHATML, tokenizer_folder

from mlxkd import compat
from mlxkd.cli import main
from mlxkd.decode.constrained import ToolGrammars
from mlxkd.evaluation import answers
from mlxkd.evaluation.answers import answer_all, write_all
from mlxkd.evaluation.speed import TimedGrammars, time_answers

CALL = {"type": "function", "function": {"name": "now", "arguments": {}}}


def conversation(ask: str, *calls: dict[str, Any]) -> dict[str, Any]:
    answer = {"role": "assistant", "content": "" if calls else "no", "tool_calls": list(calls)}
    return {"messages": [{"role": "user", "content": ask}, answer], "tools": TOOLS}


CASES = [conversation("what time is it", CALL), conversation("hello"), conversation("and now?", CALL)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a chat template; it never happens to write a call."""
    source = tokenizer_folder(tmp_path_factory.mktemp("tokenizer"), CHATML)
    config = {
        "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32,
        "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "vocab_size": 320,
        "tie_word_embeddings": True, **json.loads((source / "config.json").read_text()),
    }  # fmt: skip
    mx.random.seed(0)
    target = tmp_path_factory.mktemp("model") / "toy"
    compat.save_model_folder(target, compat.build_model(config), config, source)
    return target


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "held.jsonl"
    path.write_text("".join(json.dumps(case) + "\n" for case in CASES))
    return path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["evaluate", *map(str, arguments)])


def test_tool_calls_are_scored_and_every_set_tells_its_time(folder: Path, data: Path) -> None:
    found = run(folder, "--data", data, "--max-tokens", "4", "--json")
    assert found.exit_code == 0, found.output
    figures = json.loads(found.stdout)
    assert (figures["held/exact"]["value"], figures["held/exact"]["n"]) == (1 / 3, 3)
    assert (figures["held/missed_calls"]["value"], figures["held/missed_calls"]["n"]) == (1, 2)
    assert figures["held/false_calls"] == {**figures["held/false_calls"], "value": 0, "n": 1}
    assert "held: 3 answers in " in found.stderr


def test_the_table_shows_only_what_there_is_and_says_what_is_missing(folder: Path, data: Path) -> None:
    shown = run(folder, "--data", data, "--max-tokens", "4").stdout
    assert "held/exact (share)" in shown and "0.3333" in shown
    assert "p95" not in shown and "no answer has several" in shown
    timed = run(folder, "--data", data, "--max-tokens", "4", "--suite", "speed").stdout
    assert "p95" in timed and "ttfa_tokens" in timed and "inf" in timed


def test_one_request_is_timed_too(folder: Path, data: Path) -> None:
    """The warm-up once came out of the requests themselves: a file with one showed no figure at all."""
    found = run(folder, "--data", data, "--limit", "1", "--max-tokens", "3", "--suite", "speed", "--json")
    figures = json.loads(found.stdout)
    assert figures["ttft"]["n"] == figures["ttfa_tokens"]["n"] == figures["ttfa_tokens"]["censored"] == 1


def test_timings_account_for_the_wall_time(folder: Path) -> None:
    """Lone requests run one after the other: their clocks together are the time that passed, and no more."""
    model, tokenizer, _ = compat.load(folder)
    time_answers(model, tokenizer, CASES, max_tokens=20)
    started = time.perf_counter()
    timed = time_answers(model, tokenizer, CASES * 4, max_tokens=20)
    passed = time.perf_counter() - started
    accounted = sum(timing.times[-1] for timing, _ in timed)
    assert 0.7 * passed < accounted <= passed


def test_constrained_answers_are_valid_and_their_cost_is_counted(folder: Path) -> None:
    model, tokenizer, _ = compat.load(folder)
    grammars = TimedGrammars(ToolGrammars(tokenizer, 320, "required"))
    cases = [{**case, "tools": TOOLS[1:]} for case in CASES]  # a random model may never close a string
    given = answer_all(model, tokenizer, cases, max_tokens=150, rows=2, grammar=grammars)
    finished = [a for a in given if a.text.rstrip().endswith("</tool_call>")]
    assert finished and all(a.score.schema_valid for a in finished)
    assert len(grammars.compiling) == 1 and grammars.following > 0, "one set of tools is compiled once"
    timed = time_answers(model, tokenizer, cases, max_tokens=150, grammar=grammars)
    assert [text for _, text in timed] == [a.text for a in given]
    steps = sum(len(set(timing.steps)) for timing, _ in timed)
    assert steps < sum(timing.tokens for timing, _ in timed), "proposed tokens cost no step of their own"


def test_rows_shared_among_cores_write_what_one_core_writes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, _ = compat.load(folder)
    model.update(tree_map(lambda weight: 10 * weight, model.parameters()))  # or it repeats the prompt's last token
    asked = [{"messages": [{"role": "user", "content": "x" * (1 + n % 5)}], "tools": TOOLS} for n in range(11)]

    def written(cores: int) -> list[str]:
        monkeypatch.setattr(answers, "row_streams", lambda: [None] * cores)
        done: list[None] = []
        texts = write_all(model, tokenizer, asked, max_tokens=12, rows=4, on_answer=lambda: done.append(None))
        assert len(done) == len(asked)
        return texts

    alone = written(1)
    assert len(set(alone)) > 2
    assert [written(cores) for cores in (2, 3, 16)] == [alone] * 3


def test_a_fault_of_one_core_ends_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "row_streams", lambda: [None] * 2)
    model, tokenizer, _ = compat.load(folder)
    asked = [{"messages": [{"role": "user", "content": "x"}], "tools": []}] * 40
    told: list[None] = []

    def on_answer() -> None:
        told.append(None)
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        write_all(model, tokenizer, asked, max_tokens=4, rows=2, on_answer=on_answer)
    assert len(told) < 5


def test_without_tools_nothing_is_constrained(folder: Path) -> None:
    model, tokenizer, _ = compat.load(folder)
    plain = [{"messages": [{"role": "user", "content": "hello"}], "tools": []}]
    free = write_all(model, tokenizer, plain, max_tokens=5, rows=1)
    assert write_all(model, tokenizer, plain, max_tokens=5, rows=1, grammar=ToolGrammars(tokenizer, 320)) == free


def test_bfcl_files_are_judged_by_its_rules(folder: Path, bfcl: Path) -> None:
    """A model that never calls: right on all of irrelevance, wrong on all of the rest."""
    found = run(folder, "--data", bfcl, "--limit", "2", "--max-tokens", "2", "--json")
    assert found.exit_code == 0, found.output
    values = {key: metric["value"] for key, metric in json.loads(found.stdout).items()}
    assert values == {
        "simple_python/accuracy": 0, "multiple/accuracy": 0, "irrelevance/accuracy": 1, "non_live": 0, "irrelevance": 1
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "x"}', "no conversation with an assistant turn"),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function", "function": {"name": "f", '
         '"parameters": {"type": "object", "properties": {"a": {"type": "strin"}}}}}]}',
         "held.jsonl:1: field 'tools[0].function.parameters.properties.a.type'"),
    ],
)  # fmt: skip
def test_faults_name_file_line_and_field(folder: Path, data: Path, line: str, said: str) -> None:
    data.write_text(line + "\n")
    found = run(folder, "--data", data)
    assert found.exit_code == 2 and said in found.stderr and not found.stdout


def test_the_speed_suite_does_not_take_leaderboard_files(folder: Path, bfcl: Path) -> None:
    found = run(folder, "--data", bfcl, "--suite", "speed")
    assert found.exit_code == 2 and "times conversations" in found.stderr
