"""Reading single tensors, or rows of them, from safetensors files without touching the rest.

Format: https://huggingface.co/docs/safetensors (8-byte header length, JSON header, raw little-endian data).
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxkd.errors import UserError

# NumPy has no bfloat16: those bytes are read as integers and viewed in MLX.
DTYPES: dict[str, tuple[type, mx.Dtype]] = {
    "F32": (np.float32, mx.float32),
    "F16": (np.float16, mx.float16),
    "BF16": (np.uint16, mx.bfloat16),
    "U8": (np.uint8, mx.uint8),
    "I8": (np.int8, mx.int8),
    "U16": (np.uint16, mx.uint16),
    "U32": (np.uint32, mx.uint32),
    "I32": (np.int32, mx.int32),
}


class TensorFile:
    """One safetensors file.

    Raises:
        UserError: the header is no safetensors header.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                header = json.loads(stream.read(min(length, path.stat().st_size)))
        except (OSError, struct.error, ValueError) as error:
            raise UserError("not a readable safetensors file", where=str(path)) from error
        header.pop("__metadata__", None)
        self._start = 8 + length
        self._entries: dict[str, dict[str, object]] = header

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: tuple(entry["shape"]) for name, entry in self._entries.items()}  # type: ignore[arg-type]

    def read(self, name: str, rows: tuple[int, int] | None = None) -> mx.array:
        """A tensor, or rows ``start`` to ``stop`` of its first axis.

        Raises:
            UserError: the file ends early, or holds a type this reader does not know.
        """
        entry = self._entries[name]
        if entry["dtype"] not in DTYPES:
            raise UserError(f"tensor {name!r} has type {entry['dtype']}", where=str(self.path))
        stored, dtype = DTYPES[str(entry["dtype"])]
        shape = self.shapes[name]
        offset, row = int(entry["data_offsets"][0]), int(np.prod(shape[1:]))  # type: ignore[index]
        first, last = rows or (0, shape[0] if shape else 1)
        offset += self._start + first * row * np.dtype(stored).itemsize
        raw: np.ndarray = np.fromfile(self.path, stored, (last - first) * row, offset=offset)
        if raw.size != (last - first) * row:
            raise UserError(f"tensor {name!r} is cut off", where=str(self.path), hint="fetch the model again")
        array = mx.array(raw.reshape(last - first, *shape[1:]) if shape else raw.reshape(()))
        return array.view(dtype) if array.dtype != dtype else array
