"""Mistakes are named with their value and a remedy, and cost nothing that was there before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from ane.convert import export as export_module
from ane.convert import families
from ane.convert.architecture import longest_context
from ane.convert.command import command
from ane.convert.export import export
from ane.convert.layout import Sizes, divide
from ane.convert.options import Options
from ane.convert.progress import Progress
from ane.convert.tensors import TensorFile
from ane.runtime import open_session
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
        ({"head_width": -5}, "--head-width: -5 is less than 0"),
        ({"rewind": -1}, "--rewind: -1 is less than 0"),
        ({"chunk_bytes": 0}, "--chunk-bytes: 0 is less than 1"),
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
        families.architecture({"model_type": "mamba"})
    assert "gemma3_text" in str(caught.value) and "one module in ane/convert/families" in str(caught.value)
    with pytest.raises(UserError, match=r"config\.json lacks 'hidden_size'"):
        families.architecture({"model_type": "llama", "num_attention_heads": 4})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "config.json: hidden_size: hidden_size is 0, not a positive whole number"),
        ({"num_attention_heads": "4"}, "num_attention_heads is '4', not a positive whole number"),
        ({"num_key_value_heads": 3}, "4 heads cannot share 3 key-value heads"),
        ({"rope_scaling": {"type": "linear", "factor": "two"}}, "config.json holds a value that does not fit"),
        ({"rope_scaling": {"type": "spiral"}}, "unknown rope_scaling type 'spiral'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "set a fixed scaling"),
        ({"model_type": "phi3"}, "model_type 'phi3' does not convert to Core ML"),
    ],
)
def test_values_that_do_not_convert_are_named_before_weights_are_read(
    changes: dict[str, Any], message: str, toy: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(toy("llama"), folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=message):
        export(folder, tmp_path / "bundle")


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
    assert families.architecture(config).head_dim == 32


def test_parts_over_the_chunk_limit_are_named() -> None:
    options = Options(chunk_bytes=100)
    for sizes, said, remedy in (
        (
            Sizes(0, (50, 120), (10,)),
            "layer 1 alone holds 120 bytes of weights, over the chunk limit of 100",
            "--weights",
        ),
        (Sizes(0, (50,), (10, 500)), "split 1 of the head alone holds 500 bytes", "--head-width"),
        (Sizes(101, (50,), (10,)), "the embedding alone holds 101 bytes", "--embedding host"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            divide(sizes, options)
        assert remedy in str(caught.value)
    with pytest.raises(UserError, match="3 chunks of 2 layers"):
        divide(Sizes(0, (1, 1), (1,)), Options(chunks=3))


@pytest.mark.parametrize(
    ("head", "behind"),
    [
        ((20, 20), [(3, 4, [0, 1])]),
        ((20, 50, 20), [(3, 4, []), (4, 4, [0, 1, 2])]),
        ((60, 60, 30, 80), [(3, 4, []), (4, 4, [0]), (4, 4, [1, 2]), (4, 4, [3])]),
    ],
)
def test_packages_are_filled_up_to_the_limit(head: tuple[int, ...], behind: list[Any]) -> None:
    """The head goes with the last layers where all of it fits, else behind them in as many packages as it takes."""
    chunks = divide(Sizes(30, (50, 40, 60, 40), head), Options(chunk_bytes=100))
    assert [chunk.index for chunk in chunks] == [*range(len(chunks))]
    assert [chunk.first for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
    assert [(c.start, c.stop, list(c.splits)) for c in chunks] == [(0, 1, []), (1, 3, []), *behind]


def test_a_head_in_several_packages_says_what_one_head_says(toy: Any, tmp_path: Path) -> None:
    """A layer of 41 kB, then three splits of 31 kB of which a package holds two."""
    folder, tokens = toy("mistral", num_hidden_layers=1, vocab_size=960), np.arange(14)[None] * 5
    several = {"head_width": 320, "chunk_bytes": 62_000}
    logits = []
    for name, choices in {"one": {}, "several": several, "argmax": several | {"head": "argmax"}}.items():
        manifest = export(folder, tmp_path / name, Options(context=32, prefill=8, **choices))  # type: ignore[arg-type]
        logits.append(open_session(tmp_path / name, "mil").extend(tokens))
        assert [package.head for package in manifest.packages] == ([True] if name == "one" else [False, True, True])
    assert np.allclose(logits[0], logits[1], atol=5e-3)  # hidden states are float16 between packages
    assert (logits[1].argmax(-1) == logits[2].argmax(-1)).all()


class _Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_full_disk_is_said_before_work_begins(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(toy("mistral"), tmp_path / "bundle", Options(context=32, prefill=8))
    before = (tmp_path / "bundle" / "manifest.json").read_bytes()
    monkeypatch.setattr(export_module.shutil, "disk_usage", lambda _: _Usage(10, 9, 1000))
    with pytest.raises(UserError, match=r"the bundle needs 0\.1 MB and 0\.0 MB are free"):
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
    before = (out / "manifest.json").read_bytes()
    result = CliRunner().invoke(command, [str(toy("llama")), "--out", str(out), "--chip", "m9"])
    assert isinstance(result.exception, UserError) and "unknown chip 'm9'" in str(result.exception)
    assert (out / "manifest.json").read_bytes() == before
    result = CliRunner().invoke(command, ["model", "--out", str(out), "--batch", "1;2"])
    assert result.exit_code == 2 and "'1;2' is no list of sizes, as 1,2,4" in result.output
