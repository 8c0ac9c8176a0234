"""Weights on every grid: the very codes of the source on disk, decoded by the runtime to the source's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from toy_models import packed, student

from ane import mil
from ane.convert import choose
from ane.convert.bundle import read_manifest
from ane.convert.check import check, divergence, reference
from ane.convert.constants import Latest
from ane.convert.export import export
from ane.convert.options import Options
from ane.convert.source import Source
from ane.convert.weights import Coded, Dense
from ane.runtime import open_session
from mlxkd import compat
from mlxkd.errors import UserError
from mlxkd.quant.grids import grid

SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96}
ANE_GRIDS = ("ane-int8", "ane-lut2", "ane-lut3", "ane-lut4", "ane-lut6", "ane-lut8", "ane-lut4-gc8")


def close(folder: Path, bundle: Path, steps: int = 6) -> float:
    """Worst KL of a prefill and some decoded tokens."""
    theirs, ours = reference(folder), open_session(bundle, "mil")
    rng, worst = np.random.default_rng(3), 0.0
    for size in (11, *[1] * steps):
        tokens = rng.integers(0, theirs.vocab_size, (1, size))
        worst = max(worst, divergence(np.array(theirs.extend(tokens)), ours.extend(tokens)))
    return worst


def stored(bundle: Path) -> dict[str, int]:
    """Bytes by storage type over all packages."""
    total: dict[str, int] = {}
    for package in read_manifest(bundle).packages:
        for kind, size in mil.load(bundle / package.file).weight_bytes().items():
            total[kind] = total.get(kind, 0) + size
    return total


@pytest.mark.parametrize("name", ANE_GRIDS)
def test_a_student_is_exported_code_for_code(name: str, toy: Any, tmp_path: Path) -> None:
    folder = student(toy("mistral", **SMALL), tmp_path / "student", name)
    manifest = export(folder, tmp_path / "bundle", Options(context=64, prefill=8, head_width=40))
    assert set(manifest.grids) == {name}
    assert not manifest.expected_loss
    assert close(folder, tmp_path / "bundle") < 1e-3
    bits = grid(name).bits
    kind = "int8" if name == "ane-int8" else f"uint{bits}"
    weights = 96 * 64 + 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 96)  # tied head, then attention and MLP
    assert stored(tmp_path / "bundle")[kind] == pytest.approx(weights * bits / 8, rel=0.01)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (8, 32), (2, 32), (3, 32), (6, 32)])
def test_mlx_codes_are_kept_on_the_gpu_profile(bits: int, group: int, toy: Any, tmp_path: Path) -> None:
    """The codes in the package are those of mlx-lm's own file; scales as blocks with a float offset."""
    changes = {**SMALL, "intermediate_size": 128}
    folder = packed(toy("llama", **changes, attention_bias=False, mlp_bias=False), tmp_path / "packed", bits, group)
    manifest = export(folder, tmp_path / "bundle", Options(context=64, prefill=8, profile="gpu"))
    assert set(manifest.grids) == {f"mlx-affine{bits}-g{group}"}
    assert close(folder, tmp_path / "bundle") < 1e-3
    kinds = stored(tmp_path / "bundle")
    assert kinds.get("uint4" if bits <= 4 else "uint8", 0) > 0


def test_codes_that_the_neural_engine_miscomputes_are_refused(toy: Any, tmp_path: Path) -> None:
    folder = packed(toy("mistral", **SMALL), tmp_path / "packed", 4, 32)
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "kept").write_text("the previous bundle")
    with pytest.raises(UserError, match=r"per-block scales: \d+ on mlx-affine4-g32 of \d+ coded layers") as caught:
        export(folder, tmp_path / "bundle", Options(context=64))
    assert "--profile gpu" in str(caught.value) and "--master" in str(caught.value)
    assert (tmp_path / "bundle" / "kept").exists()
    with pytest.raises(UserError, match="the Neural Engine cannot hold mlx-affine4-g32"):
        export(folder, tmp_path / "bundle", Options(context=64, weights="mlx-affine4-g32"))


