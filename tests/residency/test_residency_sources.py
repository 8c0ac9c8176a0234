"""Plans, power counters and traces: parsed from text in the documented formats, malformed text included."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from ane.residency import plan, signals
from ane.residency.signals import Interval, PowerSample
from mlxkd.errors import UserError

NE, CPU, GPU = (f"ML{d}ComputeDevice" for d in ("NeuralEngine", "CPU", "GPU"))


def entry(name: str, device: str | None, weight: float | None, op: str = "ios18.conv") -> dict[str, Any]:
    return {"op": op, "name": name, "device": device, "supported": [CPU, GPU, NE], "weight": weight}


ENTRIES = [
    entry("a", NE, 0.6),
    entry("b", CPU, 0.2),
    entry("c", NE, 0.2),
    entry("d", None, None),
    entry("e", CPU, None),
]
PLAN = json.dumps({"operations": ENTRIES})


def test_a_plan_weighs_by_its_own_costs() -> None:
    found = plan.parse("compiling...\n" + PLAN, "p", "main")
    assert [o.op for o in found.ops] == ["conv"] * 4
    assert found.share == pytest.approx(0.8) and found.missing is None
    assert found.ops[0].supported == ("CPU", "GPU", "ANE")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "the plan was not readable: IndexError"),
        ("{", "the plan was not readable: JSONDecodeError"),
        ("[]", "the plan was not readable: TypeError"),
        ('{"operations": [{"op": "conv"}]}', "the plan was not readable: KeyError"),
        (json.dumps({"operations": [entry("a", "MLQuantumDevice", 0.1)]}), "KeyError 'MLQuantumDevice'"),
        (json.dumps({"operations": [entry("a", NE, 7.0)]}), "weight 7.0 of a"),
        ('{"error": "ANECCompile() FAILED"}', "ANECCompile() FAILED"),
    ],
)
def test_malformed_plans_are_missing_with_a_reason(text: str, reason: str) -> None:
    found = plan.parse(text, "p", "main")
    assert found.share is None and reason in (found.missing or "")


def test_disagreements_name_the_operation() -> None:
    found = plan.parse(PLAN, "p", "main")
    predicted = {"a": "ANE", "b": "ANE", "c": "CPU", "e": "fails"}
    assert plan.disagreements(predicted, found) == [("b", "ANE", "CPU"), ("c", "CPU", "ANE")]


@pytest.mark.skipif(sys.platform == "darwin", reason="says what happens elsewhere")
def test_elsewhere_the_plan_says_what_it_needs() -> None:
    found = plan.plan("p.mlpackage", "main")
    assert (found.share, found.missing) == (None, "not available here: needs macOS")


POWERMETRICS = """Machine model: Mac16,1
OS version: 25B78

*** Sampled system activity (Tue Jan 13 10:00:01 2026 +0100) (1003.21ms elapsed) ***

**** Processor usage ****

CPU Power: 1234 mW
GPU Power: 24 mW
ANE Power: 2463 mW
Combined Power (CPU + GPU + ANE): 3721 mW

*** Sampled system activity (Tue Jan 13 10:00:02 2026 +0100) (996.79ms elapsed) ***

CPU Power: 200 mW
ANE Power: 0 mW
"""


def test_powermetrics() -> None:
    first, second = signals.parse_powermetrics(POWERMETRICS)
    assert first == PowerSample(1.00321, 2.463, 1.234, 0.024, 3.721)
    assert (second.ane, second.gpu, second.system) == (0.0, None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no power sample"),
        ("powermetrics must be invoked as the superuser\n", "no power sample"),
        ("*** Sampled system activity (Tue) ***\nANE Power: 5 mW\n", "no elapsed time"),
        ("*** Sampled system activity (Tue) (1000ms elapsed) ***\nANE Power: many mW\n", "no power sample"),
    ],
)
def test_malformed_powermetrics(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        signals.parse_powermetrics(text)


MACMON = (
    '{"timestamp":"2026-01-13T10:00:01Z","temp":{"cpu_temp_avg":41.2},"all_power":5.1,"ane_power":1.5,'
    '"cpu_power":3.0,"gpu_power":0.6,"ram_power":0.3,"sys_power":9.8}\n'
)


def test_macmon_tolerates_a_cut_last_line_only() -> None:
    samples = signals.parse_macmon(MACMON * 2 + MACMON[:40], interval=0.5)
    assert samples == [PowerSample(0.5, 1.5, 3.0, 0.6, 9.8)] * 2
    with pytest.raises(UserError, match="line 1: not a macmon sample"):
        signals.parse_macmon(MACMON[:40] + "\n" + MACMON)
    with pytest.raises(UserError, match="-1 is no power"):
        signals.parse_macmon('{"ane_power": -1}')
    with pytest.raises(UserError, match="no power sample"):
        signals.parse_macmon("\n")


XCTRACE = """<?xml version="1.0"?>
<trace-query-result><node xpath='//trace-toc[1]/run[1]/data[1]/table[3]'>
<schema name="ane-hw-intervals"><col><mnemonic>start</mnemonic><name>Start</name></col></schema>
<row><start-time id="1" fmt="00:01.000">1000000000</start-time><duration id="2" fmt="2 ms">2000000</duration>
<string id="3" fmt="Neural Engine Prediction">Neural Engine Prediction</string></row>
<row><start-time id="4" fmt="00:01.003">1003000000</start-time><duration ref="2"/><string ref="3"/></row>
</node></trace-query-result>"""


def test_xctrace_resolves_references() -> None:
    found = signals.parse_xctrace(XCTRACE)
    assert found == [
        Interval(1.0, 0.002, "Neural Engine Prediction"),
        Interval(1.003, 0.002, "Neural Engine Prediction"),
    ]
    assert signals.busy_share(found, 1.0, 1.01) == pytest.approx(0.4)
    assert signals.busy_share([Interval(0, 2, ""), Interval(1, 2, "")], 0, 4) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (XCTRACE[:300], "not an xctrace export"),
        (XCTRACE.replace("ane-hw-intervals", "gpu"), r"the export holds \['gpu'\], not ane-hw-intervals"),
        ("<trace-query-result/>", "no table"),
        (XCTRACE.replace('ref="2"', 'ref="9"'), "row 2: a row without a readable start"),
        (XCTRACE.replace(">1000000000<", ">soon<"), "row 1: a row without a readable start"),
    ],
)
def test_malformed_xctrace(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        signals.parse_xctrace(text)


def test_energy_takes_idle_off_and_treats_a_dead_counter_as_missing() -> None:
    load, idle = [PowerSample(1.0, ane=2.0, system=8.0)] * 12, [PowerSample(1.0, ane=0.5, system=5.0)] * 4
    assert signals.energy(load, idle, "ane") == (pytest.approx(18.0), "")
    assert signals.energy(load, idle, "system")[0] == pytest.approx(36.0)
    dead = [PowerSample(1.0, ane=0.0)] * 12
    assert signals.energy(dead, dead, "ane") == (
        None,
        "the ane counter reads zero under load: it stands still on this system",
    )
    assert signals.energy(load[:5], idle, "ane")[1] == "a window of 5.0 s; 10 s are needed"
    assert signals.energy(load, idle, "gpu")[0] is None


def test_paired_speedup_is_a_ratio_of_medians() -> None:
    assert signals.paired_speedup([9.0, 10.0, 50.0], [5.0, 4.0, 6.0]) == 2.0
    with pytest.raises(ValueError, match="pairs are needed"):
        signals.paired_speedup([1.0], [1.0])
