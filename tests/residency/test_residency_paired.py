"""Paired latency under a scripted clock: the medians are those of the script, and warm-up is left out."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from ane.residency import paired
from mlxkd.errors import UserError


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class ScriptedSession:
    """Takes a scripted time for each step, the first ones far longer."""

    max_context = 8

    def __init__(self, clock: Clock, seconds: float):
        self.clock, self.seconds, self.length, self.steps = clock, seconds, 0, 0

    @property
    def lengths(self) -> np.ndarray:
        return np.array([self.length])

    def rewind(self, lengths: list[int]) -> None:
        self.length = lengths[0]

    def extend(self, tokens: np.ndarray) -> np.ndarray:
        assert tokens.shape == (1, 1) and self.length < self.max_context
        self.length, self.steps = self.length + 1, self.steps + 1
        self.clock.now += self.seconds * (100 if self.steps <= paired.WARM_UP else 1)
        return np.zeros((1, 1, 4))


def test_medians_of_the_script() -> None:
    clock = Clock()
    seconds = {"cpu_only": 0.004, "cpu_and_ne": 0.001}
    opened: list[tuple[str, str]] = []

    def open_session(bundle: Path, backend: str, *, units: str) -> ScriptedSession:
        opened.append((backend, units))
        return ScriptedSession(clock, seconds[units])

    found = paired.measure(Path("b"), pairs=21, open_session=open_session, clock=clock)
    assert opened == [("coreml", "cpu_only"), ("coreml", "cpu_and_ne")]
    assert len(found.cpu_only) == len(found.with_ane) == 21
    assert np.allclose(found.cpu_only, 0.004) and np.allclose(found.with_ane, 0.001)
    assert found.speedup == pytest.approx(4.0)
    assert "4.00 ms on the CPU alone, 1.00 ms" in str(found) and "21 pairs" in str(found)


@pytest.mark.skipif("sys.platform == 'darwin'")
def test_elsewhere_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        paired.measure(tmp_path, pairs=3)
    assert sys.platform != "darwin"
