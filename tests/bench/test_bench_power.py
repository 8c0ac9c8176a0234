"""The power meter against a program that prints macmon's lines with known powers."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from bench import power
from bench.power import PowerMeter

FAKE = """#!/bin/sh
# Prints macmon's format: {watts} W of system power, a line each interval, faster than real time.
i=0
while [ $i -lt {lines} ]; do
  echo '{{"ane_power": 0.1, "cpu_power": 1.0, "gpu_power": 0.2, "sys_power": {watts}}}'
  i=$((i+1))
done
sleep 30
"""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, watts: float, lines: int) -> None:
    tool = folder / "macmon"
    tool.write_text(FAKE.format(watts=watts, lines=lines))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_energy_is_the_integral_above_idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, watts=5.0, lines=8)
    meter = PowerMeter(idle_seconds=1.0)
    with meter:
        meter._process.terminate()
        meter._process.wait()
        install(tmp_path, monkeypatch, watts=8.0, lines=24)
        meter._start()
        time.sleep(1.0)
    joules, reason = meter.joules()
    assert joules == pytest.approx((8.0 - 5.0) * 24 * power.INTERVAL) and reason == ""


def test_a_short_stretch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, watts=5.0, lines=2)
    with PowerMeter(idle_seconds=0.5) as meter:
        time.sleep(0.5)
    assert meter.joules()[0] is None and "10 s are needed" in meter.joules()[1]


def test_without_the_tool_it_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with PowerMeter() as meter:
        pass
    assert meter.joules() == (None, "not available here: needs macOS and macmon")
