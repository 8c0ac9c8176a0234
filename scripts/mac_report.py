#!/usr/bin/env python3
"""Run the tests marked macos and write one report: the machine, what passed, what was measured, what failed and how.

Core ML can take its process down with it. The test during which that happens is reported as unfinished, and the tests
behind it run in a new process; after Ctrl-C the report holds what ran until then. It holds hardware, versions and test
results, nothing else. Exits with 1 where a test failed or did not finish, else with pytest's code.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from mac_report_plugin import read  # noqa: E402

from mlxkd import runtime  # noqa: E402
from mlxkd.files import atomic_file  # noqa: E402

TAIL = 4000  # characters kept of a failure
INTERRUPTED = 130  # the shell's code for Ctrl-C

Outcome = dict[str, Any]


def run(tests: list[str], scratch: Path) -> tuple[int, list[Outcome]]:
    """pytest's last exit code, and what came of every test, in the order in which they ran.

    Args:
        tests: arguments for pytest that select the tests.
        scratch: an empty folder.
    """
    lines = scratch / "lines.jsonl"
    path = os.pathsep.join(filter(None, [str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, "MAC_REPORT_LINES": str(lines)}
    command = [sys.executable, "-m", "pytest", "-p", "mac_report_plugin", "-q", *tests]
    code, before, found = -1, -1, read(lines)
    while code < 0 and len(found) > before:  # ended by a signal, but further than the last time
        before = len(found)
        try:
            code = subprocess.run(command, cwd=ROOT, env=environment).returncode
        except KeyboardInterrupt:
            code = INTERRUPTED
        found = read(lines)
    return code, list(found.values())


def said(*command: str) -> str:
    """What a command prints, or why it does not."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip() or "(nothing)"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"({error})"


def machine() -> list[str]:
    """Lines about the machine and its software."""
    commit = said("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    lines = [
        f"- date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, commit {commit}",
        f"- system: {platform.platform()}, {runtime.cpu_name()}, {(runtime.total_memory() or 0) / 2**30:.0f} GiB",
    ]
    if sys.platform == "darwin":
        lines += [f"- macOS: {said('sw_vers', '-productVersion')} ({said('sw_vers', '-buildVersion')})"]
        lines += [f"- Xcode: {said('xcodebuild', '-version').replace(chr(10), ' ')}"]
    versions = ", ".join(f"{name} {version}" for name, version in runtime.versions().items() if version)
    return [*lines, f"- versions: {versions}"]


def described(outcomes: Iterable[Outcome]) -> list[str]:
    """One line per test, what it measured below it, and failures in full."""
    lines = []
    for outcome in outcomes:
        seconds = f" {outcome['seconds']:.1f} s" if "seconds" in outcome else ""
        lines.append(f"- {outcome['state']}: `{outcome['test']}`{seconds}")
        lines += [f"  - {name}: {value}" for name, value in outcome.get("found", {}).items()]
        if outcome["state"] == "failed":
            lines += ["", "```", outcome["text"][-TAIL:], "```", ""]
        elif outcome["state"] == "skipped":
            lines.append(f"  - {outcome['text']}")
    return lines or ["no test ran"]


def report(code: int, outcomes: list[Outcome]) -> str:
    """The whole page."""
    states = ("passed", "failed", "unfinished", "skipped")
    counts = ", ".join(f"{sum(outcome['state'] == state for outcome in outcomes)} {state}" for state in states)
    lines = ["# mac-check", "", *machine(), "", f"{counts}; pytest's exit code {code}", "", *described(outcomes)]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("mac-check.md"), help="report file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        code, outcomes = run(["-m", "macos", "tests"], Path(scratch))
    with atomic_file(options.out) as temporary:
        temporary.write_text(report(code, outcomes), encoding="utf-8")
    print(f"wrote {options.out.resolve()}: attach it to an issue", file=sys.stderr)
    return 1 if any(outcome["state"] in ("failed", "unfinished") for outcome in outcomes) else code


if __name__ == "__main__":
    sys.exit(main())
