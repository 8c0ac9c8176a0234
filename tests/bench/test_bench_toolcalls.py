"""`bench toolcalls` on one model, three ways: its folder, a real mlx_lm.server, and its bundle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from model_server import model_server

from bench.cli import main
from mlxkd.demo import DEMO_TEACHER

SCORES = ("call_exact", "schema_valid", "name_ok")
FEW = ("--requests", "3", "--max-tokens", "48", "--json")


@pytest.fixture(scope="module")
def teacher() -> Path:
    """A small model with a chat template that calls tools, well or badly."""
    return DEMO_TEACHER


@pytest.fixture(scope="module")
def server(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with model_server(teacher, tmp_path_factory.mktemp("server") / "log") as base:
        yield base


def judged(*arguments: Any) -> dict[str, Any]:
    done = CliRunner().invoke(main, ["toolcalls", *map(str, arguments), *FEW], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.output[done.output.index("{") :])


@pytest.fixture(scope="module")
def local(teacher: Path) -> dict[str, Any]:
    return judged(teacher)


def test_a_server_earns_the_scores_of_the_model_it_serves(server: str, teacher: Path, local: dict[str, Any]) -> None:
    """The same greedy answers, parsed by the server there and by us here, must be judged alike."""
    served = judged(server, "--model", teacher)
    assert {name: served[name]["value"] for name in SCORES} == {name: local[name]["value"] for name in SCORES}
    assert all(served[name]["n"] == 3 and served[name]["device"].startswith("endpoint http") for name in SCORES)
    assert served["ttfa_ms"]["n"] == 3
    assert served["ttfa_steps"]["value"] is None  # a server does not tell its model's steps


def test_the_page_shows_what_came_before_the_call(local: dict[str, Any]) -> None:
    assert local["ttfa_overhead_tokens"]["unit"] == "tokens"
    assert {"ttfa_tokens", "ttfa_steps", "ttfa_ms"} <= local.keys()


@pytest.mark.slow
def test_a_bundle_earns_the_scores_of_the_model_it_was_made_from(
    teacher: Path, local: dict[str, Any], tmp_path: Path
) -> None:
    from ane.convert.export import export
    from ane.convert.options import Options

    export(teacher, tmp_path / "b", Options(context=512, prefill=64))
    bundled = judged(tmp_path / "b")
    assert {name: bundled[name]["value"] for name in SCORES} == {name: local[name]["value"] for name in SCORES}
