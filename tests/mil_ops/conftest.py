"""Running one operation outside a program, as the executor would bind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ane.mil.ops import registry
from ane.mil.ops.registry import OpContext


class Products:
    """The plainest products: NumPy in float64, convolution as its definition says."""

    def matmul(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.matmul(x.astype(np.float64), y.astype(np.float64))

    def einsum(self, equation: str, *values: np.ndarray) -> np.ndarray:
        return np.einsum(equation, *values)

    def conv(self, x, weight, strides, pads, dilations, groups):
        x = np.pad(x, [(0, 0), (0, 0), *pads])
        kernel = weight.shape[2:]
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        out = [(n - r) // s + 1 for n, r, s in zip(x.shape[2:], reach, strides, strict=True)]
        y = np.zeros((x.shape[0], weight.shape[0], *out))
        per_in, per_out = x.shape[1] // groups, weight.shape[0] // groups
        for place in np.ndindex(*out):
            spans = [slice(p * s, p * s + r, d) for p, s, r, d in zip(place, strides, reach, dilations, strict=True)]
            for o in range(weight.shape[0]):
                group = o // per_out
                patch = x[(slice(None), slice(group * per_in, (group + 1) * per_in), *spans)]
                y[(slice(None), o, *place)] = (patch * weight[o]).reshape(x.shape[0], -1).sum(axis=1)
        return y


@pytest.fixture
def call() -> Callable[..., Any]:
    """call(name, opset=..., **inputs) -> what the operation returns."""

    def run(name: str, *, opset: str = "ios18", **inputs: Any) -> Any:
        found = registry.find(name, opset)
        unknown = set(inputs) - found.inputs
        assert not unknown, f"{name} has no input {unknown}"
        bound = {k: v if isinstance(v, str | bool | tuple) or v is None else np.asarray(v) for k, v in inputs.items()}
        return found.call(OpContext(name, (), Products(), opset=opset), **bound)

    return run


@pytest.fixture
def rng() -> np.random.Generator:
    """Non-trivial reproducible values."""
    return np.random.default_rng(7)
