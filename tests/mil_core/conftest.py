"""Packages built by coremltools itself, so that the reader sees what people save."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ane.mil.package import Package, load
from mlxkd.runtime import import_coremltools

Save = Callable[..., Path]


@pytest.fixture(scope="session")
def ct() -> Any:
    return import_coremltools()


@pytest.fixture(scope="session")
def mb(ct: Any) -> Any:
    from coremltools.converters.mil import Builder

    return Builder


@pytest.fixture(scope="session")
def types(ct: Any) -> Any:
    from coremltools.converters.mil.mil import types

    return types


@pytest.fixture
def save(ct: Any, tmp_path: Path) -> Save:
    """Convert a MIL program or torch model with coremltools and save it; returns the package's path."""

    def save(source: Any, name: str = "model", **options: Any) -> Path:
        options = {
            "convert_to": "mlprogram",
            "minimum_deployment_target": ct.target.iOS18,
            "compute_precision": ct.precision.FLOAT32,
            "compute_units": ct.ComputeUnit.CPU_ONLY,
            "skip_model_load": True,
        } | options
        path = tmp_path / f"{name}.mlpackage"
        ct.convert(source, **options).save(str(path))
        return path

    return save


@pytest.fixture
def run(save: Save) -> Callable[..., Package]:
    """As ``save``, then loaded with our reader."""
    return lambda source, **options: load(save(source, **options))
