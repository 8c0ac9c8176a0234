"""Whole runs through the command: what they leave, resuming after a kill, and what they refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from training_toys import quick

from mlxkd import compat, quant
from mlxkd.cli import main
from mlxkd.demo import DEMO_TEACHER
from mlxkd.errors import UserError
from mlxkd.evaluation.agreement import agreement
from mlxkd.recipe import load_recipe
from mlxkd.training import run
from mlxkd.training.callbacks import read_metrics
from mlxkd.training.setup import prepare
from mlxkd.training.terms import terms_of


def _train(out: Path, *arguments: str) -> list[str]:
    return ["train", "--out", str(out), *arguments]


@pytest.fixture(scope="module")
def finished(toy_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a baseline, its folder."""
    out = tmp_path_factory.mktemp("runs")
    arguments = _train(out, "--teacher", str(toy_teacher), *quick(evaluation__baseline="true"))
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "exactly right answers" in result.stdout and "mlxkd generate" in result.stdout
    return out / "demo"


def test_a_run_leaves_everything_a_person_needs(finished: Path) -> None:
    names = {p.name for p in finished.iterdir()}
    assert {"student", "report.html", "report.json", "metrics.jsonl", "recipe.yaml"} <= names
    report = json.loads((finished / "report.json").read_text())
    assert set(report["contenders"]) == {"teacher", "float", "student", "baseline"}
    for contender in report["contenders"].values():
        for metric in contender["metrics"].values():
            assert metric["method"] == "measured" and metric["device"]
    metadata = json.loads((finished / "student" / "mlxkd.json").read_text())
    assert metadata["recipe"] == load_recipe(finished / "recipe.yaml").identity()
    assert metadata["versions"]["mlx"] and set(metadata["grids"].values()) == {"mlx-affine4-g32"}
    html = (finished / "report.html").read_text()
    assert "<svg" in html and "http://" not in html.replace("http://www.w3.org", "")


