"""The demo run: exactness of teacher, student and a twin without a teacher, on held-out requests.

Runs ``mlxkd train`` on the embedded demo in this process. The peer is the twin: the same start and the same
batches, trained with cross-entropy alone and packed on the same grid.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from mlxkd.metric import Metric
from mlxkd.recipe import load_recipe
from mlxkd.runtime import device_name
from mlxkd.training.result import gap_closed, lead
from mlxkd.training.run import train

QUICK = ("training.steps=40", "evaluation.tool_calls=20", "training.evaluate_every=40")


def measure(quick: bool) -> dict[str, Metric]:
    device = device_name()
    with TemporaryDirectory() as folder:
        recipe = load_recipe("demo", QUICK if quick else ())
        result = train(recipe, Path(folder), resume=False, console=Console(stderr=True))
    contenders = result.contenders

    def exact(key: str, note: str) -> Metric:
        return dataclasses.replace(contenders[key].metrics["all/exact"], note=note)

    return {
        "student_params": Metric(contenders["student"].parameters, "parameters", "measured", device),
        "teacher_params": Metric(contenders["teacher"].parameters, "parameters", "measured", device),
        "exact_teacher": exact("teacher", "embedded teacher, fp32 here"),
        "exact_sft": exact("baseline", "same start, batches and grid, cross-entropy alone"),
        "exact_student": exact("student", f"packed on {recipe.quantisation.grid}"),
        "lead": lead(result),
        "gap_closed": gap_closed(result),
        "minutes": Metric(result.seconds / 60, "minutes", "measured", device),
        "peak_gb": Metric(result.peak_bytes / 1e9, "GB", "measured", device),
    }
