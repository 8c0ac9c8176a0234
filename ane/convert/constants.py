"""Weights of a program under construction: their shapes now, their numbers when they are written.

A constant of the program holds a stand-in without memory (a broadcast zero). The exporter asks for the real
array once, writes it and lets it go, so that building takes no memory for weights and each is stored once,
however many functions use it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from mlxkd.runtime import import_coremltools

T = TypeVar("T")
Loader = Callable[[], np.ndarray]
SMALL = 4096  # elements below which a constant is simply held


def builder() -> Any:
    """coremltools' MIL builder."""
    import_coremltools()
    from coremltools.converters.mil.mil import Builder

    return Builder


def mil_types() -> Any:
    """coremltools' MIL types."""
    import_coremltools()
    from coremltools.converters.mil.mil import types

    return types


class Latest:
    """Keeps one value at a time: one weight's several arrays are asked for in a row, then never again."""

    def __init__(self) -> None:
        self._kept: tuple[object, Any] | None = None

    def get(self, owner: object, make: Callable[[], T]) -> T:
        """``make()``, kept until another owner asks; what is kept goes before the next is made."""
        if self._kept is None or self._kept[0] != owner:
            self._kept = None
            self._kept = (owner, make())
        value: T = self._kept[1]
        return value


class Constants:
    """The constants that the functions of one package share."""

    def __init__(self) -> None:
        self._loaders: dict[str, tuple[tuple[int, ...], np.dtype, Loader]] = {}
        self.latest = Latest()

    def var(self, key: str, shape: Sequence[int], dtype: np.dtype, load: Loader, *, inline: bool = False) -> Any:
        """A const of the function under construction.

        Args:
            key: the constant's identity within the package; the same key is the same bytes.
            shape, dtype: of the array that ``load`` returns.
            inline: hold the real value whatever its size.
        """
        shape = tuple(shape)
        if inline or int(np.prod(shape)) < SMALL:
            value = load().reshape(shape).astype(dtype)
        else:
            self._loaders.setdefault(key, (shape, dtype, load))
            value = np.broadcast_to(np.zeros((), dtype), shape)
        const = builder().const(val=value, name=key.replace(".", "_"))
        const.op.weight_id = key
        return const

    def load(self, key: str | None) -> np.ndarray | None:
        """The real array of a constant that is a stand-in, else None.

        Raises:
            ValueError: the loader returned another shape than it promised.
        """
        if key is None or key not in self._loaders:
            return None
        shape, dtype, load = self._loaders[key]
        value = load()
        if value.shape != shape:
            raise ValueError(f"constant {key} has shape {value.shape}, not {shape}")
        return value.astype(dtype, copy=False)
