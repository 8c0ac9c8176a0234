"""Running coremltools' tests in a process of their own, and replaying what was stored."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ane.mil.conformance import case, check
from ane.mil.conformance.plugin import SUITE
from mlxkd.errors import UserError

SAMPLE = Path(__file__).with_name("sample.json")
# Makes coremltools parametrise its tests over ML programs in both precisions.
SETTINGS = {"PYMIL_TEST_TARGETS": "mlprogram", "INCLUDE_MIL_FP32_UNIT_TESTS": "1"}


def version() -> str:
    """The installed version of coremltools, whose suite this is."""
    return importlib.metadata.version("coremltools")


def tests_folder() -> Path:
    """Where the suite is installed.

    Raises:
        UserError: coremltools is missing or came without its tests.
    """
    import importlib.util

    spec = importlib.util.find_spec("coremltools")
    if spec is None or spec.origin is None:
        raise UserError("coremltools is not installed", hint="pip install 'coremltools>=9,<10'")
    folder = Path(spec.origin).parent.joinpath(*SUITE.split(".")[1:])
    if not folder.is_dir():
        raise UserError(f"coremltools {version()} came without its tests", where=str(folder))
    return folder


def run(
    tests: Iterable[str] | None = None,
    *,
    results: Path,
    store: Path | None = None,
    seconds: float | None = None,
) -> int:
    """Run the suite, or some of its tests by their short ids, appending records to ``results``.

    Returns:
        pytest's exit code: 0 when everything that was compared agreed.
    """
    folder = tests_folder()
    chosen = [str(folder / test) for test in tests] if tests is not None else [str(folder)]
    command = [sys.executable, "-m", "pytest", "-p", "ane.mil.conformance.plugin", "-p", "no:cacheprovider"]
    command += ["-q", "--no-header", "--tb=line", "-W", "ignore", f"--rootdir={folder}", "-c", os.devnull]
    command += [f"--mil-results={results}"]
    command += [f"--mil-store={store}"] if store is not None else []
    command += [f"--mil-seconds={seconds}"] if seconds is not None else []
    # Our own root on the path, so that the child finds the plugin wherever it is started.
    root = str(Path(__file__).parents[3])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, **SETTINGS, "PYTHONPATH": path}
    # Its chatter is not our output: stdout may carry somebody's JSON.
    done = subprocess.run([*command, *chosen], env=environment, stdout=sys.stderr.fileno(), check=False)
    return done.returncode


def read_results(path: Path) -> list[dict[str, Any]]:
    """Records of a results file; of several for one case the last counts."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return list({found["key"]: found for found in map(json.loads, lines)}.values())


def replay(root: Path) -> Iterator[dict[str, Any]]:
    """Run every case stored under ``root``."""
    return (check.record(folder) for folder in case.stored(root))


def sample(name: str = "every_run") -> list[str]:
    """Short ids of the tests chosen for "every_run" (each operation once) or as "strata" (each version, precision
    and shape class of each operation too)."""
    return json.loads(SAMPLE.read_text(encoding="utf-8"))[name]
