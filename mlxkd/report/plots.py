"""Plots for reports and notebooks: matplotlib figures without pyplot and without global settings.

Every function returns a ``matplotlib.figure.Figure``. ``to_svg`` turns one into SVG whose colours
are CSS variables with the light colours as fallback, so one picture suits light and dark pages.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxkd.metric import Metric
from mlxkd.report.values import show_quantity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, RULE = "#1b1f24", "#59636e", "#d8dce1"
SERIES = ("#0068a8", "#d04e00", "#008060", "#b5478f", "#946c00", "#5b5fc7")
DASHES = ("-", "--", "-.", ":")
THEME = {INK: "--ink", SOFT: "--soft", RULE: "--rule", **{c: f"--c{i}" for i, c in enumerate(SERIES, 1)}}
RC: dict[Any, Any] = {
    "font.family": "sans-serif", "font.size": 10.0, "text.color": INK, "axes.labelcolor": SOFT,
    "axes.edgecolor": RULE, "axes.grid": True, "axes.axisbelow": True, "grid.color": RULE, "grid.linewidth": 0.7,
    "axes.spines.top": False, "axes.spines.right": False, "xtick.color": SOFT, "ytick.color": SOFT,
    "legend.frameon": False, "lines.linewidth": 1.8, "axes.titlesize": 11.0, "axes.titlelocation": "left",
    "axes.titlecolor": INK, "svg.fonttype": "none", "svg.hashsalt": "mlxkd",
}  # fmt: skip

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def _draw(width: float, height: float, paint: Callable[[Axes], None]) -> Figure:
    import matplotlib
    from matplotlib.figure import Figure as MatplotlibFigure

    with matplotlib.rc_context(RC):
        figure = MatplotlibFigure(figsize=(width, height), layout="constrained")
        paint(figure.subplots())
    return figure


def to_svg(figure: Figure) -> str:
    """``figure`` as SVG for inlining: text stays text, colours follow the page, no date, no XML prologue."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context(RC):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()[stream.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for colour, variable in THEME.items():
        svg = svg.replace(colour, f"var({variable}, {colour})")
    # Two pictures on one page must not share the names of their clip paths and markers.
    salt = f"f{hashlib.sha256(svg.encode()).hexdigest()[:8]}"
    return re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{salt}-", svg)


def look(index: int) -> dict[str, Any]:
    """Colour and dash of a series: told apart without colour too."""
    return {"color": SERIES[index % len(SERIES)], "linestyle": DASHES[index % len(DASHES)]}


def curves(
    series: Series,
    *,
    x: str = "step",
    y: str = "",
    title: str = "",
    log: bool = False,
    points: bool = False,
    smooth: int = 1,
) -> Figure:
    """Lines by name over steps.

    Args:
        series: name -> (steps, values), equally long; values that are not finite leave a gap.
        log: logarithmic vertical axis.
        points: mark every observation (for short histories).
        smooth: draw the mean of so many observations up to each step, and the observations themselves faintly.

    Raises:
        ValueError: steps and values differ in length.
    """
    for name, (steps, values) in series.items():
        if len(steps) != len(values):
            raise ValueError(f"series {name!r} has {len(steps)} steps and {len(values)} values")

    def paint(axes: Axes) -> None:
        for index, (name, (steps, values)) in enumerate(series.items()):
            drawn = np.where(np.isfinite(np.asarray(values, dtype=np.float64)), values, np.nan)
            if smooth > 1:
                axes.plot(steps, drawn, color=look(index)["color"], linewidth=0.8, alpha=0.25)
                drawn = trailing_mean(drawn, smooth)
            marker = "o" if points or len(steps) == 1 else None
            axes.plot(steps, drawn, label=name, marker=marker, markersize=4, **look(index))
        axes.set(xlabel=x, ylabel=y, title=title, **({"yscale": "log"} if log else {}))
        if all(float(step).is_integer() for steps, _ in series.values() for step in steps):
            axes.locator_params(axis="x", integer=True, min_n_ticks=1)  # no step 6.25
        if len(series) > 1 or not y:
            axes.legend()

    return _draw(7.2, 3.4, paint)


