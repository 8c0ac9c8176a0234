"""The noise floor of a machine: the same artefact against itself, round by round, on several days."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from bench import statistics
from bench.gates import Thresholds
from bench.hardware import Hardware
from bench.results import Report, Strict
from mlxkd.errors import UserError
from mlxkd.files import write_json


class Day(Strict):
    """One calibration: per "series statistic" the value and the log error of one paired round."""

    created: str
    workload: str
    rounds: int
    value: dict[str, float]
    error_per_round: dict[str, float]


class Calibration(Strict):
    """All calibrations of one machine, oldest first."""

    hardware: Hardware
    days: tuple[Day, ...] = ()

    def noise(self, workload: str) -> dict[str, float]:
        """Log error of one round by "series statistic": the worst day counts."""
        worst: dict[str, float] = {}
        for day in self.days:
            if day.workload == workload:
                for name, error in day.error_per_round.items():
                    worst[name] = max(error, worst.get(name, 0.0))
        return worst

    def day_sigma(self, workload: str) -> dict[str, float]:
        """Log spread between days by "series statistic", where five days are known."""
        values: dict[str, dict[str, float]] = {}
        for day in self.days:
            if day.workload == workload:
                for name, value in day.value.items():
                    values.setdefault(name, {})[day.created[:10]] = value  # one per date: the last
        sigmas = {name: statistics.day_sigma(list(by_date.values())) for name, by_date in values.items()}
        return {name: sigma for name, sigma in sigmas.items() if sigma is not None}


def measure(report: Report, limits: Thresholds) -> Day:
    """Noise of a calibration report, whose two targets are the same artefact.

    Raises:
        UserError: the report is not a calibration, or has fewer than three rounds.
    """
    if report.kind != "calibration" or len(report.targets) != 2:
        raise UserError("not a calibration report", hint="make one with `bench calibrate TARGET`")
    first, second = (t.name for t in report.targets)
    value: dict[str, float] = {}
    error: dict[str, float] = {}
    rounds = 0
    for series, wanted in limits.regression.items():
        ours, theirs = report.series(first, series), report.series(second, series)
        if not ours or len(ours) != len(theirs):
            continue
        if len(ours) < 3:
            raise UserError(f"{len(ours)} rounds cannot show a spread", hint="use --rounds 10")
        rounds = len(ours)
        for name in wanted:
            estimate = statistics.log_ratio(ours, theirs, name)
            value[f"{series} {name}"] = statistics.statistic([v for r in ours + theirs for v in r], name)
            error[f"{series} {name}"] = estimate.error * math.sqrt(rounds)
    return Day(created=report.created, workload=report.workload.hash, rounds=rounds, value=value, error_per_round=error)


def rows(day: Day, limits: Thresholds) -> list[tuple[str, float, float, int, str]]:
    """Per gate: error of one round (%), smallest change seen with these rounds (%), rounds it needs, verdict."""
    found = []
    for name, error in day.error_per_round.items():
        series, statistic = name.rsplit(" ", 1)
        limit = math.log(limits.regression[series][statistic])  # type: ignore[index]
        needed = max(3, math.ceil((statistics.POWER_Z * error / limit) ** 2))
        seen = 100 * math.expm1(statistics.POWER_Z * error / math.sqrt(day.rounds))
        verdict = "decidable" if needed <= day.rounds else f"refused below {needed} rounds"
        found.append((name, 100 * error, seen, needed, verdict))
    return found


def path_for(folder: str | Path, hardware: Hardware) -> Path:
    """Where the calibrations of a machine lie."""
    return Path(folder) / hardware.key / "calibration.json"


def read(folder: str | Path, hardware: Hardware) -> Calibration:
    """The machine's calibrations; none yet is an empty one."""
    path = path_for(folder, hardware)
    if not path.exists():
        return Calibration(hardware=hardware)
    try:
        tree: Any = json.loads(path.read_text(encoding="utf-8"))
        return Calibration.model_validate(tree)
    except ValueError as error:
        raise UserError("not a calibration file", where=str(path), hint="move it away and calibrate again") from error


def add(folder: str | Path, hardware: Hardware, day: Day) -> Path:
    """Append one day to the machine's calibrations."""
    known = read(folder, hardware)
    path = path_for(folder, hardware)
    write_json(path, Calibration(hardware=hardware, days=(*known.days, day)).model_dump(mode="json"))
    return path
