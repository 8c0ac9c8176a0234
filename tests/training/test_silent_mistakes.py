"""Mistakes that would train on, to a wrong result, are refused by name: through the command, or the call that runs it.

Each message says what is wrong and where; a refused run leaves nothing behind.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from kd_toys import LLAMA, ragged_batch, toy
from toy_tokenizer import tokenizer_folder

from mlxkd import compat
from mlxkd.cli import main
from mlxkd.data.batching import Batch
from mlxkd.errors import UserError
from mlxkd.losses.step import loss_and_gradients
from mlxkd.losses.term import Term
from mlxkd.students.split import Split
from mlxkd.teachers.local import LocalTeacher

SMALL = {
    "data.demo": "{train: 10, valid: 4}",
    "data.shapes": "[[4, 480]]",
    "student": "{start: prune, layers: [0, 2]}",
    "hidden": "null",
    "loss": "[{name: forward_kl}]",
    "training": "{steps: 2, evaluate_every: 2, evaluate_batches: 1, save_every: 2}",
    "quantisation": "{grid: float}",
    "evaluation": "{baseline: false, batches: 1}",
}
GOLD = {"loss": "[{name: gold}]"}


def _command(name: str, out: Path, teacher: Path, changes: dict[str, str]) -> list[str]:
    overrides = [word for key, value in (SMALL | changes).items() for word in ("--set", f"{key}={value}")]
    return [name, "--out", str(out), "--teacher", str(teacher), *overrides]


def _refused(tmp_path: Path, teacher: Path, changes: dict[str, str], *words: str) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(main, _command("train", out, teacher, changes))
    assert result.exit_code == 2, result.output
    for word in words:
        assert word in result.stderr, result.stderr
    assert not out.exists(), "a refused run must leave nothing behind"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer.learning_rat": "1"}, ("optimizer.learning_rat", "did you mean learning_rate")),
        ({"loss": "[{name: jsd, options: {beta: 1.5}}]"}, ("loss.jsd", "beta must lie between 0 and 1, not 1.5")),
        ({"loss": "[{name: skew_kl, options: {alpha: 1}}]"}, ("loss.skew", "alpha must lie between 0 and 1")),
        ({"loss": "[{name: adaptive_kl, options: {mu: 2}}]"}, ("loss.adaptive_kl", "mu")),
        ({"loss": "[{name: taid, options: {start: 1.5}}]"}, ("loss.taid", "start")),
        ({"loss": "[{name: jsd, options: {betta: 0.5}}]"}, ("loss.jsd", "unknown option", "beta")),
        ({"loss": "[{name: forward_k}]"}, ("unknown loss", "forward_kl")),
        ({"loss": "[{name: forward_kl, temperature: 0}]"}, ("loss.0.temperature",)),
        ({"loss": "[{name: forward_kl, weight: 0}]"}, ("loss: every weight is 0",)),
        ({"loss": "[{name: forward_kl}, {name: forward_kl}]"}, ("loss: a term stands twice",)),
        ({"loss": "[{name: contrastive}]"}, ("contrastive:", "set on_policy")),
        ({"loss": "[{name: forward_kl, teacher: secnd}]"}, ("no teacher is called 'secnd'",)),
        ({"on_policy": "{share: 0.5}", "teacher.cache": "x"}, ("on_policy:", "leave teacher.cache out")),
        ({"hidden": "{layers: [[0, 0]]}", "teacher.cache": "x"}, ("hidden:", "leave teacher.cache out")),
        (GOLD, ("student.start", "a pruned student has its teacher's tokenizer")),
        (GOLD | {"teacher.cache": "x", "student": "{start: folder, model: x}"}, ("teacher.cache", "through bytes")),
        (
            GOLD | {"hidden": "{layers: [[0, 0]]}", "student": "{start: folder, model: x}"},
            ("hidden:", "token by token"),
        ),
        (
            GOLD | {"on_policy": "{corrected: 0.5}", "student": "{start: folder, model: x}"},
            ("on_policy.corrected", "cannot correct the student's tokens"),
        ),
        (
            GOLD | {"on_policy": "{writer: teacher}", "student": "{start: folder, model: x}"},
            ("on_policy.writer", "cannot write the student's tokens"),
        ),
        (
            {"on_policy": "{writer: teacher, corrected: 0.5}"},
            ("on_policy.corrected", "the writer is the teacher"),
        ),
        (
            {"on_policy": "{writer: teacher}", "loss": "[{name: forward_kl}, {name: rollout_length}]"},
            ("rollout_length", "weighs what the student writes"),
        ),
        (
            {"on_policy": "{writer: teacher}", "loss": "[{name: contrastive}]"},
            ("contrastive", "the student's text against the data"),
        ),
        ({"loss": "[{name: gold}, {name: forward_kl}]"}, ("loss:", "forward_kl compares token by token and gold")),
        ({"loss": "[{name: gold}, {name: uld, temperature: 2}]"}, ("loss:", "one temperature, not 1 and 2")),
        ({"teacher.form": "sampled"}, ("teacher.form", "no cache is named")),
        ({"hidden": "{layers: [[7, 0]]}"}, ("hidden:", "layers are numbered 0 to 1")),
        ({"data.shapes": "[[4, 480], [2, 480]]"}, ("data.shapes", "the same length")),
        ({"data.mix": "[0.5]"}, ("data.mix", "adding to 1")),
        ({"routes": "{other: teacher}", "teachers": "{b: {model: demo}}"}, ("demo/train", "teachers.routes")),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items())[:60] if isinstance(value, dict) else "",
)
def test_a_recipe_that_contradicts_itself(
    changes: dict[str, str], words: tuple[str, ...], toy_teacher: Path, tmp_path: Path
) -> None:
    _refused(tmp_path, toy_teacher, changes, *words)


def test_another_vocabulary(toy_teacher: Path, stories_model: Path, tmp_path: Path) -> None:
    start = {"student": f"{{start: folder, model: {stories_model}}}"}
    _refused(tmp_path, toy_teacher, start, "vocabulary mismatch", str(stories_model), "1536")


def test_equally_many_tokens_of_another_tokenizer(stories_text: Path, tmp_path: Path) -> None:
    """Two byte-level tokenizers of one size: every shape fits, every token is another."""
    models = []
    for name, corpus in (("teacher", "the cat sat on the mat"), ("student", "a dog ran to the big log")):
        folder = tokenizer_folder(tmp_path / f"{name}-tokens", None, corpus=[corpus], size=270)
        config = LLAMA | {"vocab_size": 270}
        compat.save_model_folder(tmp_path / name, compat.build_model(config), config, folder)
        models.append(tmp_path / name)
    start = f"{{start: folder, model: {models[1]}}}"
    changes = {"student": start, "data.demo": "null", "data.train": str(stories_text)}
    _refused(tmp_path, models[0], changes, "equally many tokens but another tokenizer", str(models[1]), "id 2")


def test_a_student_with_too_few_rows(toy_teacher: Path, tmp_path: Path) -> None:
    config = json.loads((toy_teacher / "config.json").read_text()) | {"vocab_size": 512}
    (tmp_path / "config.json").write_text(json.dumps(config))
    start = {"student": f"{{start: config, model: {tmp_path / 'config.json'}}}"}
    _refused(tmp_path, toy_teacher, start, "student:", "vocabulary of 512 is smaller")


def test_data_in_which_nothing_carries_loss(toy_teacher: Path, tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_text("\n".join([json.dumps({"messages": [{"role": "user", "content": "hello"}]})] * 8))
    changes = {"data.demo": "null", "data.train": str(path)}
    _refused(tmp_path, toy_teacher, changes, "data:", "no supervised token")


def test_a_loss_that_is_not_finite(toy_teacher: Path, tmp_path: Path) -> None:
    """The one mistake that shows only in training; the run stops at the step it happens."""
    changes = {"optimizer.learning_rate": "1e30", "optimizer.warmup": "0", "training.steps": "4"}
    result = CliRunner().invoke(main, _command("train", tmp_path / "out", toy_teacher, changes))
    assert result.exit_code == 2 and "the loss is" in result.stderr and "optimizer.learning_rate" in result.stderr


@pytest.fixture(scope="module")
def cache(toy_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _teach(tmp_path_factory.mktemp("caches") / "cache", toy_teacher, {})


def _teach(out: Path, teacher: Path, changes: dict[str, str]) -> Path:
    result = CliRunner().invoke(main, _command("teach", out, teacher, changes), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return out


def test_a_cache_of_another_teacher(cache: Path, toy_teacher: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(toy_teacher, other)
    model, config = compat.load_model(other)
    model.model.norm.weight = model.model.norm.weight * 1.01
    compat.save_model_folder(other, model, config, toy_teacher)
    _refused(tmp_path, other, {"teacher.cache": str(cache)}, "this cache is stale", str(cache), "mlxkd teach")


def test_a_cache_of_another_tokenizer(cache: Path, toy_teacher: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "cache"
    shutil.copytree(cache, foreign)
    manifest = json.loads((foreign / "manifest.json").read_text())
    (foreign / "manifest.json").write_text(json.dumps(manifest | {"tokenizer": "0" * 64}))
    _refused(tmp_path, toy_teacher, {"teacher.cache": str(foreign)}, "belongs to another tokenizer", str(foreign))


def test_a_temperature_that_the_cache_does_not_hold(cache: Path, toy_teacher: Path, tmp_path: Path) -> None:
    changes = {"teacher.cache": str(cache), "loss": "[{name: forward_kl, temperature: 2}]"}
    _refused(tmp_path, toy_teacher, changes, "temperature 2 is not in the teacher cache", "--temperature 2")


def test_texts_that_the_cache_does_not_hold(cache: Path, toy_teacher: Path, tmp_path: Path) -> None:
    changes = {"teacher.cache": str(cache), "data.demo": "{train: 14, valid: 4}"}
    _refused(tmp_path, toy_teacher, changes, "4 of 14 texts are not in the teacher cache", str(cache))


def test_positions_that_the_cache_does_not_hold(toy_teacher: Path, tmp_path: Path) -> None:
    """Taught for the last turns alone, used for all of them."""
    last = _teach(tmp_path / "last", toy_teacher, {"data.turns": "last"})
    _refused(tmp_path, toy_teacher, {"teacher.cache": str(last)}, "made with other loss masks", str(last))


def test_a_form_that_the_cache_has_not(cache: Path, toy_teacher: Path, tmp_path: Path) -> None:
    changes = {"teacher.cache": str(cache), "teacher.form": "sampled"}
    _refused(tmp_path, toy_teacher, changes, "this cache is bucket, and sampled is asked for", "teacher.form")
    drawn = _teach(tmp_path / "drawn", toy_teacher, {"teacher.form": "sampled"})
    changes = {"teacher.cache": str(drawn), "teacher.form": "renormalised"}
    _refused(tmp_path, toy_teacher, changes, "this cache is sampled, and renormalised is asked for")
    changes = {"teacher.cache": str(drawn), "teacher.form": "sampled", "loss": "[{name: reverse_kl}]"}
    _refused(tmp_path, toy_teacher, changes, "reverse_kl cannot be taken against sampled targets")


def test_a_damaged_cache(cache: Path, toy_teacher: Path, tmp_path: Path) -> None:
    broken = tmp_path / "cache"
    shutil.copytree(cache, broken)
    shard = next(broken.glob("*.shard"))
    shard.write_bytes(shard.read_bytes()[:-5])
    _refused(tmp_path, toy_teacher, {"teacher.cache": str(broken)}, "cut short or damaged", shard.name)


@pytest.mark.parametrize("form", ["renormalised", "sampled"])
def test_the_forms_of_a_cache_train(form: str, toy_teacher: Path, tmp_path: Path) -> None:
    """The counterpart: what a recipe may choose runs."""
    store = _teach(tmp_path / "store", toy_teacher, {"teacher.form": form})
    changes = {"teacher.cache": str(store), "teacher.form": form}
    result = CliRunner().invoke(main, _command("train", tmp_path, toy_teacher, changes), catch_exceptions=False)
    assert result.exit_code == 0, result.output


def _step(batch: Batch, terms: list[Term], vocabulary: int = 37) -> None:
    student, teacher = toy(1)[0], toy(2, vocab_size=vocabulary)[0]
    loss_and_gradients(student, Split(student), batch, LocalTeacher(teacher).targets(batch), terms)


def test_labels_that_were_not_shifted() -> None:
    batch = ragged_batch(rows=4, length=19)
    with pytest.raises(UserError, match=r"batch\.labels: the labels are not shifted"):
        _step(dataclasses.replace(batch, labels=batch.inputs), [Term("cross_entropy")])


def test_a_text_of_one_token_is_no_such_mistake() -> None:
    same = np.full((2, 20), 7, np.int32)
    inputs = np.concatenate([same, np.zeros((2, 4), np.int32)], axis=1)
    weights = (inputs > 0).astype(np.float32)
    _step(Batch(inputs, inputs.copy(), weights, (0, 1), (2, 24)), [Term("cross_entropy")])


def test_a_batch_without_a_label() -> None:
    batch = ragged_batch()
    with pytest.raises(UserError, match="batch: the batch has no supervised position"):
        _step(dataclasses.replace(batch, weights=np.zeros_like(batch.weights)), [Term("cross_entropy")])


def test_a_label_outside_the_vocabulary() -> None:
    batch = ragged_batch()
    with pytest.raises(UserError, match="batch: label 40 lies outside the shared vocabulary of 37"):
        _step(dataclasses.replace(batch, labels=np.full_like(batch.labels, 40)), [Term("cross_entropy")])


def test_a_teacher_with_more_tokens() -> None:
    with pytest.raises(UserError, match="vocabulary mismatch: the teacher has 41 token ids, the student 37"):
        _step(ragged_batch(), [Term("forward_kl")], vocabulary=41)


def test_what_a_teacher_said_about_another_batch() -> None:
    student, teacher = toy(1)[0], toy(2)[0]
    said = LocalTeacher(teacher).targets(ragged_batch(seed=1, rows=5))
    with pytest.raises(UserError, match=r"targets.teacher: the teacher speaks about \d+ positions"):
        loss_and_gradients(student, Split(student), ragged_batch(), said, [Term("forward_kl")])


def test_a_head_with_a_cap_that_its_config_does_not_name(toy_teacher: Path, tmp_path: Path) -> None:
    """nanochat caps its logits at 15 in code; a loss on the uncapped ones would train another model."""
    config = {
        "model_type": "nanochat", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 1536, "max_position_embeddings": 512,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    start = {"student": f"{{start: config, model: {tmp_path / 'config.json'}}}"}
    mx.random.seed(0)
    _refused(tmp_path, toy_teacher, start, "'nanochat' cannot be split", "caps its logits")
