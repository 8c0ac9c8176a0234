"""The commands: help that runs, JSON on stdout, faults on stderr with exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlxkd.cli import main
from mlxkd.recipe import load_recipe


def test_help_lists_every_command() -> None:
    text = CliRunner().invoke(main, ["--help"]).output
    for name in main.list_commands(None):  # type: ignore[arg-type]
        assert name in text
        assert CliRunner().invoke(main, [name, "--help"]).exit_code == 0


def test_doctor_speaks_json() -> None:
    result = CliRunner().invoke(main, ["doctor", "--json"])
    findings = {f["id"]: f for f in json.loads(result.stdout)}
    assert findings["mlx"]["status"] == "ok"
    assert result.exit_code == int(any(f["status"] == "error" for f in findings.values()))


def test_print_recipe_shows_what_would_run() -> None:
    result = CliRunner().invoke(main, ["train", "--print-recipe", "--set", "training.steps=3"])
    assert result.exit_code == 0 and "steps: 3" in result.stdout
    assert load_recipe("demo", ("training.steps=3",)).to_yaml() == result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--set", "training.stepz=3"], "did you mean steps?"),
        (["train", "--teacher", "./nowhere", "--print-recipe", "--recipe", "nope"], "unknown recipe 'nope'"),
        (["train", "--teacher", "./nowhere"], "no such model folder"),
        (["generate", "./nowhere", "hello"], "no such model folder"),
    ],
)
def test_faults_go_to_stderr_with_exit_code_2(arguments: list[str], said: str, tmp_path: Path) -> None:
    extra = ["--out", str(tmp_path)] if arguments[0] == "train" else []
    result = CliRunner().invoke(main, [*arguments, *extra])
    assert result.exit_code == 2, result.output
    assert said in result.stderr and not result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["train", "my.yaml"], ["teach", "my.yaml", "--out", "cache"]])
def test_a_recipe_without_its_option_is_told_where_it_goes(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "--recipe my.yaml" in result.output
