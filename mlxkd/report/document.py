"""The document model: sections without any formatting of their own.

Inline text may hold `code` and **strong** words; everything else is literal, so a prompt or a
file name can never turn into markup.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mlxkd.errors import UserError
from mlxkd.files import atomic_file
from mlxkd.metric import Metric

Tone = Literal["plain", "good", "bad", "unsure", "note"]
Cell = str | int | float | bool | Metric | None
NOTHING = "–"


class Displayed:
    """Shows itself in a notebook."""

    def _repr_html_(self) -> str:
        from mlxkd.report.html import fragment

        return fragment([self])  # type: ignore[list-item]


@dataclass(frozen=True)
class Heading:
    """A heading; ``level`` 2 opens a section, 3 a part of one (the title is level 1)."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """Paragraphs separated by blank lines; a tone other than "plain" makes them stand out as a verdict or a note."""

    text: str
    tone: Tone = "plain"


@dataclass(frozen=True)
class Code:
    """Text to read or copy exactly as it is."""

    text: str


@dataclass(frozen=True)
class Table(Displayed):
    """Rows of cells under named columns; None shows as a dash, a Metric with its unit and its method.

    Where all figures were obtained in the same way, the way is said once, above the table.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"row {number} has {len(row)} cells for {len(self.columns)} columns")

    def common_method(self) -> str | None:
        """How and where every figure of the table was obtained ("measured on ..."), if that is one way for all."""
        figures = [cell for row in self.rows for cell in row if isinstance(cell, Metric) and cell.value is not None]
        ways = {f"{f.method} on {f.device}" if f.device else f.method for f in figures}
        return ways.pop() if len(ways) == 1 and len(figures) > 1 else None


@dataclass(frozen=True)
class Tiles(Displayed):
    """The few figures to see first."""

    values: Mapping[str, Cell]


@dataclass(frozen=True)
class Figure(Displayed):
    """A picture: a matplotlib figure or SVG text of our own making; ``alt`` says what it shows in words."""

    picture: Any
    alt: str
    caption: str = ""

    def svg(self) -> str:
        """The picture as SVG text whose colours follow the page (light or dark)."""
        if isinstance(self.picture, str):
            return self.picture
        from mlxkd.report.plots import to_svg

        return to_svg(self.picture)


@dataclass(frozen=True)
class Conversation(Displayed):
    """Chat messages as ``{"role", "content", "tool_calls"?, "name"?}``, shown turn by turn."""

    messages: Sequence[Mapping[str, Any]]
    caption: str = ""


Section = Heading | Text | Code | Table | Tiles | Figure | Conversation


@dataclass(frozen=True)
class Document:
    """A titled list of sections; in a notebook it displays itself.

    Args:
        details: facts about the making (versions, device, recipe) for the foot of the page.
    """

    title: str
    sections: Sequence[Section]
    subtitle: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    def html(self) -> str:
        """One HTML page without any outside resource."""
        from mlxkd.report.html import page

        return page(self)

    def markdown(self) -> str:
        """Markdown for a pull request; pictures become their description."""
        from mlxkd.report.markdown import page

        return page(self)

    def write(self, path: str | Path) -> Path:
        """Write ``.html`` or ``.md``, atomically.

        Raises:
            UserError: another suffix, or the disk refuses.
        """
        path = Path(path)
        writers = {".html": self.html, ".md": self.markdown}
        if path.suffix not in writers:
            raise UserError(
                f"a report is .html or .md, not {path.suffix!r}", where=str(path), hint="name it report.html"
            )
        with atomic_file(path) as temporary:
            temporary.write_text(writers[path.suffix](), encoding="utf-8")
        return path

    def _repr_html_(self) -> str:
        from mlxkd.report.html import fragment

        return fragment([Heading(self.title, 2), *self.sections])


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
