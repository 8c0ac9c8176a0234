"""The real model."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn
import pytest

from mlxkd import compat


@pytest.fixture(scope="session")
def stories(request: pytest.FixtureRequest) -> tuple[nn.Module, Any, dict[str, Any]]:
    """The real model: (model, tokenizer, config)."""
    return compat.load(request.getfixturevalue("stories_model"))
