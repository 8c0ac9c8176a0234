"""What a document is made of; each kind of section writes itself as HTML and as Markdown.

Inline text may hold `code` and **strong** words; everything else is literal.
"""

from __future__ import annotations

import html as escaping
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from mlxkd.metric import Metric
from mlxkd.report import html, markdown, plots
from mlxkd.report.values import Cell

Tone = Literal["plain", "good", "bad", "unsure", "note"]
WORDS = {"good": "Pass", "bad": "Problem", "unsure": "Cannot tell", "note": "Note"}
MARKS = {"good": "✅", "bad": "❌", "unsure": "❔", "note": "ℹ️"}


class Section(Protocol):
    """One part of a document."""

    def html(self) -> str:
        """Its HTML, every word of it escaped."""
        ...

    def markdown(self) -> str:
        """Its Markdown; a picture becomes its description."""
        ...


class Displayed:
    """Shows itself in a notebook."""

    def _repr_html_(self: Section) -> str:
        return html.fragment(self.html())


@dataclass(frozen=True)
class Heading:
    """A heading; ``level`` 2 opens a section, 3 a part of one (the title is level 1)."""

    text: str
    level: int = 2

    def html(self) -> str:
        """See ``Section``."""
        level = min(max(self.level, 2), 6)
        return f'<h{level} id="{html.anchor(self.text)}">{html.inline(self.text)}</h{level}>'

    def markdown(self) -> str:
        """See ``Section``."""
        return f"{'#' * self.level} {self.text}"


@dataclass(frozen=True)
class Text:
    """Paragraphs separated by blank lines; a tone other than "plain" makes them stand out as a verdict or a note."""

    text: str
    tone: Tone = "plain"

    def html(self) -> str:
        """See ``Section``."""
        body = html.paragraphs(self.text)
        if self.tone == "plain":
            return body
        word = f'<span class="word">{WORDS[self.tone]}</span>'
        return f'<div class="callout {self.tone}" role="note">{word}<div>{body}</div></div>'

    def markdown(self) -> str:
        """See ``Section``."""
        if self.tone == "plain":
            return self.text
        lines = f"{MARKS[self.tone]} {self.text}".splitlines()
        return "\n".join(f"> {line}".rstrip() for line in lines)


@dataclass(frozen=True)
class Code:
    """Text to read or copy exactly as it is."""

    text: str

    def html(self) -> str:
        """See ``Section``."""
        return f'<pre tabindex="0"><code>{escaping.escape(self.text)}</code></pre>'

    def markdown(self) -> str:
        """See ``Section``."""
        return markdown.fence(self.text)


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

    def _words(self) -> str:
        way = self.common_method()
        return " ".join(filter(None, [self.caption, f"All figures {way}." if way else ""]))

    def html(self) -> str:
        """See ``Section``."""
        tagged = self.common_method() is None
        kinds = [' class="number"' if self._is_numeric(i) else "" for i in range(len(self.columns))]
        head = "".join(f'<th scope="col"{k}>{html.inline(c)}</th>' for c, k in zip(self.columns, kinds, strict=True))
        rows = "".join(
            "<tr>" + "".join(f"<td{k}>{html.cell(c, tagged)}</td>" for c, k in zip(row, kinds, strict=True)) + "</tr>"
            for row in self.rows
        )
        said = html.caption(self._words(), "caption")
        table = f"<table>{said}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        return f'<div class="wide" tabindex="0">{table}</div>'

    def markdown(self) -> str:
        """See ``Section``."""
        tagged = self.common_method() is None
        rows = [[markdown.cell(cell, tagged) for cell in row] for row in self.rows]
        return "\n\n".join([*markdown.caption(self._words()), markdown.table(self.columns, rows)])

    def _is_numeric(self, column: int) -> bool:
        cells = [row[column] for row in self.rows]
        return bool(cells) and all(
            c is None or (isinstance(c, int | float | Metric) and not isinstance(c, bool)) for c in cells
        )


@dataclass(frozen=True)
class Tiles(Displayed):
    """The few figures to see first."""

    values: Mapping[str, Cell]

    def html(self) -> str:
        """See ``Section``."""
        tiles = "".join(f"<div><dt>{html.inline(k)}</dt><dd>{html.cell(v)}</dd></div>" for k, v in self.values.items())
        return f'<dl class="tiles">{tiles}</dl>'

    def markdown(self) -> str:
        """See ``Section``."""
        return "\n".join(f"- **{name}**: {markdown.cell(cell)}" for name, cell in self.values.items())


@dataclass(frozen=True)
class Figure(Displayed):
    """A picture: a matplotlib figure or SVG text of our own making; ``alt`` says what it shows in words."""

    picture: Any
    alt: str
    caption: str = ""

    def svg(self) -> str:
        """The picture as SVG text whose colours follow the page (light or dark)."""
        return self.picture if isinstance(self.picture, str) else plots.to_svg(self.picture)

    def html(self) -> str:
        """See ``Section``."""
        named = f'<svg role="img" aria-label="{escaping.escape(self.alt)}"'
        svg = re.sub(r"<svg\b", lambda _: named, self.svg(), count=1)
        return f'<figure><div class="wide" tabindex="0">{svg}</div>{html.caption(self.caption, "figcaption")}</figure>'

    def markdown(self) -> str:
        """See ``Section``."""
        return f"*Figure: {self.caption or self.alt}*" + (f" ({self.alt})" if self.caption else "")


@dataclass(frozen=True)
class Conversation(Displayed):
    """Chat messages as ``{"role", "content", "tool_calls"?, "name"?}``, shown turn by turn."""

    messages: Sequence[Mapping[str, Any]]
    caption: str = ""

    def _turns(self) -> Iterator[tuple[str, str, str, list[str]]]:
        """Role, name, text and calls (JSON) of each message."""
        for message in self.messages:
            calls = [json.dumps(c.get("function", c), ensure_ascii=False) for c in message.get("tool_calls") or ()]
            yield (
                str(message.get("role", "?")),
                str(message.get("name") or ""),
                str(message.get("content") or ""),
                calls,
            )

    def html(self) -> str:
        """See ``Section``."""
        turns = []
        for role, name, text, calls in self._turns():
            said = f"<p>{escaping.escape(text)}</p>" if text else ""
            said += "".join(f"<pre>{escaping.escape(call)}</pre>" for call in calls)
            who = escaping.escape(f"{role} · {name}" if name else role)
            turns.append(f'<li class="{html.anchor(role)}"><span class="role">{who}</span><div>{said}</div></li>')
        head = html.caption(self.caption, "p", ' class="caption"')
        return f'{head}<ol class="conversation">{"".join(turns)}</ol>'

    def markdown(self) -> str:
        """See ``Section``."""
        turns = [
            f"**{role}**\n\n{markdown.fence(chr(10).join(filter(None, [text, *calls])))}"
            for role, _, text, calls in self._turns()
        ]
        return "\n\n".join([*markdown.caption(self.caption), *turns])
