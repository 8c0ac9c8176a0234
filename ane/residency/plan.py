"""The planned residency: what Core ML's compute plan says on this Mac, one function at a time, in a subprocess.

The plan is asked of compiled single-function models only (a multi-function package answers for its default
function alone, and a package that was not compiled aborts the process), and asking triggers the whole Neural
Engine compile, which may crash: hence a fresh process per function.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlxkd.runtime import worker_environment

NEEDS_MACOS = "not available here: needs macOS"
DEVICES = {"MLNeuralEngineComputeDevice": "ANE", "MLCPUComputeDevice": "CPU", "MLGPUComputeDevice": "GPU"}


@dataclass(frozen=True)
class PlannedOp:
    """One operation of a plan: where Core ML would like it, where it could go, its part of the cost."""

    op: str
    name: str
    device: Literal["ANE", "CPU", "GPU"]
    supported: tuple[str, ...]
    weight: float


@dataclass(frozen=True)
class Plan:
    """The plan of one function, or the reason there is none."""

    package: str
    function: str
    ops: tuple[PlannedOp, ...] = ()
    missing: str | None = None

    @property
    def share(self) -> float | None:
        """Cost-weighted share on the Neural Engine; None without a plan."""
        total = sum(op.weight for op in self.ops)
        if self.missing or total <= 0:
            return None
        return sum(op.weight for op in self.ops if op.device == "ANE") / total


def parse(text: str, package: str, function: str) -> Plan:
    """The plan from what the worker printed; anything malformed is a plan that is missing, with the reason."""
    try:
        tree = json.loads(text.strip().splitlines()[-1])
        if "error" in tree:
            return Plan(package, function, missing=str(tree["error"]))
        return Plan(package, function, tuple(_op(entry) for entry in tree["operations"] if entry["device"]))
    except (ValueError, KeyError, IndexError, TypeError) as error:
        return Plan(package, function, missing=f"the plan was not readable: {type(error).__name__} {error}")


def _op(entry: dict[str, Any]) -> PlannedOp:
    weight = float(entry["weight"] or 0.0)
    if not 0 <= weight <= 1:
        raise ValueError(f"weight {weight} of {entry['name']}")
    return PlannedOp(
        str(entry["op"]).rsplit(".", 1)[-1],
        str(entry["name"]),
        DEVICES[entry["device"]],  # type: ignore[arg-type]
        tuple(DEVICES[d] for d in entry["supported"]),
        weight,
    )


def plan(package: str | Path, function: str, *, seconds: float = 1800.0) -> Plan:
    """Ask Core ML for the plan of one function; on other systems the plan is missing and says why."""
    name = Path(package).name
    if sys.platform != "darwin":
        return Plan(name, function, missing=NEEDS_MACOS)
    command = [sys.executable, "-m", "ane.residency.plan_worker", str(package), function]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=worker_environment())
    except subprocess.TimeoutExpired:
        return Plan(name, function, missing=f"Core ML took longer than {seconds:.0f} s to plan")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Plan(name, function, missing=f"Core ML ended with {done.returncode}: {last}")
    return parse(done.stdout, name, function)


def disagreements(predicted: dict[str, str], planned: Plan) -> list[tuple[str, str, str]]:
    """(operation, predicted device, planned device) where the two sources differ."""
    found: list[tuple[str, str, str]] = []
    for op in planned.ops:
        said = predicted.get(op.name)
        if said is not None and (said == "ANE") != (op.device == "ANE"):
            found.append((op.name, said, op.device))
    return found
