"""A recipe without quantisation."""

from __future__ import annotations

from pathlib import Path

from training_toys import QUICK

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
