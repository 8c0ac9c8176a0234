"""The predicted residency: the rule table over a program, per operation, per segment, weighed by cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ane.residency.calibration import Correction, corrections
from ane.residency.chips import Chip, chip
from ane.residency.program import Function, Op, cost, functions, packages
from ane.residency.table import LEAVES, Confidence, Rule, Scene, Verdict, findings, function_findings
from mlxkd.metric import Metric

Device = Literal["ANE", "CPU", "fails"]
DEFAULT_CHIP = "m1"  # the strictest limits of the M series: what holds there holds later


@dataclass(frozen=True)
class Finding:
    """A rule that spoke, and what it saw."""

    rule: str
    verdict: Verdict
    confidence: Confidence
    reason: str
    fix: str
    source: str


@dataclass(frozen=True)
class Placement:
    """Where one operation is predicted to run, and why; ``share`` is its part of the function's cost."""

    op: str
    name: str
    device: Device
    share: float
    rule: str
    reason: str
    fix: str
    confidence: Confidence
    source: str
    notes: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class FunctionResidency:
    """One function of one package."""

    package: str
    function: str
    placements: tuple[Placement, ...]
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def share(self) -> float:
        """Cost-weighted share of the operations that stay on the Neural Engine."""
        return sum(p.share for p in self.placements if p.device == "ANE")

    @property
    def segments(self) -> list[tuple[Device, int]]:
        """Runs of operations on one device, in program order: each change of device is a hand-over."""
        found: list[tuple[Device, int]] = []
        for placement in self.placements:
            if found and found[-1][0] == placement.device:
                found[-1] = (placement.device, found[-1][1] + 1)
            else:
                found.append((placement.device, 1))
        return found

    @property
    def exceptions(self) -> list[Placement]:
        """The operations that fall off, dearest first."""
        return sorted((p for p in self.placements if p.device != "ANE"), key=lambda p: -p.share)


@dataclass(frozen=True)
class Residency:
    """The prediction for a bundle on one chip."""

    path: str
    chip: str
    functions: tuple[FunctionResidency, ...]

    def by_function(self) -> dict[str, float]:
        """Share per function name, all chunks together, weighed by cost."""
        total: dict[str, float] = {}
        there: dict[str, float] = {}
        for f in self.functions:
            total[f.function] = total.get(f.function, 0.0) + f.seconds
            there[f.function] = there.get(f.function, 0.0) + f.seconds * f.share
        return {name: there[name] / total[name] if total[name] else 1.0 for name in total}

    @property
    def share(self) -> float:
        """The smallest share of any function: the figure that gates."""
        return min(self.by_function().values())

    def metric(self) -> Metric:
        """The share as a predicted figure."""
        note = f"rule table for {self.chip}; smallest of {', '.join(self.by_function())}"
        return Metric(self.share, "share", "predicted", n=sum(len(f.placements) for f in self.functions), note=note)

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        parts = []
        for f in self.functions:
            part = asdict(f) | {"share": f.share, "segments": f.segments}
            parts.append(part)
        return {
            "path": self.path,
            "chip": self.chip,
            "method": "predicted",
            "share": self.share,
            "by_function": self.by_function(),
            "functions": parts,
        }


def predict(path: str | Path, on: str = DEFAULT_CHIP, *, calibrations: str | Path | None = None) -> Residency:
    """Predict where every operation of a bundle or package runs.

    Args:
        on: chip name, "m1" to "m5" or "a14" to "a19".
        calibrations: folder of contributed plans; the package's own by default.

    Raises:
        UserError: no package, an unreadable one, or an unknown chip.
    """
    target = chip(on)
    known = corrections(target, calibrations)
    found = [
        function_residency(function, target, known) for package in packages(path) for function in functions(package)
    ]
    return Residency(str(path), target.name, tuple(found))


def function_residency(function: Function, target: Chip, known: Sequence[Correction] = ()) -> FunctionResidency:
    """The prediction for one function."""
    scene = Scene(function, target)
    whole = tuple(_finding(r, reason) for r, reason in function_findings(scene))
    fatal = next((f for f in whole if f.verdict in LEAVES), None)
    costs = [cost(op) for op in function.ops]
    total = sum(costs) or 1.0
    placements = tuple(
        _place(op, seconds / total, scene, fatal, known) for op, seconds in zip(function.ops, costs, strict=True)
    )
    return FunctionResidency(function.package, function.name, placements, whole, sum(costs))


def _finding(found: Rule, reason: str) -> Finding:
    return Finding(found.id, found.verdict, found.confidence, reason, found.fix, found.source)


def _place(op: Op, share: float, scene: Scene, fatal: Finding | None, known: Sequence[Correction]) -> Placement:
    hits = [_finding(r, reason) for r, reason in findings(op, scene)]
    first = fatal or hits[0]
    device: Device = "fails" if first.verdict == "FAIL" else ("CPU" if first.verdict in LEAVES else "ANE")
    reason, source, confidence = first.reason, first.source, first.confidence
    seen = next((c for c in known if c.op == op.type and c.rule == first.rule), None)
    if seen is not None and fatal is None and seen.device != device:
        device, source, confidence = seen.device, seen.source, "high"
        reason = (
            f"planned there by {seen.count} of {seen.of} such operations on a real {seen.chip} (rule said: {reason})"
        )
    notes = tuple(h for h in hits if h is not first and h.rule != "R10")
    # Core ML's plan names operations by their first output.
    name = op.node.outputs[0][0] if op.node.outputs else op.node.name
    fix = first.fix if device != "ANE" else ""
    return Placement(op.type, name, device, share, first.rule, reason, fix, confidence, source, notes)
