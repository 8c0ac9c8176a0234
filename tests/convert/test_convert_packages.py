"""What lies on disk, read by coremltools: versions, states, shared weights, spelling, no passes that hurt."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ane.convert.bundle import read_manifest, verify
from ane.convert.export import export
from ane.convert.lint import lint
from ane.convert.options import Options
from ane.convert.project import project
from mlxkd.errors import UserError
from mlxkd.runtime import import_coremltools

# In a process of its own, for the peak of this one is whatever the other tests left.
GROWTH = """
import sys
from ane.convert.export import export
from ane.convert.options import Options
from mlxkd.runtime import peak_process_memory
for model in sys.argv[1:3]:
    export(model, model + ".bundle", Options(context=32, prefill=8, chunk_bytes=int(sys.argv[3])))
    print(peak_process_memory())
"""


def spec_of(package: Path) -> Any:
    """The specification as coremltools loads it."""
    return import_coremltools().models.MLModel(str(package), skip_model_load=True).get_spec()


def operations(spec: Any, function: str) -> list[Any]:
    (block,) = spec.mlProgram.functions[function].block_specializations.values()
    return list(block.operations)


@pytest.fixture(scope="module")
def bundle(toy: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packages") / "bundle"
    export(toy("llama"), out, Options(context=64, prefill=8, verify=4, batch=(1, 2), chunks=2))
    return out


@pytest.mark.parametrize(("target", "version", "opset"), [("iOS18", 9, "CoreML8"), ("iOS26", 10, "CoreML9")])
def test_coremltools_reloads_every_package(target: str, version: int, opset: str, toy: Any, tmp_path: Path) -> None:
    manifest = export(toy("mistral"), tmp_path / "bundle", Options(context=32, prefill=8, chunks=2, target=target))
    assert manifest.specification_version == version
    for package in manifest.packages:
        spec = spec_of(tmp_path / "bundle" / package.file)
        assert spec.specificationVersion == version
        assert spec.description.defaultFunctionName == "decode"
        assert {f.name for f in spec.description.functions} == set(package.functions)
        assert {f.opset for f in spec.mlProgram.functions.values()} == {opset}


def test_states_are_float16_and_few_and_aligned(bundle: Path) -> None:
    for package in read_manifest(bundle).packages:
        spec = spec_of(bundle / package.file)
        for function in spec.description.functions:
            assert len(function.state) == 1
            array = function.state[0].type.stateType.arrayType
            assert array.dataType == 65552  # FLOAT16
            assert all(dim % 32 == 0 for dim in list(array.shape)[-2:])
            described = package.functions[function.name].states[0]
            assert (function.state[0].name, tuple(array.shape)) == (described.name, described.shape)
            assert [i.name for i in function.input] == [i.name for i in package.functions[function.name].inputs]
            assert [o.name for o in function.output] == [o.name for o in package.functions[function.name].outputs]


def test_weights_are_stored_once_for_all_functions(bundle: Path, toy: Any) -> None:
    manifest = read_manifest(bundle)
    source = (toy("llama") / "model.safetensors").stat().st_size  # float16 as well
    host = (bundle / "embedding.npy").stat().st_size
    stored = sum(package.weight_bytes for package in manifest.packages)
    assert stored + host < 1.15 * source  # blob headers and alignment; twice would be 2.0
    for package in manifest.packages:
        spec = spec_of(bundle / package.file)
        offsets = {
            name: {
                op.outputs[0].name: op.attributes["val"].blobFileValue.offset
                for op in operations(spec, name)
                if op.type == "const" and op.attributes["val"].HasField("blobFileValue")
            }
            for name in package.functions
        }
        matrices = {n for n in offsets["decode"] if n.endswith("_proj_weight")}
        assert matrices
        for other in offsets.values():
            assert {n: other[n] for n in matrices} == {n: offsets["decode"][n] for n in matrices}


def test_operations_are_those_the_neural_engine_takes(bundle: Path) -> None:
    """No gather guards, no int16 casts, no fused attention; every update of a state is written before it is read."""
    for package in read_manifest(bundle).packages:
        spec = spec_of(bundle / package.file)
        for name in package.functions:
            ops = operations(spec, name)
            kinds = Counter(op.type for op in ops)
            assert not {"cast", "select", "greater_equal", "scaled_dot_product_attention", "linear"} & set(kinds)
            for op, following in itertools.pairwise(ops):
                if op.type == "slice_update":
                    result = op.outputs[0].name
                    assert following.type == "write_state"
                    assert following.inputs["data"].arguments[0].name == result
                    readers = [o for o in ops for b in o.inputs.values() for a in b.arguments if a.name == result]
                    assert len(readers) == 1
            assert kinds["slice_update"] == kinds["write_state"]


def test_tied_embeddings_in_the_model_are_stored_once(toy: Any, tmp_path: Path) -> None:
    folder = toy("mistral")
    manifest = export(folder, tmp_path / "bundle", Options(context=32, prefill=8, profile="gpu"))
    assert manifest.packages[0].weight_bytes < 1.15 * (folder / "model.safetensors").stat().st_size


def test_one_function_can_be_taken_out(bundle: Path, tmp_path: Path) -> None:
    """A compute plan reads single-function packages only."""
    project(bundle, 1, "verify_b2", tmp_path / "one.mlpackage")
    spec = spec_of(tmp_path / "one.mlpackage")
    assert list(spec.mlProgram.functions) == ["main"]
    wanted = read_manifest(bundle).packages[1].functions["verify_b2"]
    (described,) = spec.description.functions
    assert [i.name for i in described.input] == [i.name for i in wanted.inputs]
    with pytest.raises(UserError, match="unknown function 'verify_b3'"):
        project(bundle, 1, "verify_b3", tmp_path / "two.mlpackage")


def test_memory_follows_the_largest_package_not_the_model(toy: Any, tmp_path: Path) -> None:
    """Sixteen layers in eight packages may take what one package weighs above the conversion of a single layer."""
    chunk, layers = 12 << 20, 16
    wide = {"hidden_size": 512, "intermediate_size": 1536}
    models = [shutil.copytree(toy("mistral", **wide, num_hidden_layers=n), tmp_path / str(n)) for n in (1, layers)]
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, *map(str, models), str(chunk)], capture_output=True, text=True, check=True
    )
    shallow, deep = map(int, done.stdout.split())
    sizes = [package.weight_bytes for package in read_manifest(f"{models[1]}.bundle").packages]
    assert len(sizes) == layers // 2 and sum(sizes) > 6 * chunk
    assert deep - shallow < 1.5 * max(sizes)


def test_the_lint_applies_the_residency_rules(bundle: Path) -> None:
    found = lint(bundle)
    assert not found.failures
    assert 0.5 < found.share <= 1
    assert all(text.startswith("R") for text in found.warnings)


def test_a_changed_file_is_found(bundle: Path, toy: Any, tmp_path: Path) -> None:
    verify(bundle)
    export(toy("llama"), tmp_path / "other", Options(context=32, prefill=8))
    with (tmp_path / "other" / "embedding.npy").open("r+b") as stream:
        stream.seek(200)
        stream.write(b"\x01\x02")
    (tmp_path / "other" / "README.md").unlink()
    with pytest.raises(UserError, match=r"README\.md is missing; embedding\.npy differs"):
        verify(tmp_path / "other")
