"""scripts/mac-check's report, from real pytest runs of tests that pass, fail, skip, and kill their process."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
TESTS = """
import os, signal
import pytest

@pytest.mark.parametrize("units", ["a", "b c"])
def test_measures(units, record_property):
    record_property("kl_max", 0.25)

def test_dies():
    os.kill(os.getpid(), signal.SIGKILL)

def test_dies_not():
    assert 1 + 1 == 3, "arithmetic"

@pytest.mark.skip(reason="needs a moon")
def test_waits():
    pass
"""


@pytest.fixture
def mac_report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("mac_report", SCRIPTS / "mac_report.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_crash_loses_only_its_own_test(mac_report: ModuleType, tmp_path: Path) -> None:
    """Core ML aborts the process where it should raise (coremltools 2757, 2758); the rest must still be told."""
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "scratch").mkdir()
    code, outcomes = mac_report.run([str(tmp_path / "test_it.py"), "--rootdir", str(tmp_path)], tmp_path / "scratch")
    assert code == 1
    assert [(o["test"].partition("::")[2], o["state"]) for o in outcomes] == [
        ("test_measures[a]", "passed"),
        ("test_measures[b c]", "passed"),
        ("test_dies", "unfinished"),
        ("test_dies_not", "failed"),
        ("test_waits", "skipped"),
    ]
    page = mac_report.report(code, outcomes)
    for line in (
        "2 passed, 1 failed, 1 unfinished, 1 skipped; pytest's exit code 1",
        "  - kl_max: 0.25",
        "AssertionError: arithmetic",
        "  - Skipped: needs a moon",
        "- versions: python",
    ):
        assert line in page, page


@pytest.mark.skipif("sys.platform == 'darwin'")
def test_elsewhere_it_says_what_it_needs() -> None:
    done = subprocess.run([str(SCRIPTS / "mac-check")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "mac-check needs macOS on Apple silicon; this is" in done.stderr
