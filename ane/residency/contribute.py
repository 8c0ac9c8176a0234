"""A calibration file from this machine's plans, for others to use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ane.residency.calibration import Calibration
from ane.residency.predict import Residency


def contribution(
    predicted: Residency, planned: Mapping[str, Sequence[Mapping[str, Any]]], *, machine: Mapping[str, str]
) -> dict[str, Any]:
    """A calibration from a prediction and the plans of the same functions.

    Args:
        planned: function name -> operations of the plan as {"op", "name", "device"}.
        machine: chip, system, coremltools and package hash.
    """
    counts: dict[tuple[str, str, str], int] = {}
    for function in predicted.functions:
        devices = {str(o["name"]): str(o["device"]) for o in planned.get(function.function, ()) if o.get("device")}
        for placement in function.placements:
            if placement.name in devices:
                key = (placement.op, placement.rule, devices[placement.name])
                counts[key] = counts.get(key, 0) + 1
    observations = [{"op": o, "rule": r, "device": d, "count": n} for (o, r, d), n in sorted(counts.items())]
    return Calibration.model_validate({"format": 1, **machine, "observations": observations}).model_dump()
