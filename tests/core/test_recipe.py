"""The recipe refuses what it does not understand, by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mlxkd import recipe
from mlxkd.errors import UserError


@pytest.mark.parametrize("name", recipe.shipped())
def test_shipped_recipes_load_and_survive_printing(name: str, tmp_path: Path) -> None:
    first = recipe.load_recipe(name)
    printed = tmp_path / "r.yaml"
    printed.write_text(first.to_yaml())
    again = recipe.load_recipe(printed)
    assert again == first and again.identity() == first.identity()


def test_overrides_reach_nested_keys_and_list_entries() -> None:
    changed = recipe.load_recipe("demo", ("training.steps=7", "loss.0.temperature=2", "data.shapes=[[2, 64]]"))
    assert changed.training.steps == 7
    assert changed.loss[0].temperature == 2.0
    assert changed.data.shapes == ((2, 64),)
    assert changed.identity() != recipe.load_recipe("demo").identity()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.learning_rte=3", "unknown key optimizer.learning_rte, did you mean learning_rate?"),
        ("loss.0.wieght=1", "did you mean weight?"),
        ("optimizer.learning_rate=abc", "optimizer.learning_rate: Input should be a valid number"),
        ("optimizer.learning_rate=-1", "greater than 0"),
        ("data.train=x.jsonl", "exactly one of demo and train"),
        ("student.model=x", "leave model out"),
        ("loss=[{name: forward_kl, weight: 0}]", "every weight is 0"),
        ("loss=[{name: forward_kl}, {name: forward_kl}]", "a term stands twice"),
        ("loss.9.weight=1", "the list has entries 0 to 1"),
        ("name=../escape", "name"),
        ("training.steps", "not of the form key=value"),
        ("training.steps=[", "is not YAML"),
        ("seed.x=1", "seed in seed.x is a value"),
    ],
)
def test_faults_are_named(override: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe.load_recipe("demo", ("seed=1", override))
    assert said in str(caught.value)


def test_every_fault_is_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump({"data": {"demo": {}}, "sead": 1, "training": {"steps": 0}}))
    with pytest.raises(UserError) as caught:
        recipe.load_recipe(path)
    assert "sead" in str(caught.value) and "training.steps" in str(caught.value) and str(path) in str(caught.value)


def test_no_code_runs_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text("name: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(UserError, match="not YAML"):
        recipe.load_recipe(path)


def test_unknown_recipe_lists_the_known() -> None:
    with pytest.raises(UserError, match="did you mean 'demo'"):
        recipe.load_recipe("dmeo")