def test_mlx_lm_loads_the_student_and_its_layers_are_packed(finished: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mlx_lm", "generate", "--model", str(finished / "student"), "--prompt", "hi", "-m", "3"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    model, config = compat.load_model(finished / "student")
    assert config["quantization"]["bits"] == 4
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == mx.uint32


def test_the_last_validation_equals_the_reloaded_student_to_the_bit(finished: Path) -> None:
    setup = prepare(load_recipe(finished / "recipe.yaml"))
    packed = quant.load_student(finished / "student")
    found = agreement(packed.model, setup.teacher, setup.valid, "cpu")
    lines = read_metrics(finished / "metrics.jsonl")
    validations = [v["valid/loss"] for v in lines if v["run"] == "student" and "valid/loss" in v]
    assert found["nll"].value == min(validations[1:])


def test_requests_are_timed_on_the_packed_kernels_at_each_validation(toy_teacher: Path, tmp_path: Path) -> None:
    arguments = quick(evaluation__timed="3", hidden="null", training__steps="4", training__evaluate_every="2")
    result = CliRunner().invoke(
        main, _train(tmp_path, "--teacher", str(toy_teacher), *arguments), catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    seen = [v for v in read_metrics(tmp_path / "demo" / "metrics.jsonl") if "valid/ttft" in v]
    assert [v["step"] for v in seen] == [2, 4]
    assert all(v["valid/ttft"] > v["valid/tpot"] > 0 for v in seen)
    assert all(v["valid/ttfa_tokens"] is None and v["valid/ttfa_tokens_censored"] > 0 for v in seen), "a random teacher"
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    figures = report["contenders"]["student"]["metrics"]
    assert figures["speed/ttft"]["n"] == 3 and figures["speed/ttfa_tokens"]["p50"] == "inf"
    with pytest.raises(UserError, match="timed: the requests are those of tool_calls"):
        load_recipe("demo", ("evaluation.timed=2", "evaluation.tool_calls=0"))


def test_student_and_baseline_saw_the_same_tokens(finished: Path) -> None:
    lines = read_metrics(finished / "metrics.jsonl")
    seen = {run: [v["tokens"] for v in lines if v["run"] == run and "tokens" in v] for run in ("student", "baseline")}
    assert seen["student"] == seen["baseline"] and len(seen["student"]) == 8


def test_hidden_states_are_matched_in_the_student_alone(finished: Path) -> None:
    lines = [v for v in read_metrics(finished / "metrics.jsonl") if "loss" in v]
    matched = {
        run: [v["loss/hidden_mse"] for v in lines if v["run"] == run and "loss/hidden_mse" in v]
        for run in ("student", "baseline")
    }
    assert len(matched["student"]) == 8 and not matched["baseline"]
    assert matched["student"][-1] < matched["student"][0]


def test_hidden_states_need_a_live_teacher() -> None:
    with pytest.raises(UserError, match="a cache holds no hidden states"):
        load_recipe("demo", ("hidden={layers: [[0, 0]]}", "teacher.cache=x"))


def _losses(folder: Path) -> list[tuple[int, float]]:
    return [(v["step"], v["loss"]) for v in read_metrics(folder / "metrics.jsonl") if "loss" in v]


def _command(out: Path, teacher: Path, *more: str) -> list[str]:
    code = "from mlxkd.cli import main; main()"
    return [sys.executable, "-c", code, *_train(out, "--teacher", str(teacher), *quick(), *more)]


def test_a_killed_run_resumes_to_the_same_curve_bit_for_bit(finished: Path, toy_teacher: Path, tmp_path: Path) -> None:
    """Killed without warning inside the quantised phase; the rest must equal a run that was never killed."""
    process = subprocess.Popen(_command(tmp_path, toy_teacher), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "demo" / "checkpoints" / "student" / "last" / "state.json"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if checkpoint.exists() and json.loads(checkpoint.read_text())["step"] >= 6:
            break
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "demo" / "report.json").exists(), "the run ended before it was killed"
    resumed = subprocess.run(_command(tmp_path, toy_teacher, "--resume"), capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    whole = _losses_of_run(finished, "student")
    assert _losses(tmp_path / "demo") == whole
    mine, theirs = (mx.load(str(p / "student" / "model.safetensors")) for p in (tmp_path / "demo", finished))
    assert all(np.array_equal(np.array(mine[k]), np.array(theirs[k])) for k in theirs)


def _losses_of_run(folder: Path, run: str) -> list[tuple[int, float]]:
    return [(v["step"], v["loss"]) for v in read_metrics(folder / "metrics.jsonl") if "loss" in v and v["run"] == run]


def test_ctrl_c_saves_and_says_how_to_go_on(toy_teacher: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        _command(tmp_path, toy_teacher, "--set", "training.steps=2000", "--set", "training.evaluate_every=2000"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = tmp_path / "demo" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(read_metrics(metrics)) < 3:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in errors and "Traceback" not in errors
    assert (tmp_path / "demo" / "checkpoints" / "student" / "last" / "arrays.safetensors").exists()


SMALL_DATA = ("--set", "data.demo={train: 40, valid: 8}")


def _refused(tmp_path: Path, *arguments: str) -> str:
    out = tmp_path / "out"
    result = CliRunner().invoke(main, _train(out, *arguments))
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.stderr
    assert not out.exists(), "a refused run must leave nothing behind"
    return result.stderr


def test_bad_data_is_named_by_file_and_line(toy_teacher: Path, tmp_path: Path) -> None:
    good = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    broken = tmp_path / "broken.jsonl"
    broken.write_text("\n".join([good] * 6 + ['{"messages": ['] + [good]))
    teacher = ("--teacher", str(toy_teacher))
    assert f"{broken}:7" in _refused(tmp_path, *teacher, "--data", str(broken))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "holds no records" in _refused(tmp_path, *teacher, "--data", str(empty))
    assert "no such data file" in _refused(tmp_path, *teacher, "--data", str(tmp_path / "nothing.jsonl"))


def test_students_that_do_not_match_their_teacher_are_refused(
    toy_teacher: Path, stories_model: Path, tmp_path: Path
) -> None:
    start = ("--set", "student={start: folder, model: " + str(stories_model) + "}", *SMALL_DATA)
    assert "vocabulary mismatch" in _refused(tmp_path, "--teacher", str(toy_teacher), *start)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads((toy_teacher / "config.json").read_text()) | {"vocab_size": 512}))
    small = ("--set", "student={start: config, model: " + str(config) + "}", *SMALL_DATA)
    said = _refused(tmp_path, "--teacher", str(toy_teacher), *small)
    assert "vocabulary of 512 is smaller" in said and "1536" in said


def test_a_quantised_student_is_refused(finished: Path, tmp_path: Path) -> None:
    start = ("--set", "student={start: folder, model: " + str(finished / "student") + "}")
    start += SMALL_DATA
    assert "already quantised" in _refused(tmp_path, "--teacher", str(finished / "student"), *start)


def test_resuming_with_another_recipe_is_refused(finished: Path, toy_teacher: Path) -> None:
    arguments = ("--teacher", str(toy_teacher), *quick(), "--set", "optimizer.learning_rate=0.5", "--resume")
    result = CliRunner().invoke(main, _train(finished.parent, *arguments))
    assert result.exit_code == 2 and "another recipe" in result.stderr


def test_the_real_model_distils_through_the_same_command(
    stories_model: Path, stories_text: Path, tmp_path: Path
) -> None:
    arguments = quick(
        student__layers="[0, 1, 4]",
        student__mlp_width="96",
        data__shapes="[[4, 128]]",
        training__steps="6",
        training__evaluate_every="6",
        data__demo="null",
    )
    result = CliRunner().invoke(
        main, _train(tmp_path, "--teacher", str(stories_model), "--data", str(stories_text), *arguments)
    )
    assert result.exit_code == 0, result.output
    assert quant.load_student(tmp_path / "demo" / "student").config["num_hidden_layers"] == 3


def test_the_unpruned_real_model_tells_its_published_story(stories_model: Path) -> None:
    arguments = ["generate", str(stories_model), "", "--raw", "--max-tokens", "200"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    expected = (stories_model / "expected_greedy.txt").read_text().strip()
    assert result.exit_code == 0
    assert result.stdout.strip().startswith(expected[:400])


def test_the_demo_tokenizer_ships_with_the_teacher() -> None:
    assert (DEMO_TEACHER / "tokenizer.model").is_file()


def test_a_cached_teacher_trains_like_the_live_one(toy_teacher: Path, tmp_path: Path) -> None:
    """On a vocabulary where the cache holds nearly all mass, first losses agree; the tail bucket is what differs."""
    arguments = ("--teacher", str(toy_teacher), *quick(training__steps="2", evaluation__tool_calls="0", hidden="null"))
    cache = tmp_path / "cache"
    for _ in range(2):  # the second call finds everything there
        taught = CliRunner().invoke(main, ["teach", *arguments, "--out", str(cache)], catch_exceptions=False)
        assert taught.exit_code == 0 and "40 texts" in taught.stdout, taught.output
    live = CliRunner().invoke(main, _train(tmp_path / "a", *arguments), catch_exceptions=False)
    cached = CliRunner().invoke(
        main, _train(tmp_path / "b", *arguments, "--set", f"teacher.cache={cache}"), catch_exceptions=False
    )
    assert live.exit_code == cached.exit_code == 0
    first = [read_metrics(tmp_path / run / "demo" / "metrics.jsonl")[0] for run in ("a", "b")]
    # Merging tokens into one bucket can only lower a KL divergence (data processing inequality).
    assert first[1]["loss/forward_kl"] <= first[0]["loss/forward_kl"] * (1 + 1e-3)
    assert first[0]["loss/cross_entropy"] == pytest.approx(first[1]["loss/cross_entropy"], rel=1e-5)


ON_POLICY = "{share: 0.6, max_tokens: 6, corrected: 0.25, replay: 0.4}"


OWN = "[{name: contrastive, options: {adaptive: true}}, {name: cross_entropy, weight: 0.2}, {name: rollout_length}]"
BY_TEACHER = "{writer: teacher, share: 0.6, max_tokens: 6, replay: 0.4}"


@pytest.mark.parametrize(("on_policy", "loss"), [(ON_POLICY, OWN), (BY_TEACHER, "[{name: cross_entropy}]")])
def test_training_on_written_text_resumes_bit_for_bit(
    toy_teacher: Path, tmp_path: Path, on_policy: str, loss: str
) -> None:
    """Interrupted by a full stop after four steps; replay buffer and the alphas' anchor are part of the checkpoint."""
    arguments = ["--teacher", str(toy_teacher), *quick(on_policy=on_policy, hidden="null", loss=loss)]
    whole = CliRunner().invoke(main, _train(tmp_path / "a", *arguments), catch_exceptions=False)
    assert whole.exit_code == 0, whole.output
    overrides = [a for a in arguments[2:] if a != "--set"]
    recipe = load_recipe("demo", (*overrides, f"teacher.model={toy_teacher}"))
    setup = prepare(recipe)
    student = setup.student
    stopped = run.make_trainer(setup, student, "student", terms_of(recipe.loss), tmp_path / "b" / "demo")
    for step in range(4):
        stopped.update(step)
    stopped.save("last")
    assert stopped.batches.replay.kept and (loss != OWN or stopped.curriculum.anchor > 0)
    rest = CliRunner().invoke(main, _train(tmp_path / "b", *arguments, "--resume"), catch_exceptions=False)
    assert rest.exit_code == 0, rest.output
    assert _losses(tmp_path / "b" / "demo") == _losses(tmp_path / "a" / "demo")[4:]


def test_several_teachers_weighted_and_routed(toy_teacher: Path, tmp_path: Path) -> None:
    loss = "[{name: forward_kl, weight: 0.5}, {name: forward_kl, weight: 0.5, teacher: second}, {name: cross_entropy}]"
    both = {"teachers": "{second: {model: " + str(toy_teacher) + "}}", "loss": loss, "hidden": "null"}
    steps = {"training__steps": "2", "evaluation__tool_calls": "0"}
    found = {}
    for name, more in (("weighted", {}), ("routed", {"routes": "{demo/train: teacher, '': second}"})):
        arguments = _train(tmp_path / name, "--teacher", str(toy_teacher), *quick(**both, **steps, **more))
        result = CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        found[name] = read_metrics(tmp_path / name / "demo" / "metrics.jsonl")[0]
    # The same teacher twice says the same twice; routed away, the second one says nothing.
    weighted, routed = found["weighted"], found["routed"]
    assert weighted["loss/forward_kl"] == pytest.approx(weighted["loss/forward_kl/second"], rel=1e-6)
    assert routed["loss/forward_kl"] == pytest.approx(weighted["loss/forward_kl"], rel=1e-6)
    assert routed["loss/forward_kl/second"] == 0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (("loss=[{name: forward_kl, teacher: second}]",), "no teacher is called 'second'; there are teacher"),
        (("routes={x: third}",), "no teacher is called 'third'"),
        (("teachers={teacher: {model: m}}",), '"teacher" is the name of the first one'),
        (("on_policy={share: 0.5}", "teacher.cache=x"), "a cache knows nothing of what is written on the way"),
        (("hidden={layers: [[0, 0]]}", "teachers={b: {model: m}}"), "states are matched with one teacher"),
    ],
)
def test_teachers_that_cannot_be(override: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_recipe("demo", override)
