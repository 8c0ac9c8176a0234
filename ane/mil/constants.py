"""Constants in the form operations take them, each decoded once and shared by all functions of a package."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from ane.mil.limits import Limits
from ane.mil.plan import Constant, Derived
from ane.mil.program import Literal
from ane.mil.types import FLOATS, HELD_AS, TensorType, ValueType
from mlxkd.errors import UserError

Evaluate = Callable[[Derived], tuple[Any, ...]]


class ConstantPool:
    """Decodes on first use and keeps the result while the memory bound allows; beyond it, decodes at every use."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.bytes = 0
        self._kept: dict[Hashable, Any] = {}

    def get(self, constant: Constant, evaluate: Evaluate) -> tuple[Any, bool]:
        """The value, and whether it stays (so that a caller may keep it too)."""
        if constant.key in self._kept:
            return self._kept[constant.key], True
        if isinstance(constant, Derived):
            value = present(_checked(constant, evaluate), constant.type, rounded=True)
        else:
            value = self._decode(constant)
        return value, self._keep(constant.key, value)

    def _decode(self, literal: Literal) -> Any:
        declared = literal.type
        if isinstance(declared, TensorType) and declared.size is not None:
            self.limits.check(declared.size, f"a constant of type {declared}")
        return present(literal.decode(), declared)

    def _keep(self, key: Hashable, value: Any) -> bool:
        size = value.nbytes if isinstance(value, np.ndarray) else 0
        if self.bytes + size > self.limits.bytes:
            return False
        self.bytes += size
        self._kept[key] = value
        return True


def _checked(constant: Derived, evaluate: Evaluate) -> Any:
    results = evaluate(constant)
    if len(results) <= constant.index:
        raise UserError(f"it has no output {constant.index}", where=f"operation {constant.step.name!r}")
    return results[constant.index]


def present(value: Any, declared: ValueType, *, rounded: bool = False) -> Any:
    """A decoded constant as operations expect it: floats in fp32, bool scalars as ``bool``; not to be written into.

    ``rounded`` first rounds to a declared fp16, in which the weights of a package are.
    """
    if not isinstance(declared, TensorType) or declared.dtype == "string":
        return value
    array = np.asarray(value)
    if declared.dtype == "bool" and array.ndim == 0:
        return bool(array)
    if declared.dtype in FLOATS:
        if rounded and declared.dtype == "fp16":
            with np.errstate(over="ignore"):
                array = array.astype(np.float16)
        array = array.astype(np.float32, copy=False)
    else:
        array = array.astype(HELD_AS[declared.dtype], copy=False)
    view = np.ascontiguousarray(array).view() if array.ndim else array.view()
    view.flags.writeable = False
    return view
