"""Read a saved .mlpackage: manifest, specification protobuf, and where the weights lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ane.mil import features
from ane.mil.blob import BlobFile
from ane.mil.limits import Limits
from ane.mil.program import Binding, Block, FunctionSpec, ModelSpec, Node
from ane.mil.types import StateType, TensorType, ValueType
from ane.mil.values import literal, value_type
from mlxkd.errors import UserError, unknown
from mlxkd.runtime import quiet_coremltools

OPSETS = {
    "CoreML3": "ios13",
    "CoreML4": "ios14",
    "CoreML5": "ios15",
    "CoreML6": "ios16",
    "CoreML7": "ios17",
    "CoreML8": "ios18",
    "CoreML9": "ios26",
}
MANIFEST_BYTES = 1 << 20
MODEL_ROOT = "@model_path/"


def read(path: str | Path, limits: Limits | None = None) -> ModelSpec:
    """Read the package at ``path``; constants stay in the weight file until they are decoded.

    Raises:
        UserError: not a package, not an ML program, truncated, damaged, or beyond ``limits``; says what and where.
    """
    limits = limits or Limits()
    root = Path(path)
    spec_file = _root_model(root)
    model = _parse(spec_file, limits)
    if model.WhichOneof("Type") != "mlProgram":
        kind = model.WhichOneof("Type") or "nothing"
        raise UserError(f"the model is a {kind}, not an ML program", where=str(spec_file))
    try:
        return _Reader(root, spec_file, limits).model(model)
    except UserError as error:
        raise UserError(error.what, where=error.where or str(spec_file), hint=error.hint) from error


def _root_model(root: Path) -> Path:
    """Path of the model file that the manifest names."""
    manifest = root / "Manifest.json"
    if not root.is_dir() or not manifest.is_file():
        raise UserError("not an .mlpackage folder (no Manifest.json)", where=str(root))
    if manifest.stat().st_size > MANIFEST_BYTES:
        raise UserError(f"the manifest has {manifest.stat().st_size} bytes", where=str(manifest))
    try:
        content = json.loads(manifest.read_bytes())
        item = content["itemInfoEntries"][content["rootModelIdentifier"]]["path"]
        return inside(root / "Data", str(item))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"the manifest names no root model: {error!r}", where=str(manifest)) from error


def inside(folder: Path, relative: str) -> Path:
    """``folder / relative``, an existing file that lies in ``folder`` even through links; raises UserError."""
    try:
        target = (folder / relative).resolve()
        safe = target.is_relative_to(folder.resolve()) and target.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"no usable path: {error}", where=str(folder)) from error
    if not safe:
        raise UserError(f"{relative!r} is no file inside the package", where=str(folder))
    return target


def _parse(path: Path, limits: Limits) -> Any:
    size = path.stat().st_size
    if size > limits.spec_bytes:
        raise UserError(f"the specification has {size} bytes, more than {limits.spec_bytes}", where=str(path))
    with quiet_coremltools():
        from coremltools.proto import Model_pb2
    from google.protobuf.message import DecodeError

    model = Model_pb2.Model()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise UserError(f"the specification is truncated or damaged: {error}", where=str(path)) from error
    return model


class _Reader:
    """Carries what every level of the program needs: the folder, opened weight files, the node count."""

    def __init__(self, root: Path, spec_file: Path, limits: Limits):
        self.root, self.folder, self.limits = root, spec_file.parent, limits
        self.files: dict[Path, BlobFile] = {}
        self.nodes = 0

    def blob(self, name: str) -> BlobFile:
        if not name.startswith(MODEL_ROOT):
            raise UserError(f"weight file {name!r} does not begin with {MODEL_ROOT}")
        path = inside(self.folder, name.removeprefix(MODEL_ROOT))
        if path not in self.files:
            self.files[path] = BlobFile(path)
        return self.files[path]

    def model(self, message: Any) -> ModelSpec:
        description = message.description
        program = message.mlProgram
        if not program.functions:
            raise UserError("the program has no functions")
        described = {f.name: f for f in description.functions} or {"main": description}
        default = description.defaultFunctionName or ("main" if "main" in program.functions else "")
        functions = {
            name: self.function(name, program.functions[name], described.get(name))
            for name in sorted(program.functions)
        }
        if default not in functions:
            default = next(iter(functions))
        return ModelSpec(
            str(self.root),
            message.specificationVersion,
            functions,
            default,
            features.metadata(description.metadata),
            tuple(self.files.values()),
        )

    def function(self, name: str, message: Any, described: Any) -> FunctionSpec:
        if message.opset not in OPSETS:
            raise unknown("opset", message.opset, OPSETS, where=f"function {name!r}")
        if message.opset not in message.block_specializations:
            raise UserError(f"no block for its own opset {message.opset}", where=f"function {name!r}")
        if described is None:
            raise UserError("the model's description does not list it", where=f"function {name!r}")
        return FunctionSpec(
            name,
            OPSETS[message.opset],
            self.declared(message.inputs),
            self.block(message.block_specializations[message.opset]),
            {f.name: features.feature(f) for f in described.input},
            {f.name: features.feature(f) for f in described.output},
            {f.name: features.feature(f) for f in described.state},
        )

    def declared(self, messages: Any) -> tuple[tuple[str, ValueType], ...]:
        """Names and types, none larger than one tensor may be."""
        found = tuple((v.name, value_type(v.type)) for v in messages)
        for name, kind in found:
            tensor = kind.wrapped if isinstance(kind, StateType) else kind
            if isinstance(tensor, TensorType) and tensor.size is not None:
                self.limits.check(tensor.size, f"{name!r} of type {kind}")
        return found

    def block(self, message: Any) -> Block:
        return Block(
            self.declared(message.inputs),
            tuple(message.outputs),
            tuple(self.node(operation) for operation in message.operations),
        )

    def node(self, message: Any) -> Node:
        self.nodes += 1
        if self.nodes > self.limits.nodes:
            raise UserError(f"more than {self.limits.nodes} operations")
        name = message.outputs[0].name if message.outputs else message.type
        try:
            outputs = self.declared(message.outputs)
            attributes = {key: literal(message.attributes[key], self.blob) for key in sorted(message.attributes)}
            inputs = {
                key: tuple(self.binding(b) for b in message.inputs[key].arguments) for key in sorted(message.inputs)
            }
        except UserError as error:
            raise UserError(error.what, where=error.where or f"operation {name!r}", hint=error.hint) from error
        label = attributes.pop("name").decode() if "name" in attributes else name
        blocks = tuple(self.block(b) for b in message.blocks)
        return Node(message.type, str(label), inputs, outputs, blocks, attributes)

    def binding(self, message: Any) -> Binding:
        if message.WhichOneof("binding") == "value":
            return literal(message.value, self.blob)
        return str(message.name)
