"""A saved program as the residency rules see it: operations with resolved operands, states and cost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ane.mil.program import Binding, Block, Feature, FunctionSpec, Literal, ModelSpec, Node
from ane.mil.reader import read
from ane.mil.types import BITS, StateType, TensorType, ValueType
from mlxkd.errors import UserError

# Nominal decode bandwidth and matrix rate of a base M-series Neural Engine: anemll-bench Results.MD (60 GB/s) and
# Apple's 11 TOPS for the M1. Only the ratio matters: it weighs an operation by its slower side.
BYTES_PER_SECOND = 60e9
MACS_PER_SECOND = 5.5e12
NEVER_RUNS = ("const",)


@dataclass(frozen=True)
class Operand:
    """One argument of an operation: its type, and where it comes from."""

    name: str
    type: ValueType
    literal: Literal | None = None
    producer: Node | None = None
    outside: bool = False

    @property
    def constant(self) -> bool:
        """Known when the program is compiled: a literal, a const or a decompressed weight."""
        made = self.producer
        return self.literal is not None or (made is not None and (made.type == "const" or is_constexpr(made)))

    @property
    def tensor(self) -> TensorType | None:
        """The tensor type; the wrapped one of a state; None for anything else."""
        found = self.type.wrapped if isinstance(self.type, StateType) else self.type
        return found if isinstance(found, TensorType) else None


@dataclass(frozen=True)
class Op:
    """One operation that runs."""

    node: Node
    inputs: dict[str, tuple[Operand, ...]]
    outputs: tuple[ValueType, ...]
    readers: tuple[Node, ...]
    leaves: bool

    @property
    def type(self) -> str:
        """Name without the opset prefix: "ios18.conv" is "conv"."""
        return bare(self.node)

    @property
    def operands(self) -> tuple[Operand, ...]:
        """All arguments in the order of their parameter names."""
        return tuple(o for arguments in self.inputs.values() for o in arguments)

    @property
    def tensors(self) -> tuple[TensorType, ...]:
        """Types of the values computed with and returned; constants and parameters left out."""
        moving = [o.tensor for o in self.operands if not o.constant]
        return tuple(t for t in [*moving, *self.results] if t is not None)

    @property
    def results(self) -> tuple[TensorType, ...]:
        """Tensor types of the outputs."""
        return tuple(t for t in self.outputs if isinstance(t, TensorType))

    def operand(self, name: str) -> Operand | None:
        """The single argument called ``name``, or None."""
        found = self.inputs.get(name, ())
        return found[0] if len(found) == 1 else None

    def value(self, name: str) -> np.ndarray | None:
        """The constant numeric value of argument ``name`` when it is small and stated in place, else None."""
        operand = self.operand(name)
        literal = (operand.literal or const_literal(operand.producer)) if operand else None
        if literal is None or literal.blob is not None or literal.value is None:
            return None
        return np.asarray(literal.value)


@dataclass(frozen=True)
class Function:
    """One function: its operations in order, what goes in and out, its states and its weights in bytes."""

    name: str
    package: str
    ops: tuple[Op, ...]
    inputs: dict[str, Feature]
    results: dict[str, Feature]
    states: dict[str, Feature]
    weight_bytes: int
    functions_in_package: int = 1
    version: int = 9
    metadata: dict[str, str] = field(default_factory=dict)


def bare(node: Node) -> str:
    """Operation name without its opset prefix."""
    return node.type.rsplit(".", 1)[-1]


def is_constexpr(node: Node) -> bool:
    """Whether the operation decompresses weights at load time."""
    return bare(node).startswith("constexpr_")


def const_literal(node: Node | None) -> Literal | None:
    """The value of a ``const`` operation (it lies in the attribute "val")."""
    return node.attributes.get("val") if node is not None and node.type == "const" else None


def packages(path: str | Path) -> list[Path]:
    """The .mlpackage folders of a bundle, or the one that ``path`` is.

    Raises:
        UserError: there is none.
    """
    root = Path(path)
    if (root / "Manifest.json").is_file() and root.suffix == ".mlpackage":
        return [root]
    found = sorted(root.rglob("*.mlpackage")) if root.is_dir() else []
    if not found:
        raise UserError("no .mlpackage here", where=str(root), hint="export one: `mlxkd export RUN --to coreml`")
    return found


def functions(package: str | Path) -> list[Function]:
    """Every function of a saved package."""
    return view(read(package))


def view(model: ModelSpec) -> list[Function]:
    """Every function of a program that was read."""
    return [_function(model, spec) for spec in model.functions.values()]


def _function(model: ModelSpec, spec: FunctionSpec) -> Function:
    ops = tuple(_ops(spec.block, dict(spec.inputs)))
    return Function(
        spec.name, Path(model.path).name, ops, spec.features, spec.results, spec.states,
        _weight_bytes(spec.block), len(model.functions), model.version, model.metadata,
    )  # fmt: skip


def _weight_bytes(block: Block) -> int:
    """Bytes of the weight file this block refers to, each place once."""
    seen: dict[object, int] = {}
    for node in block.walk():
        for literal in _literals(node):
            if literal.blob is not None:
                seen[literal.key] = literal.stored_bytes
    return sum(seen.values())


def _literals(node: Node) -> Iterator[Literal]:
    yield from node.attributes.values()
    for arguments in node.inputs.values():
        yield from (a for a in arguments if isinstance(a, Literal))


def _ops(block: Block, outside: dict[str, ValueType]) -> Iterator[Op]:
    """Operations of a block, nested ones after the one that holds them."""
    types: dict[str, ValueType] = dict(outside)
    makers: dict[str, Node] = {}
    readers: dict[str, list[Node]] = {}
    for node in block.nodes:
        types |= dict(node.outputs)
        makers |= {name: node for name, _ in node.outputs}
        for name in _names(node):
            readers.setdefault(name, []).append(node)

    def operand(binding: Binding) -> Operand:
        if isinstance(binding, Literal):
            return Operand("", binding.type, literal=binding)
        known = types.get(binding, TensorType("fp16", None))
        return Operand(binding, known, producer=makers.get(binding), outside=binding in outside)

    for node in block.nodes:
        if bare(node) in NEVER_RUNS or is_constexpr(node):
            continue
        yield Op(
            node,
            {key: tuple(operand(b) for b in arguments) for key, arguments in node.inputs.items()},
            tuple(declared for _, declared in node.outputs),
            tuple(reader for name, _ in node.outputs for reader in readers.get(name, ())),
            any(name in block.outputs for name, _ in node.outputs),
        )
        for inner in node.blocks:
            yield from _ops(inner, types | dict(inner.inputs))


def _names(node: Node) -> Iterator[str]:
    for arguments in node.inputs.values():
        yield from (a for a in arguments if isinstance(a, str))
    for block in node.blocks:
        for inner in block.walk():
            yield from _names(inner)


def tensor_bytes(tensor: TensorType) -> int:
    """Bytes of a value at run time; an unknown size counts one element."""
    return math.ceil((tensor.size or 1) * BITS.get(tensor.dtype, 16) / 8)


def stored_bytes(operand: Operand) -> int:
    """Bytes of a weight as it lies in the package, through its decompression."""
    if operand.literal is not None:
        return operand.literal.stored_bytes
    made = operand.producer
    if made is None:
        return 0
    stated = const_literal(made)
    return stated.stored_bytes if stated is not None else sum(lit.stored_bytes for lit in _literals(made))


def macs(op: Op) -> int:
    """Multiply-accumulates of one run, from the types; zero for what does not multiply matrices."""
    out = (op.results[0].size or 0) if op.results else 0
    if op.type in ("conv", "linear"):
        weight = op.operand("weight")
        shape = weight.tensor.shape if weight and weight.tensor else None
        return out * math.prod(d or 1 for d in shape[1:]) if shape else 0
    if op.type == "matmul":
        x = op.operand("x")
        shape = x.tensor.shape if x and x.tensor else None
        if not shape:
            return 0
        flip = op.value("transpose_x")
        return out * (shape[-2 if flip is not None and bool(flip) and len(shape) > 1 else -1] or 1)
    if op.type == "einsum":
        first = op.inputs.get("values", ())
        inner = [o.tensor.size for o in first if o.tensor and o.tensor.size]
        # "nchw,nwhu->nchu" sums over one axis: sizes a*k, k*b and a*b give k = sqrt(ak * kb / ab).
        return round(math.sqrt(math.prod(inner) * out)) if len(inner) == 2 else 0
    return 0


IN_PLACE = ("read_state", "write_state", "coreml_update_state")
READS_A_PART = ("gather", "gather_along_axis", "gather_nd", "slice_by_index", "slice_by_size")


def moved_bytes(op: Op) -> int:
    """Bytes of one run: all that goes in and out, weights as stored; states in place, parts for what reads a part."""
    if op.type in IN_PLACE:
        return 0
    if op.type == "slice_update":
        update = op.operand("update")
        return 2 * tensor_bytes(update.tensor) if update and update.tensor else 0
    if op.type in READS_A_PART:
        return 2 * sum(tensor_bytes(t) for t in op.results)
    weights = sum(stored_bytes(o) for o in op.operands if o.constant)
    return weights + sum(tensor_bytes(t) for t in op.tensors)


def cost(op: Op) -> float:
    """Seconds a nominal Neural Engine would need: the slower of moving the bytes and doing the sums."""
    return max(moved_bytes(op) / BYTES_PER_SECOND, macs(op) / MACS_PER_SECOND)
