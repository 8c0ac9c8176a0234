"""A program as a strip of operations coloured by device: hover (or read the title) for the reason."""

from __future__ import annotations

from xml.sax.saxutils import escape

from ane.residency.predict import FunctionResidency, Placement, Residency
from mlxkd.report.values import show_quantity

# Colours follow the page through CSS variables; the letters tell devices apart without colour.
COLOURS = {"ANE": "var(--c3, #008060)", "CPU": "var(--c2, #d04e00)", "fails": "var(--bad, #c4232f)"}
LETTERS = {"ANE": "", "CPU": "C", "fails": "×"}
CELL, GAP, ACROSS, LEFT = 15, 3, 48, 8


def svg(residency: Residency) -> str:
    """One strip per function, a legend on top."""
    parts: list[str] = []
    top = 34
    for function in residency.functions:
        drawn, height = _strip(function, top)
        parts.append(drawn)
        top += height
    width = LEFT * 2 + ACROSS * (CELL + GAP)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top}" width="{width}" height="{top}" '
        f'font-family="sans-serif" font-size="11" fill="var(--ink, #1b1f24)">{_legend()}{"".join(parts)}</svg>'
    )


def _legend() -> str:
    words = {"ANE": "Neural Engine", "CPU": "CPU", "fails": "does not load, or wrong"}
    drawn, left = [], LEFT
    for device, word in words.items():
        drawn.append(f'<rect x="{left}" y="8" width="{CELL}" height="{CELL}" rx="2" style="fill:{COLOURS[device]}"/>')
        drawn.append(_letter(LETTERS[device], left, 8))
        drawn.append(f'<text x="{left + CELL + 5}" y="20">{word}</text>')
        left += CELL + 24 + 7 * len(word)
    drawn.append(f'<text x="{left}" y="20">predicted; one cell per operation, in order; the bar shows cost</text>')
    return "".join(drawn)


def _letter(letter: str, x: float, y: float) -> str:
    return (
        f'<text x="{x + CELL / 2}" y="{y + 11.5}" text-anchor="middle" font-weight="bold" '
        f'style="fill:var(--paper, #ffffff)">{letter}</text>'
        if letter
        else ""
    )


def _strip(function: FunctionResidency, top: int) -> tuple[str, int]:
    whole = show_quantity(function.share, "share")
    name = f"{function.package}, {function.function}: {whole} of the cost on the Neural Engine"
    drawn = [f'<text x="{LEFT}" y="{top + 12}" font-weight="bold">{escape(name)}</text>']
    full, left = ACROSS * (CELL + GAP) - GAP, float(LEFT)
    for device in COLOURS:
        share = sum(p.share for p in function.placements if p.device == device)
        wide = full * share
        drawn.append(
            f'<rect x="{left:.1f}" y="{top + 18}" width="{wide:.1f}" height="6" style="fill:{COLOURS[device]}"/>'
        )
        left += wide
    for index, placement in enumerate(function.placements):
        drawn.append(_cell(placement, LEFT + index % ACROSS * (CELL + GAP), top + 30 + index // ACROSS * (CELL + GAP)))
    rows = -(-len(function.placements) // ACROSS)
    return "".join(drawn), 30 + rows * (CELL + GAP) + 14


def _cell(placement: Placement, x: int, y: int) -> str:
    share = show_quantity(placement.share, "share")
    said = f"{placement.name} ({placement.op}): {placement.device}, {share} of the cost; "
    said += f"{placement.rule}: {placement.reason}"
    return (
        f'<g><title>{escape(said)}</title><rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" rx="2" '
        f'style="fill:{COLOURS[placement.device]}"/>{_letter(LETTERS[placement.device], x, y)}</g>'
    )
