"""Blessed reports: append-only, found only by an exact identity."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from bench.results import SCHEMA_VERSION, Report, Strict, content_hash
from mlxkd.errors import UserError
from mlxkd.files import atomic_file

FOLDER = Path("baselines")
LEAST_ROUNDS = 10


class Baseline(Strict):
    """A blessed report with who it stands for and why."""

    identity: dict[str, str]
    reason: str
    commit: str | None
    target: str
    report: Report


@dataclass(frozen=True)
class Found:
    """A baseline and the file it came from; ``differs`` is filled when it was forced."""

    baseline: Baseline
    path: Path
    differs: tuple[str, ...] = ()


def identity(report: Report, target: str | None = None) -> dict[str, str]:
    """What must agree before two reports compare: machine, backend, workload, format of the figures."""
    chosen = report.target(target)
    return {
        "hardware": report.hardware.key,
        "backend": chosen.backend,
        "workload": report.workload.hash,
        "schema": str(SCHEMA_VERSION),
    }


def commit(folder: str | Path = ".") -> tuple[str | None, bool]:
    """The git commit at ``folder`` and whether the tree is clean; (None, True) outside a repository."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=30)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    return head, head is None or not git("status", "--porcelain", "--untracked-files=no")


def faults(report: Report, target: str, *, clean: bool) -> list[str]:
    """Everything that forbids blessing a report."""
    rounds = [r for r in report.rounds if r.target == target]
    found = []
    if len(rounds) < LEAST_ROUNDS:
        found.append(f"too few rounds: {len(rounds)}, at least {LEAST_ROUNDS} are needed")
    troubled = report.problems(target)
    if troubled:
        found.append(f"conditions were not nominal: {', '.join(troubled)}")
    if report.target(target).artefact is None and report.target(target).kind != "endpoint":
        found.append("the artefact has no hash")
    if not clean:
        found.append("the working tree has uncommitted changes")
    return found


def bless(report: Report, reason: str, *, folder: str | Path = FOLDER, target: str | None = None) -> Path:
    """Store a report as the newest baseline of its identity. Nothing is ever overwritten.

    Raises:
        UserError: no reason, or any of ``faults``; all of them are named.
    """
    chosen = report.target(target).name
    head, clean = commit()
    found = faults(report, chosen, clean=clean)
    if not reason.strip():
        found.insert(0, "no reason given")
    if found:
        raise UserError(f"not blessed: {'; '.join(found)}", hint="mend these and measure again")
    who = identity(report, chosen)
    place = Path(folder) / content_hash(who)
    number = 1 + max((int(p.name.split("-")[0]) for p in place.glob("[0-9]*.json")), default=0)
    path = place / f"{number:04d}-{report.created[:10]}.json"
    blessed = Baseline(identity=who, reason=reason.strip(), commit=head, target=chosen, report=report)
    with atomic_file(path) as temporary:
        temporary.write_text(blessed.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return path


def read(path: str | Path) -> Baseline:
    """One baseline file."""
    try:
        return Baseline.model_validate(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError("not a baseline file", where=str(path), hint="bless a report: `bench bless REPORT`") from error


def history(report: Report, *, folder: str | Path = FOLDER, target: str | None = None) -> list[Found]:
    """Every baseline of the same identity, oldest first."""
    place = Path(folder) / content_hash(identity(report, target))
    return [Found(read(p), p) for p in sorted(place.glob("[0-9]*.json"))]


def find(report: Report, *, folder: str | Path = FOLDER, target: str | None = None, force: bool = False) -> Found:
    """The newest baseline of the same identity.

    Raises:
        UserError: there is none; names what the nearest one differs in. ``force`` takes the nearest instead, labelled.
    """
    same = history(report, folder=folder, target=target)
    if same:
        return same[-1]
    others = [Found(read(p), p) for p in sorted(Path(folder).glob("*/[0-9]*.json"))]
    if not others:
        raise UserError(
            "no baseline yet", where=str(folder), hint="bless a good report: `bench bless REPORT --reason ...`"
        )
    nearest = min(others, key=lambda f: len(differences(report, target, f.baseline)))
    differs = differences(report, target, nearest.baseline)
    if not force:
        raise UserError(
            f"no baseline of this identity; the nearest ({nearest.path}) differs in {'; '.join(differs)}",
            hint="measure on the same machine and workload, or compare anyway with --force",
        )
    return Found(nearest.baseline, nearest.path, tuple(differs))


def differences(report: Report, target: str | None, other: Baseline) -> list[str]:
    """In what a report and a baseline are not the same experiment, in words."""
    ours, theirs = identity(report, target), other.identity
    found = []
    if ours["hardware"] != theirs["hardware"]:
        found += report.hardware.differences(other.report.hardware)
    for name in ("backend", "schema"):
        if ours[name] != theirs[name]:
            found.append(f"{name}: {ours[name]} against {theirs[name]}")
    if ours["workload"] != theirs["workload"]:
        found.append(f"workload: {report.workload.name} against {other.report.workload.name}, or its settings")
    return found
