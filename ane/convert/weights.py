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

    def var(self, constants: Constants, *, rank: int, rows: Rows | None = None) -> Any:
        start, stop = rows or (0, self.shape[0])
        shape = (stop - start, self.shape[1], *([1] * (rank - 2)))
        return constants.var(
            _key(self.path, "weight", rank, rows),
            shape,
            np.dtype(np.float16),
            lambda: self.dense(rows).reshape(shape),
        )


@dataclass(frozen=True)
class Coded:
    """A weight on a grid; ``fetch`` loads or makes its codes, or those of some rows."""

    path: str
    shape: tuple[int, int]
    grid: Grid
    fetch: Callable[[Rows | None], Codes]

    @property
    def nbytes(self) -> int:
        return int(self.shape[0] * self.shape[1] * self.grid.bits_per_weight(self.shape) / 8)

    def dense(self, rows: Rows | None = None) -> np.ndarray:
        return np.array(self._decoded(rows))

    def _decoded(self, rows: Rows | None) -> mx.array:
        return self.grid.decode(self.fetch(rows), mx.float16)

    def constexpr(self, rows: Rows | None = None) -> Constexpr:
        """What the grid says Core ML holds.

        Raises:
            UserError: blocks whose offset float16 cannot hold.
        """
        made = self.grid.constexpr(self.fetch(rows))
        lost = int(np.isinf(made.arrays["offset"]).sum()) if "offset" in made.arrays else 0
        if lost:
            raise UserError(
                f"{lost} blocks hold nearly one value each: their offset, bias / scale, is beyond float16",
                where=self.path,
                hint="write the decoded numbers with --weights float",
            )
        return made

    def var(self, constants: Constants, *, rank: int, rows: Rows | None = None) -> Any:
        form = self.grid.constexpr_form(self.shape)
        if form.op == "const":
            return Dense(self.path, self.shape, self._decoded).var(constants, rank=rank, rows=rows)
        inputs = {name: self._input(constants, form, name, rank, rows) for name in form.arrays}
        return getattr(builder(), form.op)(**inputs, name=_key(self.path, "decoded", rank, rows).replace(".", "_"))

    def _input(self, constants: Constants, form: Constexpr, name: str, rank: int, rows: Rows | None) -> Any:
        """One array of the op, of ``rows`` and with the axes that ``rank`` asks for."""
        shape = form.arrays[name].shape
        first, last = part(shape[0], self.shape[0], rows, self.path)
        at = len(shape) - 2 if name == "lut" else len(shape)
        full = (last - first, *shape[1:at], *([1] * (rank - 2)), *shape[at:])

        def load() -> np.ndarray:
            made = constants.latest.get((self.path, rows), lambda: self.constexpr(rows))
            return made.arrays[name].reshape(full)

        stored = code_dtype(form.op, name, form.bits, form.arrays[name].dtype)
        return constants.var(_key(self.path, name, rank, rows), full, stored, load)


def part(held: int, out: int, rows: Rows | None, path: str) -> Rows:
    """Which of an array's ``held`` leading entries belong to some rows of a weight of ``out`` rows.

    Codes have an entry for each row, palettes one for each group of rows or one for all.

    Raises:
        UserError: the rows begin or end within a group.
    """
    if rows is None or held == 1:
        return 0, held
    group = out // held
    if any(r % group for r in rows if r != out):
        raise UserError(
            f"a head split at row {rows[1]} cuts a palette shared by {group} rows",
            where=path,
            hint=f"choose a --head-width that is a multiple of {group}",
        )
    return rows[0] // group, -(-rows[1] // group)


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
