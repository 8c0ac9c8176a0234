"""Core ML itself as the engine of a session (macOS): compiled models, states, and buffers that are reused."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np

from ane.runtime.coreml_cache import CompiledModels
from mlxkd.errors import UserError, unknown
from mlxkd.runtime import import_coremltools

Units = Literal["all", "cpu_only", "cpu_and_gpu", "cpu_and_ne"]


class CompiledFunction(Protocol):
    """The lowest boundary: what ``coremltools.models.CompiledMLModel`` offers."""

    def predict(self, data: dict[str, np.ndarray], state: Any | None = None) -> Mapping[str, np.ndarray]:
        """Outputs by name; the state is updated in place."""
        ...

    def make_state(self) -> Any:
        """Fresh states with ``read_state(name)`` and ``write_state(name, value)``."""
        ...


Loader = Callable[[Path, str, Units], CompiledFunction]
"""Loads one function of a compiled model."""


def load_function(compiled: Path, function: str, units: Units) -> CompiledFunction:
    """One function through coremltools; on the Neural Engine the first load of a model takes a while.

    Raises:
        UserError: Core ML cannot load it.
    """
    tools = import_coremltools()
    try:
        return tools.models.CompiledMLModel(
            str(compiled), compute_units=tools.ComputeUnit[units.upper()], function_name=function
        )
    except RuntimeError as error:
        raise UserError(
            f"Core ML cannot load function {function!r}: {error}", where=str(compiled), hint="try --units cpu_only"
        ) from error


class CoreMLPackage:
    """One package on Core ML (see ``ane.runtime.bundle_session.Runner``).

    Functions load on first use and share the states of their batch size. coremltools turns float16 inputs
    into float32 by allocating a copy at each call; here every input has one float32 buffer that is refilled.

    Args:
        path: the .mlpackage.
        units: which processors Core ML may use.
        models: the cache of compiled models.
        load: loads a function of a compiled model.
    """

    def __init__(self, path: Path, units: Units, models: CompiledModels, load: Loader = load_function):
        if units not in get_args(Units):
            raise unknown("compute units", units, get_args(Units))
        self.path, self.units = path, units
        self._compiled = models.open(path)
        self._load = load
        self._functions: dict[str, CompiledFunction] = {}
        self._buffers: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}

    def make_state(self, function: str) -> Any:
        """See ``Runner.make_state``."""
        return self._function(function).make_state()

    def predict(self, function: str, inputs: Mapping[str, np.ndarray], state: Any | None) -> dict[str, np.ndarray]:
        """See ``Runner.predict``."""
        data = {name: self._filled(name, value) for name, value in inputs.items()}
        return dict(self._function(function).predict(data, state))

    def read_state(self, state: Any, name: str) -> np.ndarray:
        """See ``Runner.read_state``."""
        return np.asarray(state.read_state(name), dtype=np.float16)

    def write_state(self, state: Any, name: str, value: np.ndarray) -> None:
        """See ``Runner.write_state``."""
        state.write_state(name, np.ascontiguousarray(value, dtype=np.float16))

    def _function(self, name: str) -> CompiledFunction:
        if name not in self._functions:
            self._functions[name] = self._load(self._compiled, name, self.units)
        return self._functions[name]

    def _filled(self, name: str, value: np.ndarray) -> np.ndarray:
        if value.dtype != np.float16:
            return np.ascontiguousarray(value)
        key = (name, value.shape)
        if key not in self._buffers:
            self._buffers[key] = np.empty(value.shape, np.float32)
        np.copyto(self._buffers[key], value)
        return self._buffers[key]


def open_package(path: Path, units: Units = "cpu_and_ne", root: Path | None = None) -> CoreMLPackage:
    """Open one package of a bundle on Core ML.

    Args:
        path: the .mlpackage.
        units: which processors Core ML may use.
        root: folder of compiled models; default ``coreml_cache.default_root()``.

    Raises:
        UserError: this is not macOS, or Core ML refuses the package.
    """
    if sys.platform != "darwin":
        raise UserError("Core ML runs on macOS only", where=str(path), hint="use the backend mil here")
    return CoreMLPackage(path, units, CompiledModels(root))
