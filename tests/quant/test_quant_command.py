"""mlxkd quantize, as a person runs it, on the real model."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from mlxkd.compat import load, load_model
from mlxkd.errors import UserError
from mlxkd.quant import load_student
from mlxkd.quant.command import command, parse_budget, parse_rules, token_rows


def run(*arguments: object) -> str:
    result = CliRunner().invoke(command, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_rounding_writes_a_folder_that_mlx_lm_loads(stories_model: Path, tmp_path: Path) -> None:
    said = json.loads(run(stories_model, tmp_path / "o", "--grid", "mlx-affine4-g32|float", "--json"))
    _, config = load_model(tmp_path / "o")
    assert config["quantization"]["bits"] == 4
    assert load_student(tmp_path / "o").grids == said["grids"]
    down = 5 * 64 * 172  # 172 is not divisible by 32: these stay float
    total = 512 * 64 + 5 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 172)
    assert said["bits_per_weight"] == pytest.approx((5 * (total - down) + 16 * down) / total)
    assert not any("down_proj" in path for path in said["grids"])


def test_a_budget_is_kept_and_its_divergence_measured(stories_model: Path, stories_text: Path, tmp_path: Path) -> None:
    given = ["--budget", "8bpw", "--data", stories_text, "--rows", "2", "--width", "64"]
    words = run(stories_model, tmp_path / "o", *given)
    assert "nats per token" in words and "model.layers.0.self_attn.q_proj" in words
    bits = float(words.split(": ")[1].split(" ")[0])
    assert 7 < bits <= 8
    said = json.loads(run(stories_model, tmp_path / "json", *given, "--json"))["divergence"]
    rows = mx.array(token_rows(stories_text, load(stories_model)[1], 2, 64))
    p, q = (np.array(load(path)[0](rows)).astype(np.float64) for path in (stories_model, tmp_path / "json"))
    p, q = (v - np.log(np.exp(v).sum(-1, keepdims=True)) for v in (p, q))
    assert said["measured"] == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-3)
    assert f"{said['predicted']:.4g} (predicted)" in words


def test_a_budget_chooses_from_the_candidates(stories_model: Path, stories_text: Path, tmp_path: Path) -> None:
    given = [
        "--data",
        stories_text,
        "--rows",
        "2",
        "--width",
        "64",
        "--candidate",
        "ane-lut2",
        "--candidate",
        "ane-int8",
    ]
    said = json.loads(run(stories_model, tmp_path / "o", "--budget", "5", *given, "--json"))
    assert set(said["grids"].values()) == {"ane-lut2", "ane-int8"} and said["bits_per_weight"] <= 5


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: parse_budget("4gb"), "'4gb' is no budget\nhint: write bits per weight"),
        (lambda: parse_rules(("*embed*",)), r"'\*embed\*' is no rule"),
    ],
)
def test_arguments_are_checked(call: object, text: str) -> None:
    with pytest.raises(UserError, match=text):
        call()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--budget", "4"), "--budget needs --data"),
        (("--budget", "4", "--data", "TEXT", "--grid", "ane-lut4"), "goes with neither --grid.*\nhint: .*--candidate"),
        (("--budget", "4", "--data", "TEXT", "--fitted-ranges"), "goes with neither .*--fitted-ranges"),
        (
            ("--fitted-ranges", "--method", "gptq", "--data", "TEXT"),
            "GPTQ takes its own ranges\nhint: fitted ranges go",
        ),
        (("--fitted-ranges", "--grid", "ane-lut4"), "no layer on an affine grid, and ane-lut4 has no ranges to fit"),
        (("--candidate", "ane-lut4"), "--candidate says what --budget may choose from\nhint: give --budget"),
    ],
)
def test_options_that_do_not_go_together_are_named(
    options: tuple[str, ...], text: str, stories_model: Path, stories_text: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=text):
        run(stories_model, tmp_path / "o", *(stories_text if word == "TEXT" else word for word in options))
