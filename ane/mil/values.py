"""Types and constants from their protobuf messages (mlmodel/format/MIL.proto)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ane.mil.blob import BlobFile, unpack
from ane.mil.program import Literal
from ane.mil.types import BITS, HELD_AS, DictType, ListType, StateType, TensorType, TupleType, ValueType
from mlxkd.errors import UserError

# DataType of MIL.proto.
DTYPES = {
    1: "bool",
    2: "string",
    10: "fp16",
    11: "fp32",
    12: "fp64",
    21: "int8",
    22: "int16",
    23: "int32",
    24: "int64",
    25: "int4",
    31: "uint8",
    32: "uint16",
    33: "uint32",
    34: "uint64",
    35: "uint4",
    36: "uint2",
    37: "uint1",
    38: "uint6",
    39: "uint3",
}
NAMED_ONLY = {13: "bf16", 40: "fp8_e4m3fn", 41: "fp8_e5m2"}
MAX_RANK = 32
MAX_DIMENSION = 1 << 40
# A value nests only through lists, tuples and dictionaries; deeper than this is no program.
MAX_DEPTH = 16

BlobLookup = Callable[[str], BlobFile]


def value_type(message: Any, depth: int = 0) -> ValueType:
    """The type a ValueType message declares; raises UserError for one that makes no sense."""
    kind = message.WhichOneof("type")
    if depth > MAX_DEPTH:
        raise UserError("a type is nested too deeply")
    if kind == "tensorType":
        return _tensor_type(message.tensorType)
    if kind == "listType":
        element = value_type(message.listType.type, depth + 1)
        if isinstance(element, TensorType):
            return ListType(element, _dimension(message.listType.length))
    if kind == "stateType":
        wrapped = value_type(message.stateType.wrappedType, depth + 1)
        if isinstance(wrapped, TensorType) and wrapped.size is not None:
            return StateType(wrapped)
        raise UserError(f"a state must be a tensor of known shape, not {wrapped}")
    if kind == "dictionaryType":
        key, value = (
            value_type(m, depth + 1) for m in (message.dictionaryType.keyType, message.dictionaryType.valueType)
        )
        if isinstance(key, TensorType) and isinstance(value, TensorType):
            return DictType(key.dtype, value.dtype)
    if kind == "tupleType":
        return TupleType(tuple(value_type(t, depth + 1) for t in message.tupleType.types))
    raise UserError(f"a type of kind {kind!r} is malformed")


def _tensor_type(message: Any) -> TensorType:
    if message.dataType not in DTYPES:
        raise UserError(f"tensor type {NAMED_ONLY.get(message.dataType, message.dataType)!r} is not supported")
    dims = message.dimensions
    if message.rank < 0 or any(d.unknown.variadic for d in dims):
        return TensorType(DTYPES[message.dataType], None)
    if message.rank != len(dims) or len(dims) > MAX_RANK:
        raise UserError(f"a tensor type of rank {message.rank} lists {len(dims)} dimensions")
    return TensorType(DTYPES[message.dataType], tuple(_dimension(d) for d in dims))


def _dimension(message: Any) -> int | None:
    if message.WhichOneof("dimension") != "constant":
        return None
    if message.constant.size > MAX_DIMENSION:
        raise UserError(f"a dimension of {message.constant.size} is no tensor's")
    return int(message.constant.size)


def literal(message: Any, blob: BlobLookup, depth: int = 0) -> Literal:
    """The constant a Value message holds or refers to, its extent checked; raises UserError."""
    if depth > MAX_DEPTH:
        raise UserError("a constant is nested too deeply")
    declared = value_type(message.type)
    where = message.WhichOneof("value")
    if where == "blobFileValue":
        return _blob_literal(declared, message.blobFileValue, blob)
    if where != "immediateValue":
        raise UserError("a constant has no value")
    kind = message.immediateValue.WhichOneof("value")
    body: Any = getattr(message.immediateValue, kind) if kind else None
    if kind == "tensor" and isinstance(declared, TensorType):
        value: Any = _tensor(body, declared)
    elif kind in ("list", "tuple"):
        value = tuple(literal(v, blob, depth + 1).decode() for v in body.values)
    elif kind == "dictionary":
        pairs = ((literal(p.key, blob, depth + 1), literal(p.value, blob, depth + 1)) for p in body.values)
        value = {_plain(k.decode()): _plain(v.decode()) for k, v in pairs}
    else:
        raise UserError(f"a constant of type {declared} holds a {kind}")
    return Literal(declared, message.SerializeToString(deterministic=True), value)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value


def _blob_literal(declared: ValueType, message: Any, blob: BlobLookup) -> Literal:
    if not isinstance(declared, TensorType) or declared.size is None or declared.dtype not in BITS:
        raise UserError(f"a constant of type {declared} cannot lie in a weight file")
    source = blob(message.fileName)
    source.check(message.offset, declared.dtype, declared.size)
    key = (source.path, message.offset, declared)
    return Literal(declared, key, blob=source, offset=int(message.offset))


def _tensor(message: Any, declared: TensorType) -> Any:
    """An immediate tensor as an array; a string scalar as ``str`` and a string tensor as a tuple."""
    field = message.WhichOneof("value")
    values: Any = getattr(message, field).values if field else ()
    if declared.size is None:
        raise UserError(f"a constant has the open type {declared}")
    shape = tuple(int(d or 0) for d in declared.shape or ())
    if declared.dtype == "string":
        if field != "strings" or len(values) != declared.size:
            raise UserError(f"a constant of type {declared} holds {len(values)} {field}")
        return values[0] if shape == () else tuple(values)
    if field == "bytes":
        if len(values) * 8 < declared.size * BITS[declared.dtype]:
            raise UserError(f"a constant of type {declared} holds {len(values)} bytes")
        return unpack(np.frombuffer(values, np.uint8), declared.dtype, declared.size).reshape(shape)
    if field == "strings" or len(values) != declared.size:
        raise UserError(f"a constant of type {declared} holds {len(values)} {field}")
    try:
        return np.array(values, dtype=HELD_AS[declared.dtype]).reshape(shape)
    except (ValueError, OverflowError) as error:
        raise UserError(f"a constant of type {declared} holds a value outside it: {error}") from error
