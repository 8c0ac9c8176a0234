"""The residency rules over what was written: what would keep it off the Neural Engine, before anybody ships it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ane.residency.predict import DEFAULT_CHIP, predict


@dataclass(frozen=True)
class Lint:
    """Findings on a bundle.

    Args:
        share: predicted cost-weighted share on the Neural Engine, the smallest of any function.
        failures: what would not compile or load, one sentence each.
        warnings: what would run elsewhere, one sentence per rule.
    """

    share: float
    failures: tuple[str, ...]
    warnings: tuple[str, ...]

    def lines(self) -> list[str]:
        """One line per finding, then the share."""
        return [
            *(f"lint failure: {text}" for text in self.failures),
            *(f"lint warning: {text}" for text in self.warnings),
            f"predicted share on the Neural Engine: {self.share:.3f}",
        ]


def lint(bundle: str | Path, chip: str = DEFAULT_CHIP) -> Lint:
    """Apply the rules for a chip. Predicted, never measured."""
    found = predict(bundle, chip)
    failures: dict[str, str] = {}
    warnings: dict[str, str] = {}
    for function in found.functions:
        for finding in function.findings:
            said = failures if finding.verdict == "FAIL" else warnings
            said.setdefault(f"{finding.rule}", f"{finding.rule}: {finding.reason}; {finding.fix}")
        for placement in function.exceptions:
            said = failures if placement.device == "fails" else warnings
            said.setdefault(
                f"{placement.rule}.{placement.op}",
                f"{placement.rule}: {placement.op} in {function.function}: {placement.reason}; {placement.fix}",
            )
    return Lint(found.share, tuple(failures.values()), tuple(warnings.values()))
