"""A pytest plugin that puts down each test before and after it runs, so that a crash loses only the test it hit.

Lines of JSON go to the file named by MAC_REPORT_LINES. Tests that are there already do not run again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest


def _lines() -> Path:
    return Path(os.environ["MAC_REPORT_LINES"])


def read(lines: Path) -> dict[str, dict[str, Any]]:
    """What became of each test, by its id: its last line, but a failure stands against what follows it."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines.read_text(encoding="utf-8").splitlines() if lines.is_file() else []:
        outcome = json.loads(line)
        if found.get(outcome["test"], outcome)["state"] != "failed":
            found[outcome["test"]] = outcome
    return found


def _put(**line: Any) -> None:
    with _lines().open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line, default=str) + "\n")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    done = read(_lines())
    items[:] = [item for item in items if item.nodeid not in done]


def pytest_runtest_logstart(nodeid: str) -> None:
    _put(test=nodeid, state="unfinished")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        # A skipped test's is (file, line, reason).
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr or "")
        found = dict(report.user_properties)
        _put(test=report.nodeid, state=report.outcome, seconds=report.duration, text=text, found=found)
