"""Print Core ML's compute plan of one function as one line of JSON. Runs on macOS 14.4 or later only.

Usage: python -m ane.residency.plan_worker PACKAGE FUNCTION
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ane.convert.project import single_function
from mlxkd.runtime import import_coremltools


def main(package: str, function: str) -> dict[str, Any]:
    """Project the function to its own package, compile it, load its plan, list its operations."""
    ct = import_coremltools()
    from coremltools.models.compute_plan import MLComputePlan

    with tempfile.TemporaryDirectory() as folder:
        single = Path(folder) / "single.mlpackage"
        single_function(Path(package), function, single)
        compiled = ct.utils.compile_model(str(single))
        plan = MLComputePlan.load_from_path(compiled, compute_units=ct.ComputeUnit.CPU_AND_NE)
        block = plan.model_structure.program.functions["main"].block
        return {"operations": [_entry(plan, operation) for operation in _walk(block)]}


def _walk(block: Any) -> Iterator[Any]:
    for operation in block.operations:
        name = operation.operator_name.rsplit(".", 1)[-1]
        if name != "const" and not name.startswith("constexpr_"):
            yield operation
        for inner in operation.blocks:
            yield from _walk(inner)


def _entry(plan: Any, operation: Any) -> dict[str, Any]:
    usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
    estimate = plan.get_estimated_cost_for_mlprogram_operation(operation)
    return {
        "op": operation.operator_name,
        "name": operation.outputs[0].name if operation.outputs else "",
        "device": type(usage.preferred_compute_device).__name__ if usage else None,
        "supported": [type(d).__name__ for d in usage.supported_compute_devices] if usage else [],
        "weight": estimate.weight if estimate else None,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1], sys.argv[2])) + "\n")
