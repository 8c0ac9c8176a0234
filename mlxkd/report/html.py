"""HTML: one page, no outside resource, light and dark by the reader's own setting."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Sequence
from importlib import resources
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
    show_quantity,
    show_value,
)

TONE_WORDS = {"good": "Pass", "bad": "Problem", "unsure": "Cannot tell", "note": "Note"}


def page(document: Document) -> str:
    """The whole document as one HTML page."""
    subtitle = f'<p class="subtitle">{_inline(document.subtitle)}</p>' if document.subtitle else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{html.escape(document.title)}</title>\n<style>\n{_style()}</style>\n</head>\n"
        f'<body class="report">\n<main>\n<header><h1>{html.escape(document.title)}</h1>{subtitle}</header>\n'
        f"{_contents(document.sections)}{_body(document.sections)}{_details(document)}</main>\n</body>\n</html>\n"
    )


def fragment(sections: Sequence[Section]) -> str:
    """Sections for a notebook cell: the same look, inside a box of its own."""
    return f'<style>\n{_style()}</style>\n<div class="report">{_body(sections)}</div>'


def _style() -> str:
    return resources.files("mlxkd.report").joinpath("style.css").read_text(encoding="utf-8")


def _body(sections: Sequence[Section]) -> str:
    return "".join(_WRITERS[type(section)](section) + "\n" for section in sections)


def _inline(text: str) -> str:
    text = html.escape(text)
    text = re.sub(r"`([^`\n]+)`", r"<code>\1</code>", text)
    return re.sub(r"\*\*([^*\n]+)\*\*", r"<strong>\1</strong>", text)


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "section"


def _contents(sections: Sequence[Section]) -> str:
    heads = [s for s in sections if isinstance(s, Heading) and s.level == 2]
    if len(heads) < 4:
        return ""
    links = "".join(f'<li><a href="#{_anchor(h.text)}">{html.escape(h.text)}</a></li>' for h in heads)
    return f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n'


def _heading(section: Heading) -> str:
    level = min(max(section.level, 2), 6)
    return f'<h{level} id="{_anchor(section.text)}">{_inline(section.text)}</h{level}>'


def _text(section: Text) -> str:
    paragraphs = [p.strip().replace("\n", " ") for p in re.split(r"\n\s*\n", section.text.strip())]
    body = "".join(f"<p>{_inline(p)}</p>" for p in paragraphs)
    if section.tone == "plain":
        return body
    word = f'<span class="word">{TONE_WORDS[section.tone]}</span>'
    return f'<div class="callout {section.tone}" role="note">{word}<div>{body}</div></div>'


def _about(metric: Metric) -> str:
    about = [metric.method, *([f"on {metric.device}"] if metric.device else [])]
    if metric.n is not None:
        about.append(f"n = {metric.n}")
    if metric.p95 is not None:
        about.append(f"p95 {show_quantity(metric.p95, metric.unit)}")
    if metric.censored:
        about.append(f"{metric.censored} never happened")
    if metric.note:
        about.append(metric.note)
    return html.escape("; ".join(about))


def _cell(cell: Cell, tagged: bool = True) -> str:
    shown = _inline(show_value(cell))
    if not isinstance(cell, Metric):
        return shown
    if cell.value is None:
        return f'<span class="missing">{shown}</span>'
    if not tagged:
        return f'<span title="{_about(cell)}">{shown}</span>'
    return f'{shown} <span class="method {cell.method}" title="{_about(cell)}">{cell.method}</span>'


def _is_number(cell: Cell) -> bool:
    return isinstance(cell, int | float | Metric) and not isinstance(cell, bool)


def _table(section: Table) -> str:
    cells = [[row[i] for row in section.rows] for i in range(len(section.columns))]
    numeric = [bool(column) and all(c is None or _is_number(c) for c in column) for column in cells]
    kinds = [' class="number"' if n else "" for n in numeric]
    head = "".join(f'<th scope="col"{k}>{_inline(c)}</th>' for c, k in zip(section.columns, kinds, strict=True))
    way = section.common_method()
    rows = "".join(
        "<tr>" + "".join(f"<td{k}>{_cell(c, way is None)}</td>" for c, k in zip(row, kinds, strict=True)) + "</tr>"
        for row in section.rows
    )
    words = " ".join(filter(None, [section.caption, f"All figures {way}." if way else ""]))
    caption = f"<caption>{_inline(words)}</caption>" if words else ""
    table = f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="wide" tabindex="0">{table}</div>'


def _tiles(section: Tiles) -> str:
    tiles = "".join(f"<div><dt>{_inline(k)}</dt><dd>{_cell(v)}</dd></div>" for k, v in section.values.items())
    return f'<dl class="tiles">{tiles}</dl>'


def _figure(section: Figure) -> str:
    svg = re.sub(r"<svg\b", f'<svg role="img" aria-label="{html.escape(section.alt)}"', section.svg(), count=1)
    caption = f"<figcaption>{_inline(section.caption)}</figcaption>" if section.caption else ""
    return f'<figure><div class="wide" tabindex="0">{svg}</div>{caption}</figure>'


def _conversation(section: Conversation) -> str:
    turns = []
    for message in section.messages:
        role = str(message.get("role", "?"))
        name = f" · {message['name']}" if message.get("name") else ""
        body = f"<p>{html.escape(str(message['content']))}</p>" if message.get("content") else ""
        for call in message.get("tool_calls") or ():
            body += f"<pre>{html.escape(json.dumps(call.get('function', call), ensure_ascii=False))}</pre>"
        turns.append(
            f'<li class="{_anchor(role)}"><span class="role">{html.escape(role + name)}</span><div>{body}</div></li>'
        )
    caption = f'<p class="caption">{_inline(section.caption)}</p>' if section.caption else ""
    return f'{caption}<ol class="conversation">{"".join(turns)}</ol>'


def _details(document: Document) -> str:
    if not document.details:
        return ""
    rows = "".join(
        f"<dt>{html.escape(str(key))}</dt><dd>{html.escape(_plain(value))}</dd>"
        for key, value in document.details.items()
    )
    return f'<details><summary>How this was made</summary><dl class="made">{rows}</dl></details>\n'


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items() if v is not None)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


_WRITERS: dict[type, Callable[[Any], str]] = {
    Heading: _heading,
    Text: _text,
    Code: lambda s: f'<pre tabindex="0"><code>{html.escape(s.text)}</code></pre>',
    Table: _table,
    Tiles: _tiles,
    Figure: _figure,
    Conversation: _conversation,
}
