"""A weight of the source as MIL constants: float16, or codes under a ``constexpr`` op, whole or by rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from ane.convert.constants import Constants, builder, mil_types
from mlxkd.errors import UserError
from mlxkd.quant.grids import Codes, Constexpr, Grid

Rows = tuple[int, int]


class Weight(Protocol):
    """A matrix [out, in]."""

    @property
    def path(self) -> str:
        """Its mlx-lm path."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the package."""

    def release(self) -> None:
        """Let go of what was kept between reads."""

    def var(self, constants: Constants, *, rank: int, rows: Rows | None = None) -> Any:
        """The matrix as a MIL value [out, in], or [out, in, 1, 1] for rank 4; ``rows`` cuts the first axis."""

    def dense(self, rows: Rows | None = None) -> np.ndarray:
        """float16 [out, in], decoded."""


@dataclass(frozen=True)
class Dense:
    """A float weight; ``fetch`` reads it, or some of its rows."""

    path: str
    shape: tuple[int, int]
    fetch: Callable[[Rows | None], mx.array]

    @property
    def nbytes(self) -> int:
        return 2 * self.shape[0] * self.shape[1]

    def dense(self, rows: Rows | None = None) -> np.ndarray:
        return np.array(self.fetch(rows).astype(mx.float16))

    def release(self) -> None:
        """Nothing is kept."""

    def var(self, constants: Constants, *, rank: int, rows: Rows | None = None) -> Any:
        start, stop = rows or (0, self.shape[0])
        shape = (stop - start, self.shape[1], *([1] * (rank - 2)))
        return constants.var(
            _key(self.path, "weight", rank, rows),
            shape,
            np.dtype(np.float16),
            lambda: self.dense(rows).reshape(shape),
        )


class Coded:
    """A weight on a grid; ``fetch`` loads or makes its codes, ``release`` drops what it keeps of them."""

    def __init__(
        self,
        path: str,
        shape: tuple[int, int],
        grid: Grid,
        fetch: Callable[[], Codes],
        release: Callable[[], None] = lambda: None,
    ):
        self.path = path
        self.shape = shape
        self.grid, self._fetch, self.release = grid, fetch, release
        self._layout: tuple[str, int, dict[str, tuple[tuple[int, ...], np.dtype]]] | None = None

    @property
    def nbytes(self) -> int:
        return int(self.shape[0] * self.shape[1] * self.grid.bits_per_weight(self.shape) / 8)

    def dense(self, rows: Rows | None = None) -> np.ndarray:
        return np.array(self._decoded(rows))

    def _decoded(self, rows: Rows | None) -> mx.array:
        array = self.grid.decode(self._fetch(), mx.float16)
        return array if rows is None else array[rows[0] : rows[1]]

    def constexpr(self) -> Constexpr:
        """What the grid says Core ML holds."""
        return self.grid.constexpr(self._fetch())

    def var(self, constants: Constants, *, rank: int, rows: Rows | None = None) -> Any:
        if self._layout is None:
            made = self.constexpr()
            self._layout = made.op, made.bits, {n: (a.shape, a.dtype) for n, a in made.arrays.items()}
        op, bits, arrays = self._layout
        if op == "const":
            return Dense(self.path, self.shape, self._decoded).var(constants, rank=rank, rows=rows)
        inputs = {name: self._input(constants, op, name, bits, arrays[name], rank, rows) for name in arrays}
        return getattr(builder(), op)(**inputs, name=_key(self.path, "decoded", rank, rows).replace(".", "_"))

    def _input(
        self,
        constants: Constants,
        op: str,
        name: str,
        bits: int,
        layout: tuple[tuple[int, ...], np.dtype],
        rank: int,
        rows: Rows | None,
    ) -> Any:
        shape, dtype = layout
        cut = self._cut(shape, rows)
        at = len(shape) - 2 if name == "lut" else len(shape)
        full = (cut.stop - cut.start, *shape[1:at], *([1] * (rank - 2)), *shape[at:])

        def load() -> np.ndarray:
            made: Constexpr = constants.recent(self, self.constexpr)
            return made.arrays[name][cut].reshape(full)

        stored = code_dtype(op, name, bits, dtype)
        return constants.var(_key(self.path, name, rank, rows), full, stored, load)

    def _cut(self, shape: tuple[int, ...], rows: Rows | None) -> slice:
        """The part of an array's first axis that belongs to rows of the weight."""
        if rows is None or shape[0] == 1:
            return slice(0, shape[0])
        group = self.shape[0] // shape[0]
        if any(r % group for r in rows if r != self.shape[0]):
            raise UserError(
                f"a head split at row {rows[1]} cuts a palette shared by {group} rows",
                where=self.path,
                hint=f"choose a --head-width that is a multiple of {group}",
            )
        return slice(rows[0] // group, -(-rows[1] // group))


def _key(path: str, name: str, rank: int, rows: Rows | None) -> str:
    part = f".{rows[0]}" if rows else ""
    return f"{path}.{name}{'' if rank == 4 else f'.rank{rank}'}{part}"


def code_dtype(op: str, name: str, bits: int, dtype: np.dtype) -> np.dtype:
    """The NumPy dtype, with coremltools' sub-byte marks, in which an array of a constexpr op is stored."""
    types = mil_types()
    if name == "indices":
        narrow = {b: getattr(types, f"np_uint{b}_dtype") for b in (1, 2, 3, 4, 6)}
        return np.dtype(narrow.get(bits, np.uint8))
    if name in ("data", "offset") and np.issubdtype(dtype, np.integer) and bits <= 4:
        # The op knows 4 and 8 bits only: narrower codes travel in the next wider type, value for value.
        return np.dtype(types.np_int4_dtype if np.issubdtype(dtype, np.signedinteger) else types.np_uint4_dtype)
    return np.dtype(dtype)
