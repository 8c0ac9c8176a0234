"""Stability history as sections of a report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlxkd.quant.stability import MEASURES, Stability
from mlxkd.report import Figure, Heading, Section, Table, Text, plots


def stability_sections(history: Sequence[Stability], log: Sequence[str] = ()) -> list[Section]:
    """Heading, worst-layer curves, per-layer heat maps and what the limits did; empty without history."""
    if not history:
        return []
    steps = [seen.step for seen in history]
    sections: list[Section] = [Heading("Stability of quantised training")]
    for line in log:
        sections.append(Text(line, tone="bad"))
    for measure in MEASURES[:-1]:
        values = [seen.figure(measure) for seen in history]
        if any(value is not None for value in values):
            finite = [np.nan if value is None else value for value in values]
            words = measure.replace("_", " ")
            picture = plots.curves({words: (steps, finite)}, y=words, points=True)
            sections.append(Figure(picture, alt=f"{words} over training steps, worst layer"))
    matrix = np.array([[layer.cosine for layer in seen.layers] for seen in history]).T
    names = [f"layer {i}" for i in range(len(matrix))]
    picture = plots.heat_map(matrix, rows=names, columns=[str(s) for s in steps], label="cosine", limits=(0.0, 1.0))
    sections.append(Figure(picture, alt="cosine between float and deployed hidden states, layer by step"))
    last = history[-1]
    rows = [(i, x.cosine, x.relative_error, x.float_entropy, x.entropy) for i, x in enumerate(last.layers)]
    columns = ("layer", "cosine", "relative error", "entropy, float", "entropy, deployed")
    sections.append(Table(columns, rows, caption=f"float against deployed at step {last.step}"))
    return sections
