"""The value types of an ML program and how each is held in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# MIL name -> dtype of the array that holds it. Sub-byte integers are held one per byte.
HELD_AS: dict[str, type[np.generic]] = {
    "bool": np.bool_,
    "fp16": np.float16,
    "fp32": np.float32,
    "fp64": np.float64,
    "int8": np.int8,
    "int16": np.int16,
    "int32": np.int32,
    "int64": np.int64,
    "int4": np.int8,
    "uint8": np.uint8,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "uint6": np.uint8,
    "uint4": np.uint8,
    "uint3": np.uint8,
    "uint2": np.uint8,
    "uint1": np.uint8,
    "string": np.str_,
}
BITS: dict[str, int] = {
    "bool": 8,
    **{name: int("".join(c for c in name if c.isdigit())) for name in HELD_AS if name not in ("bool", "string")},
}
FLOATS = ("fp16", "fp32", "fp64")


@dataclass(frozen=True)
class TensorType:
    """A tensor or scalar (shape ``()``); ``None`` in a shape is a dimension known only at run time.

    ``shape`` itself is None where even the rank is unknown.
    """

    dtype: str
    shape: tuple[int | None, ...] | None = ()

    @property
    def size(self) -> int | None:
        """Number of elements, or None where a dimension is unknown."""
        if self.shape is None or None in self.shape:
            return None
        return math.prod(d for d in self.shape if d is not None)

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of ``shape`` can be a value of this type."""
        if self.shape is None:
            return True
        if len(self.shape) != len(shape):
            return False
        return all(want is None or want == have for want, have in zip(self.shape, shape, strict=True))

    def __str__(self) -> str:
        if self.shape is None:
            return f"{self.dtype}[...]"
        return f"{self.dtype}[{', '.join('?' if d is None else str(d) for d in self.shape)}]"


@dataclass(frozen=True)
class ListType:
    """A list of tensors (tensor array); ``length`` is None for a growing one."""

    element: TensorType
    length: int | None = None

    def __str__(self) -> str:
        return f"list<{self.element}, {'?' if self.length is None else self.length}>"


@dataclass(frozen=True)
class StateType:
    """A tensor that survives between predictions and is written in place."""

    wrapped: TensorType

    def __str__(self) -> str:
        return f"state<{self.wrapped}>"


@dataclass(frozen=True)
class DictType:
    """A dictionary (the class probabilities of a classifier)."""

    key: str
    value: str

    def __str__(self) -> str:
        return f"dict<{self.key}, {self.value}>"


@dataclass(frozen=True)
class TupleType:
    """Several values in one."""

    items: tuple[ValueType, ...]

    def __str__(self) -> str:
        return f"({', '.join(map(str, self.items))})"


ValueType = TensorType | ListType | StateType | DictType | TupleType
