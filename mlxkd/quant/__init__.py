"""Quantisation-aware training on the grids that ship, and packing without requantising."""

from mlxkd.quant.grids import FLOAT, Codes, Constexpr, Grid, grid, names
from mlxkd.quant.modules import fake_weight
from mlxkd.quant.pack import Packed, changed_codes, clone, load_student, pack, save_student
from mlxkd.quant.plan import activate, attach, attached, detach, plan_for, quantisable, refresh_ranges

__all__ = [
    "FLOAT",
    "Codes",
    "Constexpr",
    "Grid",
    "Packed",
    "activate",
    "attach",
    "attached",
    "changed_codes",
    "clone",
    "detach",
    "fake_weight",
    "grid",
    "load_student",
    "names",
    "pack",
    "plan_for",
    "quantisable",
    "refresh_ranges",
    "save_student",
]
