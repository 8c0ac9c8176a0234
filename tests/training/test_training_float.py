"""A recipe without quantisation."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from training_toys import QUICK

from mlxkd.cli import main
from mlxkd.recipe import load_recipe
from mlxkd.training.setup import prepare


def test_a_float_grid_plans_no_quantised_phase(toy_teacher: Path) -> None:
    """A plan whose every layer is "float" counted as one: the phase began, found nothing attached, and the run died."""
    changes = QUICK | {
        "teacher.model": str(toy_teacher),
        "quantisation": "{grid: float, fraction: 0.5}",
    }
    wanted = {key: value for key, value in changes.items() if not key.startswith("quantisation.")}
    setup = prepare(load_recipe("demo", tuple(f"{key}={value}" for key, value in wanted.items())))
    assert setup.plans == {}


@pytest.mark.parametrize("wanted", ["{grid: float}", "{grid: mlx-affine4-g32, fraction: 0}"])
def test_a_run_without_a_quantised_phase_ships_its_student(toy_teacher: Path, tmp_path: Path, wanted: str) -> None:
    """Such runs trained to the end and then failed: nothing was on a grid, or no validation had counted."""
    changes = {key: value for key, value in QUICK.items() if not key.startswith("quantisation.")}
    changes |= {"quantisation": wanted, "hidden": "null", "evaluation.tool_calls": "0", "training.steps": "2"}
    overrides = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    result = CliRunner().invoke(
        main, ["train", "--out", str(tmp_path), "--teacher", str(toy_teacher), *overrides], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    best = mx.load(str(tmp_path / "demo" / "checkpoints" / "student" / "best" / "arrays.safetensors"))
    shipped = mx.load(str(tmp_path / "demo" / "student" / "model.safetensors"))
    weight, name = best["model.model.layers.0.self_attn.q_proj.weight"], "model.layers.0.self_attn.q_proj.weight"
    expected = weight if "float" in wanted else mx.quantize(weight, 32, 4)[0]
    assert np.array_equal(np.array(shipped[name]), np.array(expected))
