"""Grids: the one definition of how a weight is stored.

Every module of this folder is one family and says which grid names it makes; `names()` is the only
listing, and recipes, commands, tests and documentation derive from it.
"""

from __future__ import annotations

import sys

from mlxkd import registry
from mlxkd.errors import unknown
from mlxkd.quant.grids._base import Codes, Constexpr, Grid, Ranges

FLOAT = "float"  # the plan entry of a layer that is left alone

__all__ = ["FLOAT", "Codes", "Constexpr", "Grid", "Ranges", "families", "grid", "names"]


def families() -> tuple[str, ...]:
    """Names of the grid families, one module each."""
    return registry.listing(sys.modules[__name__])


def names() -> tuple[str, ...]:
    """Every grid name, "float" first."""
    listed = (registry.member(sys.modules[__name__], family).GRIDS for family in families())
    return (FLOAT, *(name for grids in listed for name in grids))


def grid(name: str) -> Grid:
    """The grid called ``name``, e.g. "mlx-affine4-g64", "mlx-nvfp4", "ane-int8", "ane-lut4-gc8".

    Raises:
        UserError: no such grid, with the nearest known name ("float" is a plan entry, not a grid).
    """
    for family in families():
        grids: dict[str, Grid] = registry.member(sys.modules[__name__], family).GRIDS
        if name in grids:
            return grids[name]
    raise unknown("grid", name, names())
