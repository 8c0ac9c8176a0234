"""Rolling back, and resuming whatever the quantised phase holds: weights, moments, codes, the best student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from training_toys import quick

from mlxkd import quant
from mlxkd.cli import main
from mlxkd.errors import UserError
from mlxkd.recipe import load_recipe
from mlxkd.training import run, state
from mlxkd.training.callbacks import MetricsFile, read_metrics
from mlxkd.training.loop import Interrupted, Trainer
from mlxkd.training.setup import prepare
from mlxkd.training.terms import terms_of
from mlxkd.trees import leaves

STABILITY = "{probe: [2, 16]}"
PLAIN = {
    "hidden": "null",
    "quantisation__self_teacher": "0",
    "quantisation__stability": STABILITY,
    "quantisation__fraction": "1.0",
    "training__evaluate_every": "100",
    "training__save_every": "100",
    "evaluation__tool_calls": "0",
}


def _arguments(teacher: Path, **changes: str) -> list[str]:
    return ["--teacher", str(teacher), *quick(**{**PLAIN, **changes})]


def _trainer(teacher: Path, folder: Path, **changes: str) -> Trainer:
    overrides = [word for word in _arguments(teacher, **changes)[2:] if word != "--set"]
    recipe = load_recipe("demo", (*overrides, f"teacher.model={teacher}"))
    setup = prepare(recipe)
    return run.make_trainer(setup, setup.student, "student", terms_of(recipe.loss), folder)


def _copied(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in leaves(tree)}


def _equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return set(a) == set(b) and all(np.array_equal(a[name], b[name]) for name in a)


def _poison(trainer: Trainer) -> None:
    layer = next(iter(quant.attached(trainer.student).values()))
    layer.weight = layer.weight * mx.array(float("nan"))


def _steps(trainer: Trainer, first: int, last: int) -> None:
    for step in range(first, last):
        trainer.update(step)


def test_a_rollback_restores_weights_and_moments_and_keeps_the_best(toy_teacher: Path, tmp_path: Path) -> None:
    trainer = _trainer(toy_teacher, tmp_path)
    _steps(trainer, 0, 3)
    trainer._validate(3)
    weights, moments = _copied(trainer.trained.parameters()), _copied(trainer.optimizer.state)
    best = trainer.position.best
    _steps(trainer, 3, 5)
    assert not _equal(moments, _copied(trainer.optimizer.state))
    _poison(trainer)
    trainer._validate(5)
    assert _equal(weights, _copied(trainer.trained.parameters()))
    assert _equal(moments, _copied(trainer.optimizer.state))
    assert (trainer.position.rate_factor, trainer.position.interventions) == (0.5, 1)
    assert trainer.position.best == best and state.peek(trainer.folder / "best").step == 3
    rate = trainer.update(5)["rate"]
    assert rate == pytest.approx(trainer.rate(5) / 2)
    trainer.restore_best()
    assert _equal(weights, _copied(trainer.trained.parameters()))


def test_a_rejected_loss_never_becomes_the_best(toy_teacher: Path, tmp_path: Path) -> None:
    """Weights may be unsound and yet score well: their loss goes with them."""
    trainer = _trainer(toy_teacher, tmp_path)
    losses = iter([3.0, 1.0])
    trainer.validate = lambda _: {"loss": next(losses)}
    _steps(trainer, 0, 2)
    trainer._validate(2)
    _poison(trainer)
    trainer._validate(3)
    assert trainer.position.best == 3.0 and state.peek(trainer.folder / "best").best == 3.0


def test_a_rollback_to_weights_that_never_competed_lets_them_compete(toy_teacher: Path, tmp_path: Path) -> None:
    first = _trainer(toy_teacher, tmp_path)
    _steps(first, 0, 2)
    first.save("last")
    weights = _copied(first.trained.parameters())
    resumed = _trainer(toy_teacher, tmp_path)
    resumed.resume()
    _poison(resumed)
    resumed._validate(3)
    assert resumed.position.best is not None and np.isfinite(resumed.position.best)
    resumed.restore_best()
    assert _equal(weights, _copied(resumed.trained.parameters()))


def test_a_run_without_a_finite_loss_says_so(toy_teacher: Path, tmp_path: Path) -> None:
    trainer = _trainer(toy_teacher, tmp_path, quantisation__stability="null")
    trainer.validate = lambda _: {"loss": float("nan")}
    _steps(trainer, 0, 1)
    trainer._validate(1)
    with pytest.raises(UserError, match="no validation of this run had a finite loss"):
        trainer.restore_best()


def test_patience_and_flips_survive_a_resume(toy_teacher: Path, tmp_path: Path) -> None:
    first = _trainer(toy_teacher, tmp_path)
    _steps(first, 0, 2)
    first._validate(2)
    _poison(first)
    first._validate(3)
    _steps(first, 3, 4)
    first._validate(4)
    first.save("last")
    resumed = _trainer(toy_teacher, tmp_path)
    resumed.resume()
    assert resumed.quantised.guard is not None and resumed.quantised.guard.interventions == 1
    kept, mine = first.quantised.state(), resumed.quantised.state()
    assert int(mine["step"]) == 4 and _equal(_copied(kept), _copied(mine))


def test_the_best_of_an_earlier_phase_comes_back_with_its_codes(toy_teacher: Path, tmp_path: Path) -> None:
    """While codes rest they are parameters; the student that ships must hold them again."""
    changes = {"quantisation__ranges_first": "0.5", "quantisation__learned_ranges": "true"}
    trainer = _trainer(toy_teacher, tmp_path, **changes)
    losses = iter([1.0, 2.0])
    trainer.validate = lambda _: {"loss": next(losses)}
    _steps(trainer, 0, 3)
    trainer._validate(3)
    best = quant.pack(trainer.student, trainer.quantised.config)
    _steps(trainer, 3, 6)  # codes follow their masters from step 4 on
    trainer._validate(6)
    assert quant.changed_codes(best, quant.pack(trainer.student, trainer.quantised.config))
    trainer.restore_best()
    assert quant.changed_codes(best, quant.pack(trainer.student, trainer.quantised.config)) == 0


def test_a_rollback_across_phases_stays_in_its_phase(toy_teacher: Path, tmp_path: Path) -> None:
    changes = {"quantisation__ranges_first": "0.5", "quantisation__learned_ranges": "true"}
    trainer = _trainer(toy_teacher, tmp_path, **changes)
    _steps(trainer, 0, 3)
    trainer._validate(3)
    _steps(trainer, 3, 6)
    _poison(trainer)
    trainer._validate(6)
    assert trainer.position.interventions == 1
    assert np.isfinite(trainer.update(6)["loss"])


class _Stop:
    """Ctrl-C after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step(self, step: int, values: dict[str, Any]) -> None:
        if step == self.step:
            raise KeyboardInterrupt

    def on_validation(self, step: int, values: dict[str, Any]) -> None:
        """Nothing to do."""


