"""``python -m ane.mil``: what it prints, saves and refuses."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from ane.mil.command import EXAMPLES, mil

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "mil-runtime.md"
# An interpreter on which these were never installed.
ALONE = """
import runpy, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("mlx", "mlx_lm", "torch", "transformers"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Missing())
runpy.run_module("ane.mil", run_name="__main__")
"""


def invoke(*arguments: Any) -> Result:
    return CliRunner().invoke(mil, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture
def package(ct: Any, mb: Any, types: Any, save: Callable[..., Path]) -> Path:
    weight = np.arange(64, dtype=np.float16).reshape(4, 16) / 64
    state = mb.StateTensorSpec((1, 4), types.fp16)

    @mb.program(input_specs=[mb.TensorSpec((1, 16), types.fp16), state], opset_version=ct.target.iOS18)
    def program(x, total):  # type: ignore[no-untyped-def]
        y = mb.linear(x=x, weight=weight)
        return mb.coreml_update_state(state=total, value=mb.add(x=mb.read_state(input=total), y=y), name="y")

    return save(program, compute_precision=ct.precision.FLOAT16)


def _npy() -> bytes:
    """One array by itself, which np.load reads as no archive."""
    stream = io.BytesIO()
    np.save(stream, np.zeros(3))
    return stream.getvalue()


def test_a_package_is_described(package: Path) -> None:
    text = invoke(package).output
    for line in (
        "specification 9",
        "weights: fp16 136 B",
        "function main (ios18, default)",
        "  input   x: fp16[1, 16]",
        "  state   total: fp16[1, 4]",
        "read_state 2, linear 1, add 1, write_state 1",
    ):
        assert line in text, text
    report = json.loads(invoke(package, "--json").output)
    function = report["functions"]["main"]
    assert function["states"] == {"total": "fp16[1, 4]"}
    assert function["operations"] == {"read_state": 2, "linear": 1, "add": 1, "write_state": 1}
    assert function["unsupported"] == []
    assert report["weight_bytes"]["fp16"] == 2 * 64 + 8


def test_it_runs_on_given_inputs_and_saves_the_outputs(package: Path, tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((1, 16)).astype(np.float16)
    np.savez(tmp_path / "x.npz", x=x)
    result = invoke(package, "--inputs", tmp_path / "x.npz", "--outputs", tmp_path / "y.npz", "--json")
    assert result.exit_code == 0
    weight = np.arange(64, dtype=np.float32).reshape(4, 16) / 64
    expected = x.astype(np.float32) @ weight.T
    (name,) = json.loads(result.output)["run"]["outputs"]
    np.testing.assert_allclose(np.load(tmp_path / "y.npz")[name], expected, rtol=2e-3)


def test_a_trace_lists_every_intermediate(package: Path) -> None:
    run = json.loads(invoke(package, "--trace", "--mode", "fp16", "--json").output)["run"]
    assert [entry["operation"] for entry in run["trace"]] == ["linear", "read_state", "add", "read_state"]
    assert run["suspects"] == []
    assert "linear" in invoke(package, "--trace").output


def test_what_is_wrong_is_said_on_stderr(package: Path, tmp_path: Path) -> None:
    result = invoke(tmp_path / "missing.mlpackage")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "error: " in result.stderr
    assert "not an .mlpackage folder" in result.stderr
    result = invoke(package, "--run", "--function", "nain")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "unknown function 'nain'\nhint: did you mean 'main'?" in result.stderr
    for content in (b"PK", b"PK\x03\x04zzzz", b"", _npy()):
        (tmp_path / "x.npz").write_bytes(content)
        assert "no .npz file of inputs" in invoke(package, "--inputs", tmp_path / "x.npz").stderr


def test_the_examples_of_the_help_run(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert package == tmp_path / "model.mlpackage"
    np.savez("x.npz", x=np.zeros((1, 16)))
    examples = re.findall(r"python -m ane\.mil (.+)", EXAMPLES)
    assert len(examples) == 4
    for example in examples:
        assert invoke(*example.replace("--function decode", "--function main").split()).exit_code == 0


def test_the_readme_serves_those_who_only_want_to_run_a_package(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its commands in an interpreter without MLX and torch, then its test on the outputs that they left."""
    assert package == tmp_path / "model.mlpackage"
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", x=np.random.default_rng(0).standard_normal((1, 16)))
    section = (ROOT / "README.md").read_text().split("## Run an .mlpackage on Linux")[1].split("\n## ")[0]
    commands = re.findall(r"^python -m ane\.mil ([^#\n]+)", section, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        done = subprocess.run([sys.executable, "-c", ALONE, *command.split()], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    names["test_the_package_still_says_the_same"]()


def test_the_examples_of_the_page_run(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert package == tmp_path / "model.mlpackage"
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(examples) == 2
    names: dict[str, Any] = {"np": np}
    for example in examples:
        exec(compile(example, str(PAGE), "exec"), names)
    assert names["trace"].outputs.keys() == names["outputs"].keys()
