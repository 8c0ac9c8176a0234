"""HTML: one page, no outside resource, light and dark by the reader's own setting.

Literal text goes through ``html.escape`` or ``inline``, so a prompt or a file name can never turn into markup.
"""

from __future__ import annotations

import html
import re
from importlib import resources

from mlxkd.metric import Metric
from mlxkd.report.values import Cell, show_quantity, show_value


def page(title: str, subtitle: str, body: str) -> str:
    """A whole page around finished HTML; title and subtitle are text."""
    said = f'<p class="subtitle">{inline(subtitle)}</p>' if subtitle else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{_style()}</style>\n</head>\n"
        f'<body class="report">\n<main>\n<header><h1>{html.escape(title)}</h1>{said}</header>\n'
        f"{body}</main>\n</body>\n</html>\n"
    )


def fragment(body: str) -> str:
    """Finished HTML for a notebook cell: the same look, inside a box of its own."""
    return f'<style>\n{_style()}</style>\n<div class="report">{body}</div>'


def _style() -> str:
    return resources.files("mlxkd.report").joinpath("style.css").read_text(encoding="utf-8")


def inline(text: str) -> str:
    """Text with `code` and **strong** words; everything else is literal."""
    text = html.escape(text)
    text = re.sub(r"`([^`\n]+)`", r"<code>\1</code>", text)
    return re.sub(r"\*\*([^*\n]+)\*\*", r"<strong>\1</strong>", text)


def anchor(text: str) -> str:
    """The name of a heading within the page."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "section"


def paragraphs(text: str) -> str:
    """Paragraphs separated by blank lines."""
    parts = [p.strip().replace("\n", " ") for p in re.split(r"\n\s*\n", text.strip())]
    return "".join(f"<p>{inline(p)}</p>" for p in parts)


def cell(value: Cell, tagged: bool = True) -> str:
    """A cell's value; figures carry how they were obtained, in words if ``tagged`` and on hover."""
    # A number and its unit stay on one line.
    shown = inline(re.sub(r"(?<=\d) (?=\S+$)", "\N{NO-BREAK SPACE}", show_value(value)))
    if not isinstance(value, Metric):
        return shown
    if value.value is None:
        return f'<span class="missing">{shown}</span>'
    if not tagged:
        return f'<span title="{_about(value)}">{shown}</span>'
    return f'{shown} <span class="method {value.method}" title="{_about(value)}">{value.method}</span>'


def caption(text: str, tag: str, attributes: str = "") -> str:
    """A caption, or nothing."""
    return f"<{tag}{attributes}>{inline(text)}</{tag}>" if text else ""


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
