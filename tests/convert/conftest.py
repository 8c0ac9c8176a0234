"""Small random models of every family."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_models import make_toy

sys.path.append(str(Path(__file__).parents[1] / "decode"))  # the session contract lives with its owners

ToyMaker = Callable[..., Path]


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> ToyMaker:
    """Makes a toy model once per set of arguments; returns its folder."""
    made: dict[str, Path] = {}

    def make(family: str, **changes: Any) -> Path:
        key = json.dumps([family, {name: str(value) for name, value in changes.items()}], sort_keys=True)
        if key not in made:
            made[key] = make_toy(tmp_path_factory.mktemp(family), family, **changes)
        return made[key]

    return make
