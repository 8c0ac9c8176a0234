"""From a report to verdicts: find the baseline, run both sides again, look up to three times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import baselines, calibration, rounds
from bench.baselines import Baseline, Found
from bench.gates import Evidence, Gate, Thresholds, evaluate, next_rounds, overall
from bench.results import Report, Target
from bench.runners._job import Job
from mlxkd.errors import UserError

Say = Callable[[str], None]


@dataclass(frozen=True)
class Verdict:
    """The gates and what a reader must know about how they were decided."""

    gates: list[Gate]
    found: Found
    notes: tuple[str, ...]
    report: Report


def job_for(target: Target, report: Report) -> Job:
    """The job that measured a target, so that it can be run again."""
    wanted = report.workload.settings
    return Job(
        kind=target.kind,
        location=target.location,
        workload=report.workload.name,
        max_tokens=wanted.get("max_tokens", 64),
        requests=wanted.get("requests"),
        records=wanted.get("records"),
        batch=wanted.get("batch", "auto"),
        draft=wanted.get("draft", "none"),
        seed=wanted.get("seed", 0),
        model=target.backend.removeprefix("endpoint ") if target.kind == "endpoint" else None,
    )


def series_of(report: Report, target: str) -> dict[str, Any]:
    """Every series of a target by round."""
    names = {name for r in report.rounds if r.target == target for name in r.samples}
    return {name: report.series(target, name) for name in names}


def evidence(
    report: Report, target: str, baseline: Report, baseline_target: str, *, paired: bool, folder: Path
) -> Evidence:
    """What is known of both sides, with this machine's calibration."""
    known = calibration.read(folder, report.hardware)
    ours, theirs = report.residency.get(target), baseline.residency.get(baseline_target)
    shares = None
    if ours is not None:
        shares = (float(ours["share"]), None if theirs is None else float(theirs["share"]))
    return Evidence(
        series_of(report, target),
        series_of(baseline, baseline_target),
        paired,
        report.quality.get(target, {}),
        baseline.quality.get(baseline_target, {}),
        shares,
        known.day_sigma(report.workload.hash),
        known.noise(report.workload.hash),
    )


def stored(report: Report, target: str, found: Found, limits: Thresholds, *, folder: Path) -> Verdict:
    """Gates against the stored figures alone: the spread between days is part of the noise."""
    known = evidence(report, target, found.baseline.report, found.baseline.target, paired=False, folder=folder)
    return Verdict(evaluate(known, limits), found, _notes(found), report)


def rerun(
    report: Report, target: str, found: Found, limits: Thresholds, *, count: int, folder: Path, say: Say
) -> Verdict:
    """Run the candidate and the blessed artefact next to each other; double the rounds while it cannot be told.

    Raises:
        UserError: one of the artefacts is no longer what was measured.
    """
    ours = report.target(target)
    theirs = found.baseline.report.target(found.baseline.target)
    for side in (ours, theirs):
        _unchanged(side)
    jobs = {"candidate": job_for(ours, report), "baseline": job_for(theirs, found.baseline.report)}
    both, _ = rounds.measure(jobs, rounds=count, kind="compare", say=say)
    sides = {
        "candidate": (report, ours, jobs["candidate"]),
        "baseline": (found.baseline.report, theirs, jobs["baseline"]),
    }
    for name, scores in agreements(both, sides, say).items():
        both.quality.setdefault(name, {})["agreement"] = scores
    both.residency = {"candidate": report.residency.get(target, {})} if target in report.residency else {}
    blessed = found.baseline.report.residency.get(found.baseline.target)
    if both.residency and blessed:
        both.residency["baseline"] = blessed
    look = 1
    while True:
        known = evidence(both, "candidate", both, "baseline", paired=True, folder=folder)
        verdicts = evaluate(known, limits)
        more = next_rounds(count, look, limits)
        if overall(verdicts) != "cannot tell" or more is None:
            return Verdict(verdicts, found, _notes(found), both)
        say(f"cannot tell yet after {count} rounds; {more} more")
        extra, _ = rounds.measure(jobs, rounds=more, kind="compare", first=count, say=say)
        both = both.model_copy(update={"rounds": [*both.rounds, *extra.rounds]})
        count, look = count + more, look + 1


def agreements(both: Report, sides: dict[str, tuple[Report, Target, Job]], say: Say) -> dict[str, list[float]]:
    """Per side and case whether the answer is that of the side's own reference, which answers again too.

    The reference is the MLX model that a `bench compare` report measured beside the bundle; a side without one has
    no score, for new weights may well say something else.
    """
    answers: dict[str, list[str]] = {}
    scores = {}
    for name, (report, target, job) in sides.items():
        reference = next((t for t in report.targets if t.kind == "mlx" and t.name != target.name), None)
        if report.kind != "compare" or reference is None:
            continue
        _unchanged(reference)
        if reference.location not in answers:
            say(f"the reference of the {name} answers: {reference.name}")
            again = job.model_copy(update={"kind": "mlx", "location": reference.location})
            answers[reference.location] = rounds.run_job(again).answers
        pairs = zip(both.answers[name], answers[reference.location], strict=True)
        scores[name] = [float(ours == theirs) for ours, theirs in pairs]
    return scores


def _unchanged(side: Target) -> None:
    if side.artefact is not None and rounds.artefact_hash(side.location) != side.artefact:
        raise UserError(
            "this artefact is gone or no longer what was measured",
            where=side.location,
            hint="measure it again, or judge by the stored figures with --stored",
        )


def _notes(found: Found) -> tuple[str, ...]:
    if not found.differs:
        return ()
    return (f"Forced: the baseline is not of this identity ({'; '.join(found.differs)}). The gates mean little.",)


def chosen(report: Report, target: str | None, baseline: str | None, *, folder: Path, force: bool) -> Found:
    """The baseline to gate against: the one named, or the newest of the same identity.

    Raises:
        UserError: none fits; a named one of another identity needs ``force``.
    """
    if baseline is None:
        return baselines.find(report, folder=folder, target=target, force=force)
    known: Baseline = baselines.read(baseline)
    differs = tuple(baselines.differences(report, target, known))
    if differs and not force:
        raise UserError(
            f"this baseline differs in {'; '.join(differs)}", where=baseline, hint="--force compares anyway"
        )
    return replace(Found(known, Path(baseline)), differs=differs)
