"""What a run found: its table, and the same as JSON."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxkd.evaluation.answers import Answer
from mlxkd.metric import Metric
from mlxkd.recipe import Recipe
from mlxkd.runtime import artefact_metadata, device_name


@dataclass
class Contender:
    """One column of the final table.

    Args:
        title: for people.
        parameters: weights, counted before packing.
        bytes: size of the weights as they lie in memory.
        metrics: figures by name; tool-call figures are prefixed with their set.
        answers: what it wrote, by set.
    """

    title: str
    parameters: int
    bytes: int
    metrics: dict[str, Metric]
    answers: dict[str, list[Answer]] = field(default_factory=dict)


@dataclass
class RunResult:
    """What a run found."""

    recipe: Recipe
    folder: Path
    contenders: dict[str, Contender]
    seconds: float
    peak_bytes: int
    data_lines: list[str]


def gap_closed(result: RunResult) -> Metric:
    """Share of the distance from the twin to the teacher that the student covers, in exact calls."""
    exact = {key: c.metrics.get("all/exact") for key, c in result.contenders.items()}
    values = [m.value for key in ("teacher", "baseline", "student") if (m := exact.get(key)) and m.value is not None]
    if len(values) < 3:
        return Metric(None, "share", "measured", device_name(), note="needs tool calls and a baseline")
    teacher, baseline, student = values
    if math.isclose(teacher, baseline) or teacher < baseline:
        return Metric(None, "share", "measured", device_name(), note="the baseline already equals the teacher")
    cases = exact["student"]
    return Metric(
        (student - baseline) / (teacher - baseline), "share", "measured", device_name(), cases.n if cases else 0
    )


def lead(result: RunResult) -> Metric:
    """Points of exact answers of the student over its twin; the note has the standard error of paired differences."""
    ours, twin = (result.contenders.get(key) for key in ("student", "baseline"))
    if not ours or not twin or not ours.answers or not twin.answers:
        return Metric(None, "points", "measured", device_name(), note="needs tool calls and a baseline")
    right = [[a.score.exact for part in c.answers.values() for a in part] for c in (ours, twin)]
    differences = [100.0 * (mine - theirs) for mine, theirs in zip(*right, strict=True)]
    n = len(differences)
    error = statistics.stdev(differences) / math.sqrt(n) if n > 1 else math.inf
    note = f"standard error {error:.1f}, both answered the same requests"
    return Metric(statistics.fmean(differences), "points", "measured", device_name(), n, note=note)


def to_json(result: RunResult) -> dict[str, Any]:
    """The content of report.json."""
    contenders = {
        key: {
            "title": c.title,
            "parameters": c.parameters,
            "bytes": c.bytes,
            "metrics": {name: metric.to_json() for name, metric in c.metrics.items()},
        }
        for key, c in result.contenders.items()
    }
    return {
        "name": result.recipe.name,
        "recipe": result.recipe.model_dump(mode="json"),
        "made_by": artefact_metadata(),
        "contenders": contenders,
        "lead": lead(result).to_json(),
        "gap_closed": gap_closed(result).to_json(),
        "minutes": Metric(result.seconds / 60, "minutes", "measured", device_name()).to_json(),
        "peak_gb": Metric(result.peak_bytes / 1e9, "GB", "measured", device_name()).to_json(),
        "data": result.data_lines,
    }
