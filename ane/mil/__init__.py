"""Read a saved ML program (.mlpackage) and run it on any machine.

    >>> package = ane.mil.load("model.mlpackage")
    >>> outputs = package.function("main").predict({"x": x})

Names are loaded on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ane.mil.limits import Limits
    from ane.mil.package import Function, Package, State, load

_HOMES = {"load": "package", "Package": "package", "Function": "package", "State": "package", "Limits": "limits"}
__all__ = ["Function", "Limits", "Package", "State", "load"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
