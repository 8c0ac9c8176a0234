"""Interleaved rounds in fresh processes: ABBA by chance, conditions checked before each."""

from __future__ import annotations

import datetime
import hashlib
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from bench import hardware
from bench.results import Report, Round, Target
from bench.runners._job import Job, Outcome
from mlxkd.errors import UserError
from mlxkd.files import file_hash
from mlxkd.runtime import worker_environment

Say = Callable[[str], None]


def kind_of(location: str) -> Literal["mlx", "bundle", "endpoint"]:
    """What a target is: a URL, a folder with a bundle's manifest, or a model."""
    if location.startswith(("http://", "https://")):
        return "endpoint"
    return "bundle" if (Path(location) / "manifest.json").is_file() else "mlx"


def artefact_hash(location: str) -> str | None:
    """One hash over the files of a folder; None for endpoints and repositories not on disk."""
    folder = Path(location)
    if not folder.is_dir():
        return None
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        total.update(f"{path.relative_to(folder)} {file_hash(path)}\n".encode())
    return total.hexdigest()[:16]


def run_job(job: Job, *, seconds: float = 3600.0) -> Outcome:
    """Run one job in a fresh process.

    Raises:
        UserError: the process failed; its last words are the fault.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bench.worker"],
            input=job.model_dump_json(),
            capture_output=True,
            text=True,
            timeout=seconds,
            env=worker_environment(),
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"a round took longer than {seconds:.0f} s", where=job.location) from error
    said = [line for line in done.stderr.splitlines() if line.strip()]
    if done.returncode:
        if done.returncode == 2:  # a fault for people, which has a hint of its own
            raise UserError("the round failed: " + "\n".join(said[-2:]), where=job.location)
        fault = (said or ["no message"])[-1]
        raise UserError(f"the round failed: {fault}", where=job.location, hint="`mlxkd doctor` checks this machine")
    try:
        return Outcome.model_validate_json(done.stdout.strip().splitlines()[-1])
    except (ValidationError, IndexError) as error:
        raise UserError("the round answered nothing readable", where=job.location) from error


def _quiet(_: str) -> None:
    """Say nothing."""


def measure(
    jobs: dict[str, Job],
    *,
    rounds: int,
    kind: Literal["speed", "compare", "calibration", "toolcalls"] = "speed",
    seed: int = 0,
    pause: float = 0.0,
    first: int = 0,
    say: Say = _quiet,
) -> tuple[Report, dict[str, list[Outcome]]]:
    """Run every target ``rounds`` times, next to each other in random order.

    Args:
        jobs: target name -> job; all share one workload.
        pause: idle seconds before each process, longer on machines without a fan.
        first: number of the first round, when rounds are added to earlier ones.
        say: told about progress and conditions.
    """
    chance = random.Random(seed + first)
    found: list[Round] = []
    outcomes: dict[str, list[Outcome]] = {name: [] for name in jobs}
    for index in range(first, first + rounds):
        order: Sequence[str] = chance.sample(list(jobs), len(jobs))
        for name in order:
            time.sleep(pause)
            conditions = hardware.preflight()
            if conditions.problems:
                say(f"round {index + 1}, {name}: {', '.join(conditions.problems)}")
            outcome = run_job(jobs[name])
            outcomes[name].append(outcome)
            found.append(
                Round(target=name, index=index, samples=outcome.samples, counters=outcome.counters,
                      conditions=conditions, device=outcome.device)
            )  # fmt: skip
        say(f"round {index + 1} of {first + rounds}")
    return _report(jobs, outcomes, found, kind), outcomes


def _report(
    jobs: dict[str, Job],
    outcomes: dict[str, list[Outcome]],
    found: list[Round],
    kind: Literal["speed", "compare", "calibration", "toolcalls"],
) -> Report:
    first = next(iter(jobs.values()))
    settings = {"batch": first.batch, "draft": first.draft, "seed": first.seed}
    asked = first.load().identity(**settings)
    asked.settings.update({"records": first.records} if first.records else {})
    targets = [
        Target(name=name, kind=job.kind, location=job.location, backend=outcomes[name][0].backend,
               artefact=artefact_hash(job.location), details=outcomes[name][0].details)
        for name, job in jobs.items()
    ]  # fmt: skip
    report = Report(
        kind=kind,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        hardware=hardware.profile(),
        workload=asked,
        targets=targets,
        rounds=found,
        answers={name: made[0].answers for name, made in outcomes.items()},
        quality={name: made[0].scores for name, made in outcomes.items() if made[0].scores},
    )
    names = {series for r in found for series in r.samples}
    for target in targets:
        figures = {series: report.metric(target.name, series).to_json() for series in sorted(names)}
        report.figures[target.name] = figures
    return report
