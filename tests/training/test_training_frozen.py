"""Weights that a recipe wants left alone: they ship as the teacher had them, and the others train."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from training_toys import quick

from mlxkd.cli import main

EMBEDDING = "model.embed_tokens.weight"
FROZEN = {"student__frozen": '["*embed_tokens.weight"]', "evaluation__tool_calls": "0"}


def _train(teacher: Path, out: Path, **changes: str) -> dict[str, mx.array]:
    arguments = ["train", "--out", str(out), "--teacher", str(teacher), *quick(**(FROZEN | changes))]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return dict(mx.load(str(out / "demo" / "student" / "model.safetensors")))


def _teacher(folder: Path) -> dict[str, mx.array]:
    return dict(mx.load(str(folder / "model.safetensors")))


def test_a_frozen_embedding_ships_as_the_teacher_had_it(toy_teacher: Path, tmp_path: Path) -> None:
    floats = {"quantisation__grid": "float", "quantisation__learned_ranges": "false"}
    shipped = _train(toy_teacher, tmp_path, **floats, quantisation__stability="null", quantisation__self_teacher="0")
    theirs = _teacher(toy_teacher)
    assert np.array_equal(np.array(shipped[EMBEDDING]), np.array(theirs[EMBEDDING].astype(mx.float32)))
    query = "model.layers.0.self_attn.q_proj.weight"
    assert not np.array_equal(np.array(shipped[query]), np.array(theirs[query].astype(mx.float32)))


def test_a_frozen_embedding_still_learns_its_ranges(toy_teacher: Path, tmp_path: Path) -> None:
    theirs = mx.quantize(_teacher(toy_teacher)[EMBEDDING].astype(mx.float32), 32, 4)
    fixed = _train(toy_teacher, tmp_path / "fixed", quantisation__learned_ranges="false")
    learned = _train(toy_teacher, tmp_path / "learned", quantisation__range_rate="10")
    scales = EMBEDDING.replace("weight", "scales")
    assert np.array_equal(np.array(fixed[EMBEDDING]), np.array(theirs[0]))
    assert np.array_equal(np.array(fixed[scales]), np.array(theirs[1].astype(fixed[scales].dtype)))
    assert not np.array_equal(np.array(learned[scales]), np.array(fixed[scales]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"student__frozen": "[nothing]"}, "no weight matches 'nothing'"),
        ({"student__frozen": '["*"]'}, "nothing is left to train"),
        ({"student__lora": "{rank: 2}", "hidden": "null"}, "leave frozen out"),
        ({"quantisation__ranges_first": "0.5"}, "quantisation.ranges_first"),
    ],
)
def test_freezing_that_cannot_be(changes: dict[str, str], words: str, toy_teacher: Path, tmp_path: Path) -> None:
    arguments = ["--teacher", str(toy_teacher), *quick(**(FROZEN | changes))]
    result = CliRunner().invoke(main, ["train", "--out", str(tmp_path / "x"), *arguments])
    assert result.exit_code == 2 and words in " ".join(result.stderr.split())
    assert not (tmp_path / "x").exists()
