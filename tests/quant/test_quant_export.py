"""From the last step of training to the Core ML bundle no code changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from test_quant_identity import LLAMA, llama, train

from ane import mil
from ane.convert.bundle import read_manifest
from ane.mil.program import Literal, Node
from mlxkd.cli import main
from mlxkd.compat import save_model_folder
from mlxkd.quant import attach, changed_codes, grid, load_student, pack, plan_for, save_student

ARRAYS = {"constexpr_lut_to_dense": "indices", "constexpr_blockwise_shift_scale": "data"}


def in_the_packages(bundle: Path) -> dict[str, np.ndarray]:
    """Weight name (dots as underscores) -> its codes [out, in] as the packages' weight files hold them."""
    parts: dict[str, dict[int, np.ndarray]] = {}
    for package in read_manifest(bundle).packages:
        for function in mil.load(bundle / package.file).spec.functions.values():
            nodes = list(function.block.walk())
            constants = {node.outputs[0][0]: node.attributes["val"] for node in nodes if node.type == "const"}
            for node in nodes:
                if node.type in ARRAYS:
                    weight, _, suffix = node.name.partition("_decoded")
                    row = suffix.rpartition("_")[2]
                    array = _content(node, ARRAYS[node.type], constants)
                    parts.setdefault(weight, {})[int(row) if row.isdigit() else 0] = array
    return {weight: np.concatenate([found[row] for row in sorted(found)]) for weight, found in parts.items()}


def _content(node: Node, name: str, constants: dict[str, Literal]) -> np.ndarray:
    bound = node.inputs[name][0]
    array = (constants[bound] if isinstance(bound, str) else bound).decode()
    return array.reshape(array.shape[:2])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ane-lut4", ()),
        ("ane-lut3", ()),
        ("ane-int8", ("--head-width", "40")),
        ("mlx-affine4-g32", ("--profile", "gpu")),
    ],
)
def test_a_trained_student_keeps_its_codes_through_export(name: str, options: tuple[str, ...], tmp_path: Path) -> None:
    model = llama()
    save_model_folder(tmp_path / "float", llama(), LLAMA, tmp_path)
    attach(model, plan_for(model, name), learned_ranges=True)
    before = pack(model, LLAMA)
    train(model)
    shipped = pack(model, LLAMA)
    assert changed_codes(before, shipped)  # training has reached the grid
    save_student(tmp_path / "student", shipped, tmp_path / "float")
    assert changed_codes(shipped, load_student(tmp_path / "student")) == 0
    out = ["--out", str(tmp_path / "bundle"), "--context", "64", "--prefill", "8"]
    result = CliRunner().invoke(main, ["export", str(tmp_path / "student"), "--to", "coreml", *out, *options])
    assert result.exit_code == 0, result.output
    written, compared = in_the_packages(tmp_path / "bundle"), 0
    signed = 127 if name == "ane-int8" else 0  # Core ML holds these around zero
    for path, codes in shipped.codes.items():
        mine = np.array(grid(name).indices(codes)).astype(np.int64) - signed
        assert np.array_equal(written[path.replace(".", "_")].astype(np.int64), mine), path
        compared += mine.size
    assert compared == 96 * 128 + 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 128)
