"""The quantised phase through the command: several grids, progressive bits, limits that act, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner, Result
from training_toys import quick

from mlxkd import quant
from mlxkd.cli import main
from mlxkd.errors import UserError
from mlxkd.recipe import load_recipe
from mlxkd.training.callbacks import read_metrics


def _run(teacher: Path, out: Path, **changes: str) -> Result:
    plain = {"hidden": "null", "quantisation__self_teacher": "0", "quantisation__stability": "null"}
    arguments = ["train", "--out", str(out), "--teacher", str(teacher), *quick(**{**plain, **changes})]
    return CliRunner().invoke(main, arguments)


@pytest.mark.parametrize("order", ["step", "layer"])
def test_one_master_ships_a_student_for_every_target(toy_teacher: Path, tmp_path: Path, order: str) -> None:
    changes = {"quantisation__targets": "[mlx-affine4-g32, ane-lut4, ane-int8]", "quantisation__order": order}
    result = _run(toy_teacher, tmp_path, quantisation__learned_ranges="false", **changes)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "demo"
    report = json.loads((folder / "report.json").read_text())
    assert {"student", "student@ane-lut4", "student@ane-int8"} <= set(report["contenders"])
    for name, grid in (
        ("student", "mlx-affine4-g32"),
        ("student-ane-lut4", "ane-lut4"),
        ("student-ane-int8", "ane-int8"),
    ):
        packed = quant.load_student(folder / name)
        assert set(packed.grids.values()) == {grid}
    looked = [v for v in read_metrics(folder / "metrics.jsonl") if "valid/loss@ane-lut4" in v]
    assert looked and all("valid/loss@ane-int8" in v and "valid/loss" in v for v in looked)


def test_progressive_bits_end_on_the_grid_that_ships(toy_teacher: Path, tmp_path: Path) -> None:
    result = _run(
        toy_teacher,
        tmp_path,
        quantisation__grid="mlx-affine3-g32",
        quantisation__targets="[mlx-affine8-g32, mlx-affine4-g32]",
        quantisation__order="progressive",
        quantisation__fraction="1.0",
        quantisation__ranges_first="0.4",
        training__steps="9",
    )
    assert result.exit_code == 0, result.output
    assert not list((tmp_path / "demo").glob("student-*"))
    assert set(quant.load_student(tmp_path / "demo" / "student").grids.values()) == {"mlx-affine3-g32"}


def test_learned_ranges_move_and_palettes_are_differentiable(toy_teacher: Path, tmp_path: Path) -> None:
    palettes = {"quantisation__grid": "ane-lut2", "quantisation__palette_temperature": "1.0e-4"}
    result = _run(toy_teacher, tmp_path, quantisation__learned_ranges="false", **palettes)
    assert result.exit_code == 0, result.output
    assert set(quant.load_student(tmp_path / "demo" / "student").grids.values()) == {"ane-lut2"}


def test_annealed_rounding_needs_grids_that_have_it(toy_teacher: Path, tmp_path: Path) -> None:
    result = _run(toy_teacher, tmp_path, quantisation__grid="ane-lut2", quantisation__rounding="annealed")
    assert result.exit_code == 2 and "affine and int8 grids" in result.stderr and "(ane-lut2)" in result.stderr
    assert not (tmp_path / "demo" / "metrics.jsonl").exists(), "said before any step"


def test_the_float_copy_teaches_in_the_quantised_phase_alone(toy_teacher: Path, tmp_path: Path) -> None:
    result = _run(toy_teacher, tmp_path, quantisation__self_teacher="0.5")
    assert result.exit_code == 0, result.output
    lines = [v for v in read_metrics(tmp_path / "demo" / "metrics.jsonl") if "loss" in v]
    assert [("loss/forward_kl/self" in v) for v in lines] == [v["quantised"] for v in lines]
    assert sum(v["quantised"] for v in lines) == 4


def test_every_look_is_reported(toy_teacher: Path, tmp_path: Path) -> None:
    result = _run(toy_teacher, tmp_path, quantisation__stability="{probe: [2, 16]}", training__evaluate_every="2")
    assert result.exit_code == 0, result.output
    seen = [v["valid/stability"] for v in read_metrics(tmp_path / "demo" / "metrics.jsonl") if "valid/stability" in v]
    assert [s["step"] for s in seen] == [6, 8] and seen[0]["flips"] is None and seen[1]["flips"]
    assert len(seen[0]["layers"]) == 2 and all(0 < layer["cosine"] <= 1 for layer in seen[0]["layers"])
    assert "Stability of quantised training" in (tmp_path / "demo" / "report.html").read_text()


def test_limits_lower_the_rate_and_stop(toy_teacher: Path, tmp_path: Path) -> None:
    limit = "{probe: [2, 16], patience: 9, limits: [{measure: min_cosine, value: 1.1, action: ACTION}]}"
    often = {"training__evaluate_every": "2", "optimizer__final": "1.0", "optimizer__warmup": "0"}
    for action in ("lower_rate", "roll_back"):
        changes = {"quantisation__stability": limit.replace("ACTION", action), **often}
        result = _run(toy_teacher, tmp_path / action, **changes)
        lines = read_metrics(tmp_path / action / "demo" / "metrics.jsonl")
        if action == "roll_back":  # there has been no sound state to return to
            assert result.exit_code == 2 and "quantised training is not stable" in result.stderr
            continue
        assert result.exit_code == 0, result.output
        rates = [v["rate"] for v in lines if "rate" in v]
        assert rates[7] == pytest.approx(rates[5] / 2) and rates[5] == pytest.approx(rates[0])
        reasons = [v["valid/reasons"] for v in lines if "valid/reasons" in v]
        assert "min_cosine" in reasons[0][0] and "lower rate" in reasons[0][0]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (("quantisation.ranges_first=0.5",), "nothing would train; set learned_ranges"),
        (("quantisation.fitted_ranges=true",), "nothing to start; set learned_ranges"),
        (("quantisation.targets=[ane-lut4]", "quantisation.grid=mlx-mxfp4"), "the first one, ane-lut4, must be grid"),
        (("quantisation.grid=float", "quantisation.self_teacher=1"), "float leaves nothing to quantise"),
    ],
)
def test_what_cannot_be(override: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_recipe("mlx-community", override)


def test_palettes_of_a_packed_student_hold_few_values(toy_teacher: Path, tmp_path: Path) -> None:
    assert (
        _run(toy_teacher, tmp_path, quantisation__grid="ane-lut2", quantisation__learned_ranges="false").exit_code == 0
    )
    weight = quant.load_student(tmp_path / "demo" / "student").model.model.layers[0].mlp.down_proj.weight
    assert len(set(mx.flatten(weight).tolist())) <= 4
