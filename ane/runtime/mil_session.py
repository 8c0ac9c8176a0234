"""The MIL reference runtime as the engine of a session: runs what was written to disk, on any machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ane.mil.ops.registry import Mode
from ane.mil.package import load


class MilPackage:
    """One package on the reference runtime (see `ane.runtime.bundle_session.Runner`).

    Args:
        path: the .mlpackage.
        mode: "exact" carries float32 between operations, "fp16" rounds after each as a device does.
    """

    def __init__(self, path: Path, mode: Mode = "exact"):
        self.package, self.mode = load(path), mode

    def make_state(self, function: str) -> Any:
        return self.package.function(function).make_state()

    def predict(self, function: str, inputs: Mapping[str, np.ndarray], state: Any | None) -> dict[str, np.ndarray]:
        outputs: dict[str, np.ndarray] = self.package.function(function).predict(inputs, state, mode=self.mode)
        return outputs

    def read_state(self, state: Any, name: str) -> np.ndarray:
        array: np.ndarray = state.read_state(name)
        return array

    def write_state(self, state: Any, name: str, value: np.ndarray) -> None:
        state.write_state(name, value)


def open_package(path: Path, mode: Mode = "exact") -> MilPackage:
    """Open one package of a bundle."""
    return MilPackage(path, mode)