def trailing_mean(values: np.ndarray, count: int) -> np.ndarray:
    """Mean of each of ``values`` [N] and up to ``count - 1`` before it, without those that are not finite."""
    known = np.isfinite(values)
    before = np.arange(len(values) + 1) - count
    sums, counts = (np.concatenate([[0.0], np.cumsum(v)]) for v in (np.where(known, values, 0.0), known))
    first = np.maximum(before, 0)
    total, found = (c[1:] - c[first[1:]] for c in (sums, counts))
    return np.where(found > 0, total / np.maximum(found, 1), np.nan)


def bars(values: Mapping[str, float | Metric | None], *, unit: str = "", title: str = "") -> Figure:
    """Horizontal bars with their values written out; a missing one says so instead of showing a bar.

    Args:
        values: name -> number in ``unit``, or a Metric (its p95, where present, becomes a whisker).
    """
    units = {value.unit for value in values.values() if isinstance(value, Metric)} | ({unit} if unit else set())
    if len(units) > 1:
        raise ValueError(f"bars of different units: {sorted(units)}")
    unit = next(iter(units), "")

    def paint(axes: Axes) -> None:
        ends = [_end(v) for v in values.values()]
        reach = max([end for end in ends if np.isfinite(end)], default=1.0) or 1.0
        for row, (value, end) in enumerate(zip(values.values(), ends, strict=True)):
            _bar(axes, row, value, end if np.isfinite(end) else 0.0, unit, reach)
        axes.set_yticks(range(len(values)), list(values))
        axes.set(xlabel=unit if unit != "share" else "", title=title, xlim=(min(0.0, *ends, 0.0), reach * 1.22))
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")

    return _draw(7.2, 0.9 + 0.42 * max(len(values), 1), paint)


def _end(value: float | Metric | None) -> float:
    number = value.value if isinstance(value, Metric) else value
    return float("nan") if number is None else float(number)


def _bar(axes: Axes, row: int, value: float | Metric | None, end: float, unit: str, reach: float) -> None:
    number = value.value if isinstance(value, Metric) else value
    p95 = value.p95 if isinstance(value, Metric) and value.p95 is not None and np.isfinite(value.p95) else None
    axes.barh(row, end, height=0.62, color=SERIES[0])
    if number is None:
        note = value.note if isinstance(value, Metric) else "missing"
        axes.annotate(str(note), (0, row), xytext=(4, 0), textcoords="offset points", va="center", color=SOFT)
        return
    if p95 is not None and p95 > end:
        axes.plot([end, min(p95, reach * 1.2)], [row, row], color=SOFT, linewidth=1.2, marker="|", markersize=7)
    tail = f" (p95 {show_quantity(p95, unit)})" if p95 is not None else ""
    axes.annotate(show_quantity(float(number), unit) + tail, (max(end, min(p95 or end, reach * 1.2)), row),
                  xytext=(5, 0), textcoords="offset points", va="center")  # fmt: skip


def stacked(parts: Mapping[str, Mapping[str, float]], *, unit: str = "ms", title: str = "") -> Figure:
    """One horizontal bar per name, cut into its parts (the phases of a time to first token, say)."""
    names = list(dict.fromkeys(part for row in parts.values() for part in row))

    def paint(axes: Axes) -> None:
        left = np.zeros(len(parts))
        for index, name in enumerate(names):
            width = np.array([row.get(name, 0.0) for row in parts.values()])
            axes.barh(range(len(parts)), width, left=left, height=0.6, label=name, color=SERIES[index % len(SERIES)],
                      edgecolor="white", linewidth=0.6)  # fmt: skip
            left = left + width
        for row, total in enumerate(left):
            axes.annotate(show_quantity(float(total), unit), (total, row), xytext=(5, 0), textcoords="offset points",
                          va="center")  # fmt: skip
        axes.set_yticks(range(len(parts)), list(parts))
        axes.set(xlabel=unit, title=title, xlim=(0, float(left.max(initial=0.0)) * 1.15 or 1))
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        if names:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=max(len(names), 1))

    return _draw(7.2, 1.5 + 0.45 * max(len(parts), 1), paint)


