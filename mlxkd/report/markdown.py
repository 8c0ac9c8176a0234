"""Markdown for pull requests and terminals."""

from __future__ import annotations

from collections.abc import Sequence

from mlxkd.metric import Metric
from mlxkd.report.values import Cell, show_value


def cell(value: Cell, tagged: bool = True) -> str:
    """A cell's value; figures say how they were obtained if ``tagged``."""
    text = show_value(value)
    if tagged and isinstance(value, Metric) and value.value is not None:
        text += f" ({value.method})"
    return text.replace("|", "\\|").replace("\n", " ")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of finished cells."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns), *lines])


def fence(text: str) -> str:
    """``text`` between fences that are longer than any run of backticks in it."""
    marks = "```"
    while marks in text:
        marks += "`"
    return f"{marks}\n{text}\n{marks}"


def caption(text: str) -> list[str]:
    """A caption as a block of its own, or no block."""
    return [f"*{text}*"] if text else []
