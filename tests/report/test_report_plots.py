"""Plots show the numbers they were given: read back from the drawn artists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from mlxkd.metric import Metric
from mlxkd.report import plots


def words(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_curves_leave_a_gap_where_a_value_is_missing() -> None:
    figure = plots.curves({"a": ([0, 1, 2], [3.0, float("nan"), 1.0]), "b": ([0, 2], [1.0, float("inf")])}, y="nats")
    first, second = figure.axes[0].get_lines()
    np.testing.assert_array_equal(first.get_ydata(), [3.0, np.nan, 1.0])
    np.testing.assert_array_equal(second.get_ydata(), [1.0, np.nan])
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == ["a", "b"]


def test_curves_smooth_over_the_observations_up_to_each_step() -> None:
    values = [4.0, 2.0, float("nan"), 6.0, 0.0]
    figure = plots.curves({"a": (list(range(5)), values)}, y="nats", smooth=3)
    raw, mean = figure.axes[0].get_lines()
    np.testing.assert_array_equal(raw.get_ydata(), values)
    want = [np.nanmean(values[max(i - 2, 0) : i + 1]) for i in range(5)]
    np.testing.assert_allclose(mean.get_ydata(), want)


@pytest.mark.parametrize(("steps", "whole"), [([6, 8], True), ([8], True), ([0.25, 1.5], False)])
def test_only_whole_steps_are_marked_where_all_are_whole(steps: list[float], whole: bool) -> None:
    axes = plots.curves({"a": (steps, [1.0] * len(steps))}).axes[0]
    low, high = axes.get_xlim()
    shown = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert shown and all(tick == round(tick) for tick in shown) is whole


def test_curves_refuse_unequal_lengths() -> None:
    with pytest.raises(ValueError, match="series 'a' has 2 steps and 1 values"):
        plots.curves({"a": ([0, 1], [1.0])})


def test_bars_write_values_and_reasons() -> None:
    figure = plots.bars(
        {
            "x": Metric(10.0, "ms", "measured", "CPU", p95=14.0),
            "y": Metric(None, "ms", "measured", "CPU", note="not available here: needs macOS"),
            "z": None,
        }
    )
    assert [patch.get_width() for patch in figure.axes[0].patches] == [10.0, 0.0, 0.0]
    assert words(figure) == ["10 ms (p95 14 ms)", "not available here: needs macOS", "missing"]


def test_bars_of_different_units_are_refused() -> None:
    with pytest.raises(ValueError, match="different units"):
        plots.bars({"x": Metric(1, "ms", "predicted"), "y": Metric(1, "s", "predicted")})


def test_stacked_totals() -> None:
    figure = plots.stacked({"a": {"p": 1.0, "q": 2.0}, "b": {"q": 5.0}})
    assert words(figure) == ["3 ms", "5 ms"]
    assert [patch.get_x() for patch in figure.axes[0].patches] == [0, 0, 1.0, 0]


def test_heat_map_values_sit_in_their_cells() -> None:
    matrix = np.array([[0.0, 0.25, 0.5], [0.75, 1.0, np.nan]])
    figure = plots.heat_map(matrix, rows=["r0", "r1"], columns=["a", "b", "c"])
    placed = {(t.xy[1] - 0.5, t.xy[0] - 0.5): t.get_text() for t in figure.axes[0].texts}
    assert placed[(1.0, 0.0)] == "0.75" and placed[(1.0, 2.0)] == "–"
    with pytest.raises(ValueError, match=r"matrix \(2, 3\) for 1 rows"):
        plots.heat_map(matrix, rows=["r0"], columns=["a", "b", "c"])


def test_distributions_are_the_empirical_distribution() -> None:
    values = np.random.default_rng(0).normal(10, 2, 50)
    figure = plots.distributions({"a": values, "b": values[:30], "none": []}, censored={"b": 10})
    lines = figure.axes[0].get_lines()
    across, up = lines[0].get_data()
    for x, y in zip(across, up, strict=True):
        assert y == pytest.approx(np.mean(values <= x))
    assert lines[1].get_ydata()[-1] == pytest.approx(0.75)
    assert lines[1].get_label() == "b (10 of 40 never happened)"
    assert lines[2].get_label() == "none (no observation)"


DRAWN: dict[str, Callable[[], Any]] = {
    "no curve": lambda: plots.curves({}, y="y"),
    "no bar": lambda: plots.bars({}),
    "no stack": lambda: plots.stacked({}),
    "one point": lambda: plots.curves({"one": ([3], [1.0])}),
    "large map": lambda: plots.heat_map(np.zeros((20, 30)), rows=[str(r) for r in range(20)], columns=["c"] * 30),
}


@pytest.mark.parametrize("name", DRAWN)
def test_svg_is_xml_with_page_colours_and_is_reproducible(name: str) -> None:
    svg = plots.to_svg(DRAWN[name]())
    ElementTree.fromstring(svg)
    assert "var(--" in svg
    assert svg == plots.to_svg(DRAWN[name]())


def test_plots_leave_global_settings_alone() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.to_svg(plots.curves({"a": ([0, 1], [1.0, 2.0])}, y="y"))
    assert dict(matplotlib.rcParams) == before
