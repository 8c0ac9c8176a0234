"""Typed access to parameter trees."""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten


def leaves(tree: Any) -> list[tuple[str, mx.array]]:
    """(path, array) of every leaf."""
    return cast(list[tuple[str, mx.array]], tree_flatten(tree))
