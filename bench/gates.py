"""Gates: is today's build worse than the blessed one? Pass, fail, or cannot tell.

A regression gate fails when its lower confidence bound lies above the limit, after Holm's correction over
all gates and with alpha split over the looks; it passes when its upper bound lies below the limit (every
gate must pass, so no correction is needed there: an intersection-union test). Anything else cannot be told
apart yet, and the result says how many more rounds would.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from bench import statistics
from bench.statistics import Estimate, Rounds, Statistic
from mlxkd.errors import UserError

Outcome = Literal["pass", "fail", "cannot tell", "not available"]
EXIT = {"pass": 0, "fail": 1, "not available": 2, "cannot tell": 3}
THRESHOLDS = Path(__file__).with_name("thresholds.yaml")


class Thresholds(BaseModel):
    """Limits of one machine; see thresholds.yaml for what each means."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    alpha: float = 0.05
    looks: int = 3
    regression: dict[str, dict[Statistic, float]] = {}
    ceiling: dict[str, dict[Statistic, float]] = {}
    quality: dict[str, float] = {}
    residency_floor: float = 0.80
    residency_drop: float = 0.10


def thresholds(chip: str, path: str | Path = THRESHOLDS) -> Thresholds:
    """The limits for ``chip``.

    Raises:
        UserError: the file does not parse or has an unknown key.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        chosen: dict[str, Any] = dict(tree["default"])
        for pattern, changes in (tree.get("hardware") or {}).items():
            if fnmatch.fnmatch(chip, pattern):
                chosen |= changes
        return Thresholds.model_validate(chosen)
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValidationError) as error:
        raise UserError(
            f"not a thresholds file: {str(error).splitlines()[0]}",
            where=str(path),
            hint=f"start from {THRESHOLDS.name}",
        ) from error


@dataclass(frozen=True)
class Evidence:
    """What is known of both sides.

    Args:
        candidate, baseline: series name -> rounds of samples; paired round by round when ``paired``.
        candidate_quality, baseline_quality: score name -> score of each case, same cases in the same order.
        residency: (candidate's share, baseline's share or None), or None without a predicted or planned figure.
        day_sigma: log spread between days by "series statistic" (from calibration), for stored baselines.
        noise: log error of one round by "series statistic" (from calibration); n rounds have error / sqrt(n).
    """

    candidate: dict[str, Rounds]
    baseline: dict[str, Rounds] = field(default_factory=dict)
    paired: bool = True
    candidate_quality: dict[str, list[float]] = field(default_factory=dict)
    baseline_quality: dict[str, list[float]] = field(default_factory=dict)
    residency: tuple[float, float | None] | None = None
    day_sigma: dict[str, float] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Gate:
    """One gate's verdict. ``value``, ``low``, ``high`` and ``limit`` are on the scale people read (ratios, steps)."""

    name: str
    outcome: Outcome
    limit: float
    unit: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    detectable: float | None = None
    more_rounds: int | None = None
    note: str = ""


@dataclass(frozen=True)
class _Test:
    """A gate before Holm: an estimate against a limit on the estimate's scale."""

    name: str
    estimate: Estimate
    limit: float
    unit: str
    shown: Literal["exp", "plain"]
    note: str = ""
    decidable: bool = True


def evaluate(evidence: Evidence, limits: Thresholds) -> list[Gate]:
    """Every gate's verdict, in the order of the thresholds."""
    tests: list[_Test | Gate] = [
        *_regressions(evidence, limits),
        *_ceilings(evidence, limits),
        *_qualities(evidence, limits),
    ]
    alpha = limits.alpha / limits.looks
    open_tests = [t for t in tests if isinstance(t, _Test)]
    worse = iter(statistics.holm([t.estimate.p_above(t.limit) for t in open_tests], alpha))
    verdicts = [_verdict(t, next(worse), alpha) if isinstance(t, _Test) else t for t in tests]
    return [*verdicts, *_residency(evidence, limits)]


def overall(gates: Sequence[Gate]) -> Outcome:
    """Fail if any fails, else cannot tell if any cannot, else pass; not available when nothing was tested."""
    found = {gate.outcome for gate in gates}
    for outcome in ("fail", "cannot tell", "pass"):
        if outcome in found:
            return outcome  # type: ignore[return-value]
    return "not available"


def _verdict(test: _Test, worse: bool, alpha: float) -> Gate:
    estimate = test.estimate
    show = math.exp if test.shown == "exp" else float
    outcome: Outcome = "cannot tell"
    if test.decidable and worse:
        outcome = "fail"
    elif test.decidable and estimate.p_below(test.limit) <= alpha:
        outcome = "pass"
    more = None
    if outcome == "cannot tell" and test.decidable:
        total = estimate.rounds_to_settle(test.limit, alpha)
        more = None if total is None else max(1, total - estimate.degrees - 1)
    low, high = (estimate.bound(1 - alpha, side) for side in ("lower", "upper"))
    return Gate(
        test.name, outcome, show(test.limit), test.unit, show(estimate.value), show(low), show(high),
        show(estimate.detectable) - (1 if test.shown == "exp" else 0), more, test.note,
    )  # fmt: skip


def _missing(name: str, limit: float, unit: str, note: str) -> Gate:
    return Gate(name, "not available", limit, unit, note=note)


