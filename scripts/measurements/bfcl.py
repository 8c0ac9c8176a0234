"""BFCL verdicts: our rules against the leaderboard's own checker (peer: bfcl-eval, run with a stubbed model table).

Gold answers and seeded mutants of every category at hand; the share of equal verdicts, and the time that
20,000 verdicts take. Without the peer the agreements are missing and the line that installs it is printed.
"""

from __future__ import annotations

import os
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mlxkd.errors import UserError
from mlxkd.evaluation.toolcalls.bfcl import mutants, official, reader, rules
from mlxkd.evaluation.toolcalls.bfcl.reader import Case
from mlxkd.evaluation.toolcalls.parsing import Call
from mlxkd.metric import Metric
from mlxkd.runtime import device_name

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"


def measure(quick: bool) -> dict[str, Metric]:
    """Agreements (shares) and seconds per 20,000 verdicts."""
    cases, source = _cases()
    count = 4_000 if quick else 40_000
    golden = [(case, reader.gold_calls(case)) for case in cases]
    mutated = [(case, calls) for case, _, calls in mutants.mutants(cases, count)]
    start = time.perf_counter()
    for case, calls in mutated:
        rules.fault(case.category, case.functions, case.answers, calls)
    seconds = (time.perf_counter() - start) * 20_000 / count
    return {
        "gold_agreement": _agreement(golden, source),
        "mutant_agreement": _agreement(mutated, source),
        "seconds_20k": Metric(seconds, "s", "measured", device_name(), n=count, note=source),
    }


def _cases() -> tuple[list[Case], str]:
    shared = Path(os.environ.get("MLXKD_TEST_DATA", SHARED)) / "bfcl"
    folder = official.official_data() or shared
    cases = [case for name in reader.categories_in(folder) for case in reader.load_cases(folder, name) if case.answers]
    if not cases:
        raise UserError("no BFCL cases found", where=str(shared), hint=official.INSTALL)
    return cases, f"{len(cases)} BFCL v4 cases of {', '.join(sorted({c.category for c in cases}))}"


def _agreement(answers: list[tuple[Case, list[Call]]], source: str) -> Metric:
    check = official.official_checker()
    if check is None:
        return Metric(None, "share", "measured", device_name(), note=f"the peer is missing: {official.INSTALL}")
    same = sum(
        (rules.fault(case.category, case.functions, case.answers, calls) is None) == check(case, calls)
        for case, calls in answers
    )
    return Metric(same / len(answers), "share", "measured", device_name(), n=len(answers), note=f"{_peer()}, {source}")


def _peer() -> str:
    try:
        return f"bfcl-eval {version('bfcl-eval')}"
    except PackageNotFoundError:
        return "bfcl-eval"
