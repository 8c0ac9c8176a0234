"""Running one operation outside a program, as the executor would bind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ane.mil.backend import products
from ane.mil.ops import registry
from ane.mil.ops.registry import OpContext


@pytest.fixture
def call() -> Callable[..., Any]:
    """call(name, opset=..., **inputs) -> what the operation returns."""

    def run(name: str, *, opset: str = "ios18", **inputs: Any) -> Any:
        found = registry.find(name, opset)
        unknown = set(inputs) - found.inputs
        assert not unknown, f"{name} has no input {unknown}"
        bound = {k: v if isinstance(v, str | bool | tuple) or v is None else np.asarray(v) for k, v in inputs.items()}
        return found.call(OpContext(name, (), products(), opset=opset), **bound)

    return run


@pytest.fixture
def rng() -> np.random.Generator:
    """Non-trivial reproducible values."""
    return np.random.default_rng(7)
