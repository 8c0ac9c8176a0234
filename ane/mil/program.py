"""A program as plain data: functions of blocks of nodes, constants not yet decoded."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ane.mil.blob import BlobFile
from ane.mil.types import HELD_AS, TensorType, ValueType


@dataclass(frozen=True, eq=False)
class Literal:
    """A constant, either here (``value``) or in a weight file (``blob`` and ``offset``).

    ``key`` is equal for literals with equal content at one place, so that each is decoded once.
    """

    type: ValueType
    key: Hashable
    value: Any = None
    blob: BlobFile | None = None
    offset: int = 0

    def decode(self) -> Any:
        """The content: an array in the dtype that holds it, or Python strings, lists and dictionaries."""
        if self.blob is None or not isinstance(self.type, TensorType):
            return self.value
        shape = tuple(int(d or 0) for d in self.type.shape or ())
        array = self.blob.read(self.offset, self.type.dtype, shape)
        return array.view(HELD_AS[self.type.dtype]) if self.type.dtype == "bool" else array

    @property
    def stored_bytes(self) -> int:
        """Bytes it takes in the package."""
        if self.blob is not None:
            return self.blob.record(self.offset).size
        return int(self.value.nbytes) if isinstance(self.value, np.ndarray) else 0


Binding = str | Literal


@dataclass(frozen=True)
class Node:
    """One operation as it is written down: what it is bound to, what it declares to return."""

    type: str
    name: str
    inputs: dict[str, tuple[Binding, ...]]
    outputs: tuple[tuple[str, ValueType], ...]
    blocks: tuple[Block, ...] = ()
    attributes: dict[str, Literal] = field(default_factory=dict)


@dataclass(frozen=True)
class Block:
    """Nodes in the order they run, the values they see from outside by position, and what leaves."""

    inputs: tuple[tuple[str, ValueType], ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]

    def walk(self) -> Iterator[Node]:
        """Every node, nested ones after the node that holds them."""
        for node in self.nodes:
            yield node
            for block in node.blocks:
                yield from block.walk()


@dataclass(frozen=True)
class Feature:
    """A function's input, output or state as the outside sees it.

    Args:
        kind: "array", "image", "state", "dictionary", "string", "int64" or "double".
        dtype: MIL dtype of an array; for a dictionary that of its keys.
        shape: default shape, empty when unknown.
        shapes: the enumerated shapes, when there are some.
        ranges: lower and upper bound of each dimension (upper None: open), when it is ranged.
        color: channel order of an image.
        default: value of an optional input that is left out.
    """

    name: str
    kind: str
    dtype: str = "fp32"
    shape: tuple[int, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    ranges: tuple[tuple[int, int | None], ...] = ()
    color: str | None = None
    optional: bool = False
    default: float | None = None
    description: str = ""

    def allows(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of ``shape`` may be given, by the enumerated or ranged shapes alone."""
        if self.shapes:
            return shape in self.shapes
        if self.ranges:
            return len(shape) == len(self.ranges) and all(
                low <= size and (high is None or size <= high)
                for size, (low, high) in zip(shape, self.ranges, strict=True)
            )
        return True


@dataclass(frozen=True)
class FunctionSpec:
    """One function: its program and its description."""

    name: str
    opset: str
    inputs: tuple[tuple[str, ValueType], ...]
    block: Block
    features: dict[str, Feature]
    results: dict[str, Feature]
    states: dict[str, Feature]


@dataclass(frozen=True)
class ModelSpec:
    """A whole package."""

    path: str
    version: int
    functions: dict[str, FunctionSpec]
    default: str
    metadata: dict[str, str]
    weight_files: tuple[BlobFile, ...]