def heat_map(
    matrix: np.ndarray | Sequence[Sequence[float]], *, rows: Sequence[str], columns: Sequence[str], label: str = "",
    title: str = "", limits: tuple[float, float] | None = None,
) -> Figure:  # fmt: skip
    """A matrix [rows, columns] as colour, values written into the cells while they fit.

    Args:
        limits: values at the two ends of the scale; the data's own range without.

    Raises:
        ValueError: the matrix does not have one value per row and column name.
    """
    cells = np.asarray(matrix, dtype=np.float64)
    if cells.shape != (len(rows), len(columns)):
        raise ValueError(f"matrix {cells.shape} for {len(rows)} rows and {len(columns)} columns")
    finite = cells[np.isfinite(cells)]
    low, high = limits or (float(finite.min(initial=0.0)), float(finite.max(initial=1.0)))

    def paint(axes: Axes) -> None:
        mesh = axes.pcolormesh(cells, cmap="cividis", vmin=low, vmax=high, edgecolors="white", linewidth=0.5)
        axes.figure.colorbar(mesh, ax=axes, label=label, pad=0.02)
        axes.set_xticks(np.arange(len(columns)) + 0.5, list(columns), rotation=0 if len(columns) <= 12 else 90)
        axes.set_yticks(np.arange(len(rows)) + 0.5, list(rows))
        axes.set(title=title)
        axes.invert_yaxis()
        axes.grid(visible=False)
        if cells.size <= 240 and len(columns) <= 14:
            for (row, column), value in np.ndenumerate(cells):
                colour = "white" if (value - low) < 0.55 * (high - low or 1) else "black"
                text = f"{value:.2f}" if np.isfinite(value) else "–"
                axes.annotate(text, (column + 0.5, row + 0.5), ha="center", va="center", color=colour, fontsize=8)

    return _draw(min(1.8 + 0.62 * len(columns), 9.5), min(1.0 + 0.34 * len(rows), 9.0), paint)


def distributions(
    samples: Mapping[str, Sequence[float]], *, unit: str = "ms", title: str = "",
    censored: Mapping[str, int] | None = None,
) -> Figure:  # fmt: skip
    """Cumulative distributions by name: read the share of requests (up) that took at most a time (across).

    Args:
        samples: observations in ``unit``; empty ones are named as such in the legend.
        censored: observations that never happened: their curve ends below 1.
    """
    missing = censored or {}

    def paint(axes: Axes) -> None:
        for index, (name, values) in enumerate(samples.items()):
            ordered = np.sort(np.asarray(values, dtype=np.float64))
            total = ordered.size + missing.get(name, 0)
            label = name if ordered.size else f"{name} (no observation)"
            if missing.get(name):
                label += f" ({missing[name]} of {total} never happened)"
            share = np.arange(1, ordered.size + 1) / max(total, 1)
            axes.step(ordered, share, where="post", label=label, **look(index))
        for level in (0.5, 0.95):
            axes.axhline(level, color=SOFT, linewidth=0.7, linestyle=":")
            axes.annotate(f"p{level * 100:.0f}", (1, level), xycoords=("axes fraction", "data"), xytext=(3, 0),
                          textcoords="offset points", va="center", color=SOFT, annotation_clip=False)  # fmt: skip
        axes.set(xlabel=unit, ylabel="share of observations", title=title, ylim=(0, 1.02))
        axes.legend(loc="best")

    return _draw(7.2, 3.4, paint)