def test_asking_quantises_from_the_master_and_says_the_loss(toy: Any, tmp_path: Path) -> None:
    master = toy("mistral", **SMALL)
    folder = packed(master, tmp_path / "packed", 4, 32)
    options = Options(context=64, prefill=8, weights="ane-int8", master=master)
    manifest = export(folder, tmp_path / "bundle", options)
    assert set(manifest.grids) == {"ane-int8"}
    assert len(manifest.expected_loss) == 2 * 7 + 1
    # The closed form: a uniform error of step / sqrt(12), the step being the row's largest value over 127.
    path = "model.layers.0.mlp.up_proj"
    dense = np.array(Source(master).weight(path).dense()).astype(np.float64)
    step = np.abs(dense).max(1, keepdims=True) / 127
    predicted = np.sqrt((step**2 / 12 * np.ones_like(dense)).sum() / (dense**2).sum())
    assert manifest.expected_loss[path] == pytest.approx(predicted, rel=0.1)
    assert "quantised on export" in (tmp_path / "bundle" / "README.md").read_text()
    assert close(master, tmp_path / "bundle") < 0.05


@pytest.mark.parametrize("name", ["ane-int8", "ane-lut3", "ane-lut4-gc8", "mlx-affine4-g32"])
def test_codes_made_some_rows_at_a_time_are_those_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "ELEMENTS_AT_ONCE", 5 * 64)
    w = np.random.default_rng(0).standard_normal((24, 64)).astype(np.float16)
    dense = Dense("w", (24, 64), lambda rows: mx.array(w[slice(*(rows or (0, 24)))]))
    codes, error = choose.encode(dense, grid(name))
    whole = grid(name).encode(mx.array(w), mx.float16)
    assert codes.keys() == whole.keys() and all(mx.array_equal(codes[key], whole[key]) for key in whole)
    decoded = np.array(grid(name).decode(whole, mx.float16)).astype(np.float64)
    exact = w.astype(np.float64)
    assert error == pytest.approx(np.linalg.norm(decoded - exact) / np.linalg.norm(exact), rel=1e-4)
    latest = Coded("w", (24, 64), grid(name), choose.held(Latest(), "w", 24, lambda: whole))
    assert np.array_equal(latest.dense((8, 16)), latest.dense()[8:16])


def test_blocks_whose_offset_is_beyond_float16_are_refused() -> None:
    """One code differs from the others, so that no scale and offset of the same codes comes near."""
    codes = {
        "weight": mx.array([[1, 0, 0, 0]] * 2, mx.uint32),
        "scales": mx.full((2, 1), 1e-6),
        "biases": mx.ones((2, 1)),
    }
    weight = Coded("model.norm", (2, 32), grid("mlx-affine4-g32"), lambda rows: codes)
    with pytest.raises(UserError, match="2 blocks hold nearly one value each") as caught:
        weight.constexpr()
    assert "model.norm" in str(caught.value) and "--weights float" in str(caught.value)


def test_coded_weights_can_be_written_as_float(toy: Any, tmp_path: Path) -> None:
    folder = packed(toy("mistral", **SMALL), tmp_path / "packed", 4, 32)
    manifest = export(folder, tmp_path / "bundle", Options(context=64, prefill=8, weights="float"))
    assert set(manifest.grids) == {"float16"}
    assert close(folder, tmp_path / "bundle") < 1e-3


def test_a_split_that_cuts_a_palette_is_refused(toy: Any, tmp_path: Path) -> None:
    folder = student(toy("mistral", **SMALL), tmp_path / "student", "ane-lut4-gc8")
    with pytest.raises(UserError, match="cuts a palette shared by 8 rows") as caught:
        export(folder, tmp_path / "bundle", Options(context=64, head_width=36))
    assert "multiple of 8" in str(caught.value)


def test_the_check_names_the_layer_that_differs(toy: Any, tmp_path: Path) -> None:
    """A bundle of other weights in layer 1: the tokens differ and the check finds where it begins."""
    right = toy("llama", num_hidden_layers=3)
    outcome_folder = tmp_path / "wrong"
    model, config = compat.load_model(right)
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[1].mlp.down_proj.weight * 1.5
    compat.save_model_folder(outcome_folder, model, config, right)
    export(outcome_folder, tmp_path / "bundle", Options(context=64, prefill=8, chunks=2, batch=(2,)))
    outcome = check(right, tmp_path / "bundle", 12)
    assert not outcome.passed
    assert outcome.layer == 1
    assert f"layer 1 differs first (relative error {outcome.layer_error:.3f})" in outcome.text()
    same = check(outcome_folder, tmp_path / "bundle", 5)
    assert same.text().startswith("greedy tokens: 5 of 5 identical to MLX, KL at most ")
