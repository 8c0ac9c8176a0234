"""How figures are said: numbers, shares, bytes, missing ones."""

from __future__ import annotations

import math

from mlxkd.metric import Metric

Cell = str | int | float | bool | Metric | None
NOTHING = "–"


def show_number(value: float) -> str:
    """Three or four significant digits, thousands grouped, whole numbers whole."""
    if not math.isfinite(value):
        return "∞" if value > 0 else ("−∞" if value < 0 else "not a number")
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.4g}" if abs(value) >= 100 else f"{value:.3g}"
    return text.replace("e-0", "e-").replace("e+0", "e+")


def show_quantity(value: float, unit: str) -> str:
    """A number with its unit the way people say it: bytes in KB to TB, shares in percent."""
    if unit == "share" and math.isfinite(value):
        shown = show_number(round(100 * value, 2))
        # Almost all is not all.
        return f"{min(100 * value, 99.99):.2f} %" if shown == "100" and value < 1 else f"{shown} %"
    if unit == "bytes" and math.isfinite(value):
        for name in ("B", "KB", "MB", "GB"):
            if abs(value) < 1000:
                return f"{show_number(value)} {name}"
            value /= 1000
        return f"{show_number(value)} TB"
    return f"{show_number(value)} {unit}".strip()


def show_value(cell: Cell) -> str:
    """A cell in words; a missing Metric shows its reason, never a number."""
    if cell is None:
        return NOTHING
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, Metric):
        return cell.note or NOTHING if cell.value is None else show_quantity(cell.value, cell.unit)
    if isinstance(cell, int | float):
        return show_number(float(cell))
    return str(cell)
