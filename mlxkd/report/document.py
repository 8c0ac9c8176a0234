"""A document: sections under a title, as one HTML page, as Markdown, or in a notebook."""

from __future__ import annotations

import html as escaping
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxkd.errors import UserError
from mlxkd.files import atomic_file
from mlxkd.report import html, markdown
from mlxkd.report.sections import Heading, Section


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
        return html.page(self.title, self.subtitle, f"{self._contents()}{_body(self.sections)}{self._made()}")

    def markdown(self) -> str:
        """Markdown for a pull request; pictures become their description."""
        blocks = [f"# {self.title}", *([self.subtitle] if self.subtitle else [])]
        blocks += [section.markdown() for section in self.sections]
        if self.details:
            rows = [(markdown.cell(key), markdown.cell(_text(value))) for key, value in self.details.items()]
            blocks.append(markdown.table(("detail", "value"), rows))
        return "\n\n".join(blocks) + "\n"

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
        return html.fragment(_body([Heading(self.title, 2), *self.sections]))

    def _contents(self) -> str:
        heads = [s.text for s in self.sections if isinstance(s, Heading) and s.level == 2]
        if len(heads) < 4:
            return ""
        links = "".join(f'<li><a href="#{html.anchor(h)}">{escaping.escape(h)}</a></li>' for h in heads)
        return f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n'

    def _made(self) -> str:
        if not self.details:
            return ""
        rows = "".join(
            f"<dt>{escaping.escape(str(key))}</dt><dd>{escaping.escape(_text(value))}</dd>"
            for key, value in self.details.items()
        )
        return f'<details><summary>How this was made</summary><dl class="made">{rows}</dl></details>\n'


def _body(sections: Sequence[Section]) -> str:
    return "".join(section.html() + "\n" for section in sections)


def _text(value: Any) -> str:
    """A detail in words; what is missing inside it is left out."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items() if v is not None)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
