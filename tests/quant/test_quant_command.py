"""mlxkd quantize, as a person runs it, on the real model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlxkd.compat import load_model
from mlxkd.errors import UserError
from mlxkd.quant import load_student
from mlxkd.quant.command import command, parse_budget, parse_rules


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


def test_a_budget_is_kept_and_explained(stories_model: Path, stories_text: Path, tmp_path: Path) -> None:
    words = run(
        stories_model, tmp_path / "o", "--budget", "8bpw", "--data", stories_text, "--rows", "2", "--width", "64"
    )
    assert "nats per token" in words and "model.layers.0.self_attn.q_proj" in words
    bits = float(words.split(": ")[1].split(" ")[0])
    assert 7 < bits <= 8


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


def test_a_budget_needs_text(stories_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--budget needs --data"):
        run(stories_model, tmp_path / "o", "--budget", "4")
