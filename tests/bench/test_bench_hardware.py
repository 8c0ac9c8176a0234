"""The hardware profile's parsers on text in the formats of the macOS tools, and the profile of this machine."""

from __future__ import annotations

import platform

import pytest

from bench import hardware

BATTERY = (
    "Now drawing from 'Battery Power'\n -InternalBattery-0 (id=1)\t85%; discharging; 5:10 remaining present: true\n"
)
AC = "Now drawing from 'AC Power'\n -InternalBattery-0 (id=1)\t100%; charged; 0:00 remaining present: true\n"
PMSET = "System-wide power settings:\nCurrently in use:\n standby              1\n lowpowermode         {}\n womp 1\n"
COOL = "Note: No thermal warning level has been recorded\nNote: No performance warning level has been recorded\n"
DISPLAYS = '{"SPDisplaysDataType": [{"_name": "Apple M4", "sppci_cores": "10", "sppci_model": "Apple M4"}]}'


@pytest.mark.parametrize(("text", "source"), [(BATTERY, "battery"), (AC, "AC"), ("", None), ("garbage", None)])
def test_power_source(text: str, source: str | None) -> None:
    assert hardware.parse_battery(text) == source


@pytest.mark.parametrize(
    ("text", "mode"), [(PMSET.format(0), False), (PMSET.format(1), True), (" powermode 2\n", False), ("", None)]
)
def test_low_power(text: str, mode: bool | None) -> None:
    assert hardware.parse_low_power(text) is mode


@pytest.mark.parametrize(
    ("text", "thermal"),
    [
        (COOL, "nominal"),
        ("CPU_Scheduler_Limit \t= 100\nCPU_Available_CPUs \t= 8\nCPU_Speed_Limit \t= 100\n", "nominal"),
        ("CPU_Speed_Limit \t= 62\n", "CPU limited to 62 %"),
        ("2026-01-01 thermal warning level = 2\n", "warning level 2"),
        ("", None),
    ],
)
def test_thermal(text: str, thermal: str | None) -> None:
    assert hardware.parse_thermal(text) == thermal


@pytest.mark.parametrize(
    ("text", "cores"), [(DISPLAYS, 10), ("{}", None), ("", None), ('{"SPDisplaysDataType": []}', None)]
)
def test_gpu_cores(text: str, cores: int | None) -> None:
    assert hardware.parse_gpu_cores(text) == cores


@pytest.mark.parametrize(("chip", "cores"), [("Apple M4 Max", 16), ("Apple M3 Ultra", 32), ("AMD EPYC", None)])
def test_neural_engine_cores(chip: str, cores: int | None) -> None:
    assert hardware.ane_cores(chip) == cores


def test_problems_in_words() -> None:
    found = hardware.judge({"power_source": "battery", "low_power": True, "thermal": "warning level 1", "load": 1.2})
    assert found[:2] == ["on battery", "low-power mode is on"]
    assert found[2:] == ["thermal state: warning level 1", "the machine is busy (load 1.2 per core)"]
    assert hardware.judge({"power_source": "AC", "low_power": False, "thermal": "nominal", "load": 0.1}) == []


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_the_profile_of_this_machine_is_stable() -> None:
    first, second = hardware.profile(), hardware.profile()
    assert first.key == second.key and len(first.key) == 12
    assert first.ane_cores is None and first.gpu_cores is None
    assert hardware.preflight().load is not None
