"""Shared fixtures: the optional real inputs, and no tests that need a Mac elsewhere."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import mlxkd  # noqa: F401  loads a fast BLAS before any test module imports mlx

SHARED = Path(os.environ.get("MLXKD_TEST_DATA", Path(__file__).parents[1] / ".." / "shared" / "data")).resolve()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if sys.platform != "darwin":
        for item in items:
            if "macos" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs macOS and Core ML's own runtime"))


def _shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"the real input {name!r} is not on this machine (set MLXKD_TEST_DATA)")
    return path


@pytest.fixture(scope="session")
def stories_model() -> Path:
    """Folder of a real pretrained 260K-parameter Llama."""
    return _shared("stories260K")


@pytest.fixture(scope="session")
def stories_text() -> Path:
    """A text file of short stories."""
    return _shared("tinystories/stories.txt")


@pytest.fixture(scope="session")
def bfcl() -> Path:
    """Folder of Berkeley Function-Calling Leaderboard cases."""
    return _shared("bfcl")