SEVERAL = {"quantisation__targets": "[mlx-affine4-g32, ane-lut4]", "quantisation__learned_ranges": "false"}
KINDS = {
    "progressive": {
        "quantisation__grid": "mlx-affine3-g32",
        "quantisation__targets": "[mlx-affine8-g32, mlx-affine4-g32]",
        "quantisation__order": "progressive",
        "quantisation__ranges_first": "0.4",
        "quantisation__fitted_ranges": "true",
        "training__steps": "9",
    },
    "annealed": {
        "quantisation__rounding": "annealed",
        "quantisation__targets": "[mlx-affine4-g32, ane-int8]",
        "quantisation__fraction": "0.75",
    },
    "step": {**SEVERAL, "quantisation__order": "step"},
    "layer": {**SEVERAL, "quantisation__order": "layer", "quantisation__fraction": "0.75"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_phase_resumes_bit_for_bit(toy_teacher: Path, tmp_path: Path, kind: str) -> None:
    """Stopped between two validations; curve, looks and every student equal those of a run that was never stopped."""
    changes = {**KINDS[kind], "training__evaluate_every": "2", "training__save_every": "2"}
    arguments = _arguments(toy_teacher, **changes)
    whole = CliRunner().invoke(main, ["train", "--out", str(tmp_path / "a"), *arguments], catch_exceptions=False)
    assert whole.exit_code == 0, whole.output
    folder = tmp_path / "b" / "demo"
    stopped = _trainer(toy_teacher, folder, **changes)
    stopped.callbacks = (MetricsFile(folder / "metrics.jsonl", "student", 0), _Stop(5))
    with pytest.raises(Interrupted):
        stopped.run()
    rest = CliRunner().invoke(main, ["train", "--out", str(tmp_path / "b"), *arguments, "--resume"])
    assert rest.exit_code == 0, rest.output
    seen = []
    for out in ("a", "b"):
        lines = read_metrics(tmp_path / out / "demo" / "metrics.jsonl")
        timed = ("tokens_per_s", "peak_bytes")
        seen.append([{key: value for key, value in line.items() if key not in timed} for line in lines])
    assert seen[0] == seen[1]
    students = sorted(path.name for path in (tmp_path / "a" / "demo").glob("student*"))
    assert len(students) == (1 if kind == "progressive" else 2)
    for name in students:
        a, b = (mx.load(str(tmp_path / out / "demo" / name / "model.safetensors")) for out in ("a", "b"))
        assert _equal(_copied(a), _copied(b)), name
