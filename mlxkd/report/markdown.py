"""Markdown for pull requests and terminals."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from mlxkd.metric import Metric
from mlxkd.report.document import (
    Cell,
    Code,
    Conversation,
    Document,
    Figure,
    Heading,
    Section,
    Table,
    Text,
    Tiles,
    show_value,
)

MARKS = {"plain": "", "good": "✅ ", "bad": "❌ ", "unsure": "❔ ", "note": "ℹ️ "}


def page(document: Document) -> str:
    """The document as Markdown."""
    blocks = [f"# {document.title}"]
    if document.subtitle:
        blocks.append(document.subtitle)
    blocks += [_block(section) for section in document.sections]
    if document.details:
        rows = [(key, _detail(value)) for key, value in document.details.items()]
        blocks.append(_table(Table(("detail", "value"), rows)))
    return "\n\n".join(blocks) + "\n"


def _cell(cell: Cell, tagged: bool = True) -> str:
    text = show_value(cell)
    if tagged and isinstance(cell, Metric) and cell.value is not None:
        text += f" ({cell.method})"
    return text.replace("|", "\\|").replace("\n", " ")


def _detail(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _table(table: Table) -> str:
    head = "| " + " | ".join(table.columns) + " |"
    rule = "|" + " --- |" * len(table.columns)
    way = table.common_method()
    rows = ["| " + " | ".join(_cell(cell, way is None) for cell in row) + " |" for row in table.rows]
    words = " ".join(filter(None, [table.caption, f"All figures {way}." if way else ""]))
    caption = [f"*{words}*", ""] if words else []
    return "\n".join([*caption, head, rule, *rows])


def fence(text: str) -> str:
    """``text`` between fences that are longer than any run of backticks in it."""
    marks = "```"
    while marks in text:
        marks += "`"
    return f"{marks}\n{text}\n{marks}"


def _text(section: Text) -> str:
    if section.tone == "plain":
        return section.text
    lines = (MARKS[section.tone] + section.text).splitlines()
    return "\n".join(f"> {line}".rstrip() for line in lines)


def _conversation(section: Conversation) -> str:
    turns = []
    for message in section.messages:
        body = str(message.get("content") or "")
        for call in message.get("tool_calls") or ():
            body = f"{body}\n{json.dumps(call.get('function', call), ensure_ascii=False)}".strip()
        turns.append(f"**{message.get('role', '?')}**\n\n{fence(body)}")
    return "\n\n".join([*([f"*{section.caption}*"] if section.caption else []), *turns])


def _block(section: Section) -> str:
    return _WRITERS[type(section)](section)


_WRITERS: dict[type, Callable[[Any], str]] = {
    Heading: lambda s: f"{'#' * s.level} {s.text}",
    Text: _text,
    Code: lambda s: fence(s.text),
    Table: _table,
    Tiles: lambda s: "\n".join(f"- **{name}**: {_cell(cell)}" for name, cell in s.values.items()),
    Figure: lambda s: f"*Figure: {s.caption or s.alt}*" + (f" ({s.alt})" if s.caption else ""),
    Conversation: _conversation,
}
