"""What coremltools writes is read back exactly; what is damaged is refused with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ane.mil.blob import BlobFile
from ane.mil.limits import Limits
from ane.mil.package import Package, load
from ane.mil.reader import read
from mlxkd.errors import UserError

MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
BLOBS = {
    "fp32": ("float", np.float32),
    "fp16": ("fp16", np.uint16),
    **{name: (name, np.dtype(name).type) for name in ("int8", "uint8", "int16", "uint16", "int32", "uint32")},
    "int4": ("int4", np.int8),
    **{f"uint{bits}": (f"uint{bits}", np.uint8) for bits in (1, 2, 3, 4, 6)},
}


@pytest.mark.parametrize("dtype", BLOBS)
@pytest.mark.parametrize("count", [1, 7, 21, 256])
def test_blobs_of_every_storage_type_equal_what_was_written(dtype: str, count: int, ct: Any, tmp_path: Path) -> None:
    from coremltools.libmilstoragepython import _BlobStorageReader, _BlobStorageWriter

    method, held = BLOBS[dtype]
    bits = int("".join(c for c in dtype if c.isdigit()))
    values = np.random.default_rng(count).integers(0, 2 ** min(bits, 30), count)
    values = (values - 8).astype(held) if dtype == "int4" else values.astype(held)
    path = tmp_path / "weight.bin"
    writer = _BlobStorageWriter(str(path))
    first = getattr(writer, f"write_{method}_data")(values)
    second = getattr(writer, f"write_{method}_data")(values[::-1].copy())
    del writer
    file = BlobFile(path)
    expected = values.view(np.float16) if dtype == "fp16" else values
    np.testing.assert_array_equal(file.read(first, dtype, (count,)), expected)
    np.testing.assert_array_equal(file.read(second, dtype, (count, 1))[:, 0], expected[::-1])
    theirs = np.array(getattr(_BlobStorageReader(str(path)), f"read_{method}_data")(first))
    np.testing.assert_array_equal(
        file.read(first, dtype, (count,)).view(held).astype(np.int64), theirs.astype(np.int64)
    )


@pytest.fixture
def linear(ct: Any, mb: Any, save: Callable[..., Path]) -> Path:
    weight = np.arange(64, dtype=np.float32).reshape(4, 16)

    @mb.program(input_specs=[mb.TensorSpec((2, 16))], opset_version=ct.target.iOS18)
    def program(x):  # type: ignore[no-untyped-def]
        return mb.linear(x=x, weight=weight, name="y")

    return save(program)


def test_a_package_says_what_it_is(ct: Any, mb: Any, save: Callable[..., Path], linear: Path) -> None:
    package = load(linear)
    function = package.function()
    assert (package.spec.version, function.spec.opset, package.default) == (9, "ios18", "main")
    assert {n: (f.dtype, f.shape) for n, f in function.inputs.items()} == {"x": ("fp32", (2, 16))}
    assert {n: (f.dtype, f.shape) for n, f in function.outputs.items()} == {"y": ("fp32", (2, 4))}
    assert package.metadata["com.github.apple.coremltools.version"] == ct.__version__
    assert package.weight_bytes()["fp32"] == 4 * 64 + 4 * 4
    x = np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32)
    weight = np.arange(64, dtype=np.float32).reshape(4, 16)
    np.testing.assert_allclose(package.predict({"x": x})["y"], x @ weight.T, rtol=1e-5)


def test_enumerated_and_ranged_shapes_decide_what_may_be_given(ct: Any, mb: Any, save: Callable[..., Path]) -> None:
    from coremltools.converters.mil.mil import get_new_symbol

    def program() -> Any:
        @mb.program(input_specs=[mb.TensorSpec((get_new_symbol(), 4))], opset_version=ct.target.iOS17)
        def double(x):  # type: ignore[no-untyped-def]
            return mb.mul(x=x, y=2.0, name="y")

        return double

    target = {"minimum_deployment_target": ct.target.iOS17}
    shapes = ct.EnumeratedShapes(shapes=[(2, 4), (3, 4)])
    listed = load(save(program(), name="listed", inputs=[ct.TensorType("x", shapes)], **target))
    assert set(listed.function().inputs["x"].shapes) == {(2, 4), (3, 4)}
    np.testing.assert_array_equal(listed.predict({"x": np.ones((3, 4))})["y"], np.full((3, 4), 2.0))
    with pytest.raises(UserError, match=r"input 'x' has shape \[4, 4\], allowed: \[2, 4\] or \[3, 4\]"):
        listed.predict({"x": np.ones((4, 4))})
    shape = (ct.RangeDim(1, 5, default=2), 4)
    ranged = load(save(program(), name="ranged", inputs=[ct.TensorType("x", shape)], **target))
    assert ranged.function().inputs["x"].ranges == ((1, 5), (4, 4))
    assert ranged.predict({"x": np.ones((5, 4))})["y"].shape == (5, 4)
    with pytest.raises(UserError, match=r"input 'x' has shape \[6, 4\], allowed: \[1\.\.5, 4\.\.4\]"):
        ranged.predict({"x": np.ones((6, 4))})


def test_inputs_that_do_not_fit_are_named(linear: Path) -> None:
    function = load(linear).function()
    with pytest.raises(UserError, match=r"input 'x' is missing\nhint: give fp32\[2, 16\]"):
        function.predict({})
    with pytest.raises(UserError, match=r"input 'x' has shape \[3, 16\], the function takes fp32\[2, 16\]"):
        function.predict({"x": np.ones((3, 16))})
    with pytest.raises(UserError, match=r"unknown input 'z'"):
        function.predict({"x": np.ones((2, 16)), "z": np.ones(1)})
    with pytest.raises(UserError, match=r"input 'x' holds <U1, not numbers"):
        function.predict({"x": np.full((2, 16), "a")})
    with pytest.raises(UserError, match=r"unknown function 'decode'\nhint: known: main"):
        load(linear).function("decode")


Damage = Callable[[Path], None]


def _spec(path: Path, change: Callable[[Any], None]) -> None:
    from coremltools.proto import Model_pb2

    model = Model_pb2.Model()
    model.ParseFromString((path / MODEL).read_bytes())
    change(model)
    (path / MODEL).write_bytes(model.SerializeToString())


def _operation(model: Any, kind: str) -> Any:
    (block,) = model.mlProgram.functions["main"].block_specializations.values()
    return next(o for o in block.operations if o.type == kind)


def _patch(path: Path, at: int, data: bytes) -> None:
    content = bytearray((path / WEIGHTS).read_bytes())
    content[at : at + len(data)] = data
    (path / WEIGHTS).write_bytes(content)


def _manifest(path: Path, target: str) -> None:
    content = json.loads((path / "Manifest.json").read_text())
    content["itemInfoEntries"][content["rootModelIdentifier"]]["path"] = target
    (path / "Manifest.json").write_text(json.dumps(content))


def _dimension(model: Any, size: int) -> None:
    _operation(model, "linear").outputs[0].type.tensorType.dimensions[0].constant.size = size


DAMAGE: dict[str, tuple[Damage, str]] = {
    "no manifest": (lambda p: (p / "Manifest.json").unlink(), r"not an .mlpackage folder \(no Manifest.json\)"),
    "manifest is no JSON": (lambda p: (p / "Manifest.json").write_text("{"), "the manifest names no root model"),
    "manifest leads outside": (lambda p: _manifest(p, "../../../secret"), "is no file inside the package"),
    "truncated specification": (
        lambda p: (p / MODEL).write_bytes((p / MODEL).read_bytes()[:-40]),
        "the specification is truncated or damaged",
    ),
    "another kind of model": (
        lambda p: _spec(p, lambda m: m.glmRegressor.SetInParent()),
        "the model is a glmRegressor, not an ML program",
    ),
    "truncated weights": (
        lambda p: (p / WEIGHTS).write_bytes((p / WEIGHTS).read_bytes()[:-100]),
        r"blob at byte 64 claims bytes 128 to 384 of 284",
    ),
    "empty weights": (lambda p: (p / WEIGHTS).write_bytes(b""), "cannot read the weights"),
    "weights gone": (lambda p: (p / WEIGHTS).unlink(), "is no file inside the package"),
    "another blob version": (lambda p: _patch(p, 4, b"\x07"), "blob storage version 7; version 2 is the one known"),
    "no sentinel": (lambda p: _patch(p, 64, b"\x00"), "no blob begins at byte 64"),
    "another dtype": (lambda p: _patch(p, 68, b"\x01"), "blob at byte 64 holds fp16 where fp32 is declared"),
    "another size": (lambda p: _patch(p, 72, b"\x80\x00"), "has 128 bytes where 64 x fp32 need 256"),
    "unknown opset": (
        lambda p: _spec(p, lambda m: setattr(m.mlProgram.functions["main"], "opset", "CoreML99")),
        "unknown opset 'CoreML99'",
    ),
    "huge shape": (lambda p: _spec(p, lambda m: _dimension(m, 2**39)), r"'y' of type .* would take 8.0 TiB"),
    "absurd shape": (lambda p: _spec(p, lambda m: _dimension(m, 2**63)), "a dimension of 9223372036854775808"),
    "unknown operation": (
        lambda p: _spec(p, lambda m: setattr(_operation(m, "linear"), "type", "linaer")),
        r"function 'main': unknown operation 'linaer'",
    ),
    "unknown input": (
        lambda p: _spec(p, lambda m: _operation(m, "linear").inputs["q"].CopyFrom(_operation(m, "linear").inputs["x"])),
        r"operation 'linear' \('y'\) has no input 'q'",
    ),
    "missing input": (
        lambda p: _spec(p, lambda m: _operation(m, "linear").inputs.pop("weight")),
        r"operation 'linear' \('y'\) lacks its input 'weight'",
    ),
    "undefined name": (
        lambda p: _spec(p, lambda m: setattr(_operation(m, "linear").inputs["x"].arguments[0], "name", "ghost")),
        "linear 'y' reads 'ghost', which nothing before it defines",
    ),
    "defined twice": (
        lambda p: _spec(p, lambda m: setattr(_operation(m, "linear").outputs[0], "name", "x")),
        "'x' is defined twice",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_before_anything_runs(damage: str, linear: Path, tmp_path: Path) -> None:
    target = tmp_path / "damaged.mlpackage"
    shutil.copytree(linear, target)
    (tmp_path / "secret").write_bytes(b"secret")
    change, message = DAMAGE[damage]
    change(target)

    def compiled() -> Package:
        package = load(target, limits=Limits(memory=1 << 30))
        assert package.function().plan
        return package

    with pytest.raises(UserError, match=message):
        compiled()


def test_too_many_operations_or_bytes_are_refused(linear: Path) -> None:
    with pytest.raises(UserError, match="more than 1 operations"):
        read(linear, Limits(nodes=1))
    with pytest.raises(UserError, match=r"the specification has \d+ bytes, more than 10"):
        read(linear, Limits(spec_bytes=10))
