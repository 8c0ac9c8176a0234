"""Read weight.bin: MIL blob storage, version 2.

Layout (little-endian; MILBlob/Blob/StorageFormat.hpp of coremltools): a 64-byte header (count, version),
then for each blob a 64-byte metadata record at a multiple of 64 bytes (sentinel, dtype, bytes, offset of the
data, unused bits at its end) followed by the data, also at a multiple of 64. Sub-byte integers are packed
without gaps, least significant bits first.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ane.mil.types import BITS, HELD_AS
from mlxkd.errors import UserError

ALIGNMENT = 64
SENTINEL = 0xDEADBEEF
VERSION = 2
DTYPES = {
    1: "fp16",
    2: "fp32",
    3: "uint8",
    4: "int8",
    6: "int16",
    7: "uint16",
    8: "int4",
    9: "uint1",
    10: "uint2",
    11: "uint4",
    12: "uint3",
    13: "uint6",
    14: "int32",
    15: "uint32",
}


@dataclass(frozen=True)
class Record:
    """One blob's metadata: dtype name, data bytes, data offset, unused bits at the end."""

    dtype: str
    size: int
    offset: int
    padding_bits: int


class BlobFile:
    """A weight file, mapped into memory; nothing is read before it is asked for.

    Raises:
        UserError: missing, empty, or not blob storage version 2.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._bytes: np.ndarray = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the weights: {error}", where=str(path)) from error
        if self._bytes.size < ALIGNMENT:
            raise self._fault(f"only {self._bytes.size} bytes, shorter than its own header")
        self.count, version = struct.unpack_from("<II", self._bytes.data)
        if version != VERSION:
            raise self._fault(f"blob storage version {version}; version {VERSION} is the one known")

    def _fault(self, what: str) -> UserError:
        return UserError(what, where=str(self.path), hint="the file is truncated or damaged; export it again")

    def record(self, offset: int) -> Record:
        """The metadata at ``offset``, checked against the file; raises UserError when it does not hold."""
        if offset % ALIGNMENT or not ALIGNMENT <= offset <= self._bytes.size - ALIGNMENT:
            raise self._fault(f"no blob can begin at byte {offset} of {self._bytes.size}")
        sentinel, code, size, data, padding = struct.unpack_from("<IIQQQ", self._bytes.data, offset)
        if sentinel != SENTINEL:
            raise self._fault(f"no blob begins at byte {offset} (sentinel {sentinel:#x})")
        if code not in DTYPES:
            raise self._fault(f"blob at byte {offset} has unknown dtype code {code}")
        if data % ALIGNMENT or data < offset + ALIGNMENT or data + size > self._bytes.size:
            raise self._fault(f"blob at byte {offset} claims bytes {data} to {data + size} of {self._bytes.size}")
        if padding >= 8 and padding > size * 8:
            raise self._fault(f"blob at byte {offset} claims {padding} unused bits in {size} bytes")
        return Record(DTYPES[code], size, data, padding)

    def check(self, offset: int, dtype: str, count: int) -> None:
        """Raise UserError unless the blob at ``offset`` holds ``count`` values of ``dtype``."""
        record = self.record(offset)
        # Booleans travel as bytes; the declared type says what they mean.
        if record.dtype != dtype and not (dtype == "bool" and record.dtype in ("uint8", "int8")):
            raise self._fault(f"blob at byte {offset} holds {record.dtype} where {dtype} is declared")
        needed = -(-count * BITS[dtype] // 8)
        if needed != record.size:
            raise self._fault(f"blob at byte {offset} has {record.size} bytes where {count} x {dtype} need {needed}")

    def read(self, offset: int, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        """The blob as an array of ``shape``; a view of the file wherever bytes need no unpacking."""
        count = int(np.prod(shape, dtype=object))
        self.check(offset, dtype, count)
        record = self.record(offset)
        raw = self._bytes[record.offset : record.offset + record.size]
        return unpack(raw, dtype, count).reshape(shape)


def unpack(raw: np.ndarray, dtype: str, count: int) -> np.ndarray:
    """``count`` values of ``dtype`` from bytes uint8[n]; sub-byte integers one per byte, sign extended."""
    bits = BITS[dtype]
    if bits >= 8:
        return np.ndarray((count,), HELD_AS[dtype], raw)
    if 8 % bits:
        # 3 and 6 bits straddle bytes; 24 bits hold a whole number of both.
        codes = _unpack_straddling(raw, bits)
    else:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        codes = (raw[:, None] >> shifts) & np.uint8((1 << bits) - 1)
    values = codes.reshape(-1)[:count]
    if dtype.startswith("int"):
        sign = np.int8(1 << (bits - 1))
        values = (values.astype(np.int8) ^ sign) - sign
    return values


def _unpack_straddling(raw: np.ndarray, bits: int) -> np.ndarray:
    triples = np.zeros((-(-raw.size // 3), 3), np.uint32)
    triples.reshape(-1)[: raw.size] = raw
    words = triples[:, 0] | triples[:, 1] << 8 | triples[:, 2] << 16
    shifts = np.arange(0, 24, bits, dtype=np.uint32)
    return ((words[:, None] >> shifts) & np.uint32((1 << bits) - 1)).astype(np.uint8)