def _regressions(evidence: Evidence, limits: Thresholds) -> list[_Test | Gate]:
    found: list[_Test | Gate] = []
    for series, wanted in limits.regression.items():
        for name, limit in wanted.items():
            ours, theirs = evidence.candidate.get(series), evidence.baseline.get(series)
            label = f"{series} {name}"
            if not ours or not theirs:
                side = "the candidate" if not ours else "the baseline"
                found.append(_missing(label, limit, "ratio", f"{side} has no {series}"))
                continue
            found.append(_regression(label, ours, theirs, name, limit, evidence))
    return found


def _regression(
    label: str, ours: Rounds, theirs: Rounds, name: Statistic, limit: float, evidence: Evidence
) -> _Test | Gate:
    note = ""
    if name == "p95" and statistics.between_modes(ours, theirs):
        name, note = "es90", "mean of the worst tenth: the 95th percentile lies between two modes"
    try:
        if evidence.paired:
            estimate = statistics.log_ratio(theirs, ours, name)
            floor = statistics.POWER_Z * evidence.noise.get(label, 0.0) / math.sqrt(len(ours))
            if floor > math.log(limit):
                note = f"refused: calibration says changes below {100 * math.expm1(floor):.1f} % are noise here"
            return _Test(label, estimate, math.log(limit), "ratio", "exp", note, floor <= math.log(limit))
        sigma = evidence.day_sigma.get(label)
        if sigma is None:
            gate = _missing(
                label, limit, "ratio", "stored figures need the spread between days: five days of calibration"
            )
            return replace(gate, outcome="cannot tell")
        estimate = statistics.stored_log_ratio(theirs, ours, name, sigma)
    except ValueError as fault:
        return replace(_missing(label, limit, "ratio", str(fault)), outcome="cannot tell")
    return _Test(label, estimate, math.log(limit), "ratio", "exp", note or "against stored figures")


def _ceilings(evidence: Evidence, limits: Thresholds) -> list[_Test | Gate]:
    found: list[_Test | Gate] = []
    for series, wanted in limits.ceiling.items():
        for name, limit in wanted.items():
            rounds, label, unit = evidence.candidate.get(series), f"{series} {name}", series.rsplit("_", 1)[-1]
            if not rounds:
                found.append(_missing(label, limit, unit, f"the candidate has no {series}"))
                continue
            try:
                estimate = statistics.level(rounds, name)
            except ValueError as fault:
                found.append(replace(_missing(label, limit, unit, str(fault)), outcome="cannot tell"))
                continue
            # "At most" means that a percentile which is exactly the limit passes.
            note = _beside(evidence, name) if series == "ttfa_steps" else ""
            found.append(_Test(label, estimate, limit + 1e-6, unit, "plain", note))
    return found


def _beside(evidence: Evidence, name: Statistic) -> str:
    """What a limit on model steps leaves out: tokens up to the first action, and tokens before the call opens."""
    words = []
    for series, meaning in (("ttfa_tokens", "tokens"), ("ttfa_overhead_tokens", "tokens before the call opens")):
        rounds = evidence.candidate.get(series)
        if not rounds:
            words.append(f"{meaning}: not in the report")
            continue
        try:
            value = statistics.level(rounds, name).value
            words.append(f"{value:.4g} {meaning}" if math.isfinite(value) else f"{meaning}: never reached")
        except ValueError as fault:
            words.append(f"{meaning}: {fault}")
    return f"beside it, {name}: {'; '.join(words)}"


def _qualities(evidence: Evidence, limits: Thresholds) -> list[_Test | Gate]:
    found: list[_Test | Gate] = []
    for name, allowed in limits.quality.items():
        ours, theirs = evidence.candidate_quality.get(name), evidence.baseline_quality.get(name)
        label = f"{name} loss"
        if not ours or not theirs:
            side = "the candidate" if not ours else "the baseline"
            found.append(_missing(label, allowed, "share", f"{side} has no {name} scores"))
        elif len(ours) != len(theirs) or len(ours) < 2:
            note = f"{len(ours)} cases against {len(theirs)}: the scores must be of the same cases, two at least"
            found.append(replace(_missing(label, allowed, "share", note), outcome="cannot tell"))
        else:
            loss = statistics.paired_difference(ours, theirs)
            found.append(_Test(label, loss, allowed, "share", "plain", f"over {len(ours)} cases"))
    return found


def _residency(evidence: Evidence, limits: Thresholds) -> list[Gate]:
    """Deterministic figures of the same program: compared as they are."""
    if evidence.residency is None:
        return [_missing("ane residency", limits.residency_floor, "share", "no residency figure in the report")]
    ours, theirs = evidence.residency
    gates = [
        Gate(
            "ane residency", "pass" if ours >= limits.residency_floor else "fail", limits.residency_floor, "share", ours
        )
    ]
    if theirs is not None:
        fell = theirs - ours
        outcome: Outcome = "pass" if fell <= limits.residency_drop + 1e-12 else "fail"
        gates.append(Gate("ane residency drop", outcome, limits.residency_drop, "share", fell))
    return gates


def next_rounds(done: int, look: int, limits: Thresholds) -> int | None:
    """Rounds to add for the next look (each look doubles them), or None after the last."""
    return done if look < limits.looks else None
