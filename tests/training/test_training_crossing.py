"""A teacher with another tokenizer, through the command: a SentencePiece model teaches a byte-level BPE student."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from kd_toys import LLAMA
from toy_tokenizer import tokenizer_folder

from mlxkd import compat
from mlxkd.cli import main
from mlxkd.recipe import load_recipe
from mlxkd.training import run
from mlxkd.training.callbacks import read_metrics
from mlxkd.training.setup import prepare
from mlxkd.training.terms import terms_of

SETTINGS = {
    "data.demo": "null",
    "data.shapes": "[[4, 48]]",
    "hidden": "null",
    "loss": "[{name: cross_entropy, weight: 0.2}, {name: gold, temperature: 2},"
    " {name: uld, weight: 0.1, temperature: 2}]",
    "optimizer.learning_rate": "0.01",
    "training": "{steps: 12, evaluate_every: 6, evaluate_batches: 1, save_every: 12}",
    "quantisation": "{grid: mlx-affine4-g32, fraction: 0.3}",
    "evaluation": "{baseline: false, batches: 1}",
}


@pytest.fixture(scope="module")
def student(stories_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config and tokenizer of a student of its own."""
    corpus = stories_text.read_text(encoding="utf-8")[:4000]
    folder = tokenizer_folder(tmp_path_factory.mktemp("crossing") / "student", None, corpus=[corpus])
    config = json.loads((folder / "config.json").read_text())
    size = len(compat.load_tokenizer(folder).get_vocab())
    config |= LLAMA | {"hidden_size": 32, "head_dim": 8, "intermediate_size": 64, "vocab_size": size}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def arguments(student: Path, stories_model: Path, stories_text: Path, tmp_path_factory) -> list[str]:
    text = tmp_path_factory.mktemp("text") / "few.txt"
    text.write_text(stories_text.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    changes = SETTINGS | {"student": f"{{start: config, model: {student}}}", "data.train": str(text)}
    overrides = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    return ["--teacher", str(stories_model), *overrides]


@pytest.fixture(scope="module")
def finished(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    result = CliRunner().invoke(main, ["train", "--out", str(out), *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "KL to the teacher" not in result.stdout, "there is no such figure over different tokens"
    return out / "demo"


def test_the_losses_fall_and_the_student_ships_with_its_own_tokenizer(finished: Path, student: Path) -> None:
    lines = [v for v in read_metrics(finished / "metrics.jsonl") if "loss" in v]
    for term, fall in (("loss/gold@2", 0.9), ("loss/uld@2", 1), ("loss/cross_entropy", 0.9)):
        first, last = (np.mean([v[term] for v in part]) for part in (lines[:3], lines[-3:]))
        assert last < fall * first, term
    shipped = compat.load_tokenizer(finished / "student").get_vocab()
    assert shipped == compat.load_tokenizer(student).get_vocab()
    model, config = compat.load_model(finished / "student")
    assert config["quantization"]["bits"] == 4 and model(mx.array([[1, 2]])).shape[-1] == len(shipped)


def test_the_report_has_no_column_and_no_figure_over_the_teachers_tokens(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    assert set(report["contenders"]) == {"float", "student"}
    assert set(report["contenders"]["student"]["metrics"]) == {"nll"}
    assert "KL to the teacher" not in (finished / "report.html").read_text()
    assert not [v for v in read_metrics(finished / "metrics.jsonl") if "valid/kl" in v]


def test_a_stopped_run_goes_on_bit_for_bit(finished: Path, arguments: list[str], tmp_path: Path) -> None:
    overrides = [word for word in arguments[2:] if word != "--set"]
    recipe = load_recipe("demo", (*overrides, f"teacher.model={arguments[1]}"))
    setup = prepare(recipe)
    stopped = run.make_trainer(setup, setup.student, "student", terms_of(recipe.loss), tmp_path / "demo")
    for step in range(5):
        stopped.update(step)
    stopped.save("last")
    result = CliRunner().invoke(main, ["train", "--out", str(tmp_path), *arguments, "--resume"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    one, two = (
        [v["loss"] for v in read_metrics(f / "metrics.jsonl") if "loss" in v] for f in (finished, tmp_path / "demo")
    )
    assert two == one[5:]


def test_beside_a_teacher_that_shares_the_tokenizer(
    arguments: list[str], student: Path, stories_model: Path, tmp_path: Path
) -> None:
    """The first teacher speaks the student's tokens, the second is read through bytes."""
    same = tmp_path / "same"
    config = json.loads((student / "config.json").read_text())
    mx.random.seed(1)
    compat.save_model_folder(same, compat.build_model(config), config, student)
    more = {
        "loss": "[{name: forward_kl}, {name: gold, teacher: other}]",
        "teachers": f"{{other: {{model: {stories_model}}}}}",
        "training": "{steps: 2, evaluate_every: 2, evaluate_batches: 1, save_every: 2}",
    }
    overrides = [word for key, value in more.items() for word in ("--set", f"{key}={value}")]
    command = ["train", "--out", str(tmp_path), *arguments, *overrides, "--set", f"teacher.model={same}"]
    result = CliRunner().invoke(main, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    first = read_metrics(tmp_path / "demo" / "metrics.jsonl")[0]
    assert first["loss/forward_kl"] > 0 and first["loss/gold/other"] > 0
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert "kl" in report["contenders"]["student"]["metrics"] and "teacher" in report["contenders"]
