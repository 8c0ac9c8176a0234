"""A pytest plugin for coremltools' operation tests: our runtime answers where Core ML would.

    pytest -p ane.mil.conformance.plugin --pyargs coremltools.converters.mil.mil.ops.tests --mil-results out.jsonl

Each comparison appends one record to the results; a model that disagrees fails its test. With ``--mil-store`` the
case is also kept. With ``--mil-seconds`` tests run round-robin over (test function, precision, opset) until the time
is up, so that an unfinished run covers everything evenly; the next one goes on where its results end.
"""

from __future__ import annotations

import gc
import json
import random
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ane.mil.conformance import case as cases
from ane.mil.conformance import check

SUITE = "coremltools.converters.mil.mil.ops.tests"
# coremltools collects garbage in every conversion, which takes most of the time where much is alive (the suite's own
# objects, torch's, pytest's); what has survived so many tests is therefore set aside.
FREEZE_EVERY = 50


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mil")
    group.addoption("--mil-results", type=Path, help="append one JSON record per comparison to this file")
    group.addoption("--mil-store", type=Path, help="keep every case in this folder")
    group.addoption("--mil-seconds", type=float, help="stop after this long, having gone round-robin")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Session(config), "mil-conformance")


class Token:
    """Stands for a state of Core ML; remembers the predictions made with it."""

    def __init__(self) -> None:
        self.steps: list[cases.Step] = []


class Session:
    """One run of the suite."""

    def __init__(self, config: pytest.Config):
        self.results: Path | None = config.getoption("--mil-results")
        self.store: Path | None = config.getoption("--mil-store")
        self.seconds: float | None = config.getoption("--mil-seconds")
        self.begin = time.monotonic()
        self.test, self.calls, self.tests = "", 0, 0
        self.patch = pytest.MonkeyPatch()
        self._install()

    def _install(self) -> None:
        """Replace the comparison, which does nothing off macOS, and the state, which cannot be made there."""
        from coremltools.converters.mil import testing_utils
        from coremltools.converters.mil.mil.ops.tests import testing_utils as op_utils
        from coremltools.models import MLModel

        for module in (testing_utils, op_utils):
            self.patch.setattr(module, "compare_backend", self.compare)
        self.patch.setattr(MLModel, "make_state", lambda model: Token())

    def pytest_unconfigure(self) -> None:
        gc.unfreeze()
        self.patch.undo()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for file, count in Counter(short(item.nodeid).partition("::")[0] for item in items).items():
            self._write({"key": file, "test": file, "status": "collected", "count": count})
        if self.seconds is None:
            return
        done = set()
        if self.results is not None and self.results.exists():
            lines = self.results.read_text(encoding="utf-8").splitlines()
            done = {json.loads(line)["test"] for line in lines}
        items[:] = [item for item in round_robin(items) if short(item.nodeid) not in done]

    @pytest.hookimpl(tryfirst=True)  # before a mark can skip the test, so that it is noted all the same
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self.seconds is not None and time.monotonic() - self.begin > self.seconds:
            item.session.shouldstop = f"{self.seconds:g} s are over"
            pytest.skip("out of time")
        self.test, self.calls = short(item.nodeid), 0
        if self.tests % FREEZE_EVERY == 0:
            gc.collect()
            gc.freeze()
        self.tests += 1

    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        if self.test == short(item.nodeid) and not self.calls:
            self._write({"key": self.test, "test": self.test, "status": "nothing"})

    def compare(
        self,
        mlmodel: Any,
        input_key_values: dict[str, Any],
        expected_outputs: dict[str, Any] | None,
        dtype: str = "fp32",
        atol: float = 1e-4,
        rtol: float = 1e-5,
        also_compare_shapes: bool = True,
        state: Token | None = None,
        allow_mismatch_ratio: float = 0.0,
    ) -> None:
        """Stands in for coremltools' ``compare_backend``: same arguments, fails on disagreement."""
        if expected_outputs is None or mlmodel.get_spec().WhichOneof("Type") != "mlProgram":
            return
        token = state or Token()
        token.steps.append((numeric(input_key_values), numeric(expected_outputs)))
        if len(token.steps) == 1:
            self.calls += 1
        facts = cases.Facts(self.test, self.calls - 1, dtype, float(atol), float(rtol))
        if self.store is not None:
            self._judge(cases.save(self.store, facts, tuple(token.steps), mlmodel.save))
            return
        with tempfile.TemporaryDirectory() as folder:
            self._judge(cases.save(Path(folder), facts, tuple(token.steps), mlmodel.save))

    def _judge(self, folder: Path) -> None:
        found = check.record(folder)
        self._write(found)
        if found["status"] == "failed":
            pytest.fail(f"{self.test}: {found['detail']}")

    def _write(self, record: dict[str, Any]) -> None:
        if self.results is not None:
            with self.results.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")


def numeric(values: dict[str, Any]) -> cases.Arrays:
    """The values as arrays of numbers; a test that compares anything else is skipped and says so."""
    arrays = {name: np.asarray(value) for name, value in values.items()}
    odd = [name for name, array in arrays.items() if array.dtype.kind not in "biuf"]
    if odd:
        pytest.skip(f"no numbers to compare in {', '.join(odd)}")
    return arrays


def short(nodeid: str) -> str:
    """A test's id without the folder coremltools is installed in."""
    return nodeid.replace("\\", "/").rpartition("mil/ops/tests/")[2] or nodeid


def group_of(item: pytest.Item) -> tuple[str, str]:
    """Test function, with the operation where it tests many (its ``mode``), and the backend it runs for."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    return item.nodeid.partition("[")[0] + str(parameters.get("mode", "")), str(parameters.get("backend", ""))


def round_robin(items: list[pytest.Item], seed: int = 0) -> list[pytest.Item]:
    """One item of each group in turn, those in fp32 first and those that build for no backend last.

    Inside a group the order is shuffled by ``seed``.
    """
    groups: dict[tuple[str, str], list[pytest.Item]] = defaultdict(list)
    for item in items:
        groups[group_of(item)].append(item)
    for name, members in groups.items():
        random.Random(f"{seed}{name}").shuffle(members)
    turns = [(turn, name, item) for name, members in groups.items() for turn, item in enumerate(members)]
    return [item for _, _, item in sorted(turns, key=lambda t: (t[0], _urgency(t[1][1]), t[1]))]


def _urgency(backend: str) -> int:
    return 0 if "fp32" in backend else 1 if backend else 2
