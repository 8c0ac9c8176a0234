"""Mistakes are named with their value and a remedy, and cost nothing that was there before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import pytest
from click.testing import CliRunner

from ane.convert import export as export_module
from ane.convert import families
from ane.convert.architecture import longest_context
from ane.convert.command import command
from ane.convert.export import export
from ane.convert.layout import divide
from ane.convert.options import Options
from ane.convert.progress import Progress
from ane.convert.tensors import TensorFile
from mlxkd.errors import UserError


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"context": 100}, "context 100 is not a positive multiple of 32"),
        ({"context": 0}, "use 32"),
        ({"prefill": 4096}, r"prefill 4096 must lie in 1\.\.2048"),
        ({"context": 64, "prefill": 65}, r"prefill 65 must lie in 1\.\.64"),
        ({"verify": 1}, r"verify 1 must be 0 or lie in 2\.\.2048"),
        ({"profile": "tpu"}, "--profile: 'tpu' is not one of ane, gpu"),
        ({"target": "iOS17"}, "--target: 'iOS17' is not one of iOS18, iOS26"),
        ({"batch": (2, 2)}, r"batch sizes \(2, 2\) must be distinct"),
        ({"master": Path("x")}, "a master is read only where --weights names a grid"),
    ],
)
def test_choices_are_checked_before_anything_is_read(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Options(**choices)


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        ({}, None),
        ({"max_position_embeddings": 4096}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
        # Qwen's recipe for YaRN leaves the trained length in the config; Llama 3.1 writes the scaled one.
        (
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
            },
            131072,
        ),
        ({"max_position_embeddings": 40960, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 40960),
    ],
)
def test_the_longest_context_follows_the_config(config: dict[str, Any], longest: int | None) -> None:
    assert longest_context(config) == longest


def test_a_context_the_model_was_not_made_for_is_refused(toy: Any, tmp_path: Path) -> None:
    """512 positions, unless the rotary embedding is scaled; without a choice the bundle holds what the model does."""
    with pytest.raises(UserError, match="context 544 is above the 512 positions that the model was made for") as caught:
        export(toy("mistral"), tmp_path / "bundle", Options(context=544))
    assert "--context" in str(caught.value) and "use 512 or less" in str(caught.value)
    assert "rope_scaling" in str(caught.value) and not (tmp_path / "bundle").exists()
    scaled = toy("mistral", rope_scaling={"type": "linear", "factor": 2.0})
    assert export(scaled, tmp_path / "scaled", Options(context=544, prefill=8)).context == 544
    assert export(toy("mistral", max_position_embeddings=72), tmp_path / "short", Options(prefill=8)).context == 64
    assert Options().resolved().context == Options().resolved(4096).context == 2048
    with pytest.raises(UserError, match="context 32 is above the 20 positions"):
        Options(prefill=8).resolved(20)


def test_an_unknown_family_is_refused_by_name(toy: Any) -> None:
    with pytest.raises(UserError, match="model_type 'mamba' does not convert to Core ML") as caught:
        families.architecture({"model_type": "mamba"}, tied=True)
    assert "gemma3_text" in str(caught.value) and "one module in ane/convert/families" in str(caught.value)
    with pytest.raises(UserError, match=r"config\.json lacks 'hidden_size'"):
        families.architecture({"model_type": "llama", "num_attention_heads": 4}, tied=True)


def test_a_family_from_outside_needs_its_module_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toyfamily.py").write_text("from ane.convert.families.llama import architecture  # noqa: F401\n")
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    config = {
        "model_type": "toyfamily",
        "num_attention_heads": 2,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "intermediate_size": 8,
        "vocab_size": 9,
        "rms_norm_eps": 1e-5,
    }
    assert "toyfamily" in families.names()
    assert families.architecture(config, tied=True).head_dim == 32


def test_parts_over_the_chunk_limit_are_named() -> None:
    options = Options(chunk_bytes=100)
    with pytest.raises(UserError, match="layer 1 alone holds 120 bytes of weights, over the chunk limit of 100"):
        divide(0, [50, 120], 10, options)
    with pytest.raises(UserError, match="the head alone holds 500 bytes"):
        divide(0, [50], 500, options)
    with pytest.raises(UserError, match="3 chunks of 2 layers"):
        divide(0, [1, 1], 1, Options(chunks=3))
    chunks = divide(30, [50, 40, 60, 40], 90, options)
    assert [(c.start, c.stop, c.first, c.head) for c in chunks] == [
        (0, 1, True, False),
        (1, 3, False, False),
        (3, 4, False, False),
        (4, 4, False, True),
    ]


class _Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_full_disk_is_said_before_work_begins(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(toy("mistral"), tmp_path / "bundle", Options(context=32, prefill=8))
    before = (tmp_path / "bundle" / "manifest.json").read_bytes()
    monkeypatch.setattr(export_module.shutil, "disk_usage", lambda _: _Usage(10, 9, 1000))
    with pytest.raises(UserError, match=r"the bundle needs 0\.00 GB and 0\.00 GB are free"):
        export(toy("mistral"), tmp_path / "bundle", Options(context=64, prefill=8))
    assert (tmp_path / "bundle" / "manifest.json").read_bytes() == before


class _FailingProgress(Progress):
    def advance(self, count: int) -> None:
        raise RuntimeError("the blob could not be written")


def test_a_disk_that_fills_on_the_way_keeps_the_previous_bundle(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(toy("mistral"), tmp_path / "bundle", Options(context=32, prefill=8))
    before = (tmp_path / "bundle" / "manifest.json").read_bytes()
    left = iter([10**12])
    monkeypatch.setattr(export_module.shutil, "disk_usage", lambda _: _Usage(10, 9, next(left, 0)))
    with pytest.raises(UserError, match="cannot write: No space left on device"):
        export(toy("mistral"), tmp_path / "bundle", Options(context=64, prefill=8), _FailingProgress())
    assert (tmp_path / "bundle" / "manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_cut_off_weight_file_is_said(toy: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(toy("mistral"), tmp_path / "model"))
    weights = folder / "model.safetensors"
    file = TensorFile(weights)
    last = max(file.shapes, key=lambda name: file._entries[name]["data_offsets"])  # type: ignore[arg-type, return-value]
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(UserError, match=f"tensor '{last}' is cut off"):
        file.read(last)
    weights.write_bytes(b"\xff" * 40)
    with pytest.raises(UserError, match="not a readable safetensors file"):
        TensorFile(weights)


def test_tensors_are_read_as_mlx_reads_them(tmp_path: Path) -> None:
    values = {
        "a": mx.random.normal((6, 5)).astype(mx.bfloat16),
        "b": mx.random.normal((4, 3)),
        "c": mx.arange(12, dtype=mx.uint32).reshape(3, 4),
    }
    mx.save_safetensors(str(tmp_path / "x.safetensors"), values)
    file = TensorFile(tmp_path / "x.safetensors")
    for name, value in values.items():
        assert mx.array_equal(file.read(name), value)
        assert mx.array_equal(file.read(name, (1, 3)), value[1:3])
        assert file.read(name).dtype == value.dtype


def test_the_command_exports_and_checks(toy: Any, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    choices = ["--context", "64", "--prefill", "8", "--batch", "1,2", "--batch", "3", "--rewind", "7", "--check", "3"]
    result = CliRunner().invoke(command, [str(toy("llama")), "--out", str(out), *choices], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "greedy tokens: 3 of 3 identical to MLX" in result.stdout
    assert "predicted share on the Neural Engine: " in result.stderr
    manifest = json.loads((out / "manifest.json").read_text())
    assert {f["name"] for f in manifest["functions"]} == {
        f"{role}{size}" for role in ("prefill", "decode") for size in ("", "_b2", "_b3")
    }
    assert manifest["options"]["rewind"] == 7
    result = CliRunner().invoke(command, ["model", "--out", str(out), "--batch", "1;2"])
    assert result.exit_code == 2 and "'1;2' is no list of sizes, as 1,2,4" in result.output
