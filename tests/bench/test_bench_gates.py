"""Gates: three outcomes, stated limits, error rates on simulated builds, outputs that machines read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from bench import outputs, simulation
from bench.gates import THRESHOLDS, Evidence, Gate, Thresholds, evaluate, overall, thresholds
from mlxkd.errors import UserError

SPEED = Thresholds(regression={"tpot_ms": {"p50": 1.05}})


def sides(change: float, noise: float = 0.01, rounds: int = 10) -> Evidence:
    rng = np.random.default_rng(0)
    baseline = [rng.lognormal(0, noise, 20) for _ in range(rounds)]
    candidate = [(1 + change) * rng.lognormal(rng.normal(0, noise), noise, 20) for _ in range(rounds)]
    return Evidence({"tpot_ms": candidate}, {"tpot_ms": baseline})


def only(evidence: Evidence, limits: Thresholds) -> Gate:
    return evaluate(evidence, limits)[0]


def test_three_outcomes() -> None:
    assert only(sides(0.0), SPEED).outcome == "pass"
    assert only(sides(0.15), SPEED).outcome == "fail"
    close = only(sides(0.08, noise=0.06), SPEED)
    assert close.outcome == "cannot tell" and close.more_rounds is not None and close.more_rounds > 1
    assert "more rounds would settle it" in outputs.sentence(close)


def test_an_improvement_passes() -> None:
    gate = only(sides(-0.2), SPEED)
    assert gate.outcome == "pass" and gate.value is not None and gate.value < 0.85


def test_a_gate_below_the_noise_floor_is_refused_not_passed() -> None:
    evidence = sides(0.0)
    noisy = Evidence(evidence.candidate, evidence.baseline, noise={"tpot_ms p50": 0.2})
    gate = only(noisy, SPEED)
    assert gate.outcome == "cannot tell"
    assert gate.note == "refused: calibration says changes below 17.1 % are noise here"


def test_the_ceiling_on_steps_shows_tokens_and_overhead_beside() -> None:
    """25 steps are a gate, 25 tokens cannot be one: real calls alone need 31 at the median."""
    limits = Thresholds(ceiling={"ttfa_steps": {"p95": 25}})
    rounds = {"ttfa_steps": [[20.0] * 9 + [24.0]] * 3, "ttfa_tokens": [[40.0] * 10] * 3}
    gate = only(Evidence(rounds | {"ttfa_overhead_tokens": [[7.0] * 10] * 3}), limits)
    assert gate.outcome == "pass" and gate.limit == pytest.approx(25)
    assert gate.note == "beside it, p95: 40 tokens; 7 tokens before the call opens"
    never = only(Evidence(rounds | {"ttfa_overhead_tokens": [[math.inf] * 10] * 3}), limits)
    assert "tokens before the call opens: never reached" in never.note
    assert "tokens before the call opens: not in the report" in only(Evidence(rounds), limits).note
    assert "40 tokens" in outputs.sentence(gate) and "40 tokens" in outputs.document([gate], title="t").markdown()


def test_almost_all_of_a_program_is_not_all_of_it() -> None:
    gate = evaluate(Evidence({}, residency=(0.99996, None)), Thresholds())[0]
    assert outputs.shown(gate, gate.value) == "99.99 %" and outputs.shown(gate, 1.0) == "100 %"


def test_stored_figures_need_the_spread_between_days() -> None:
    evidence = sides(0.15)
    stored = Evidence(evidence.candidate, evidence.baseline, paired=False)
    assert only(stored, SPEED).outcome == "cannot tell"
    assert "five days of calibration" in only(stored, SPEED).note
    quiet = Evidence(evidence.candidate, evidence.baseline, paired=False, day_sigma={"tpot_ms p50": 0.005})
    assert only(quiet, SPEED).outcome == "fail"
    wild = Evidence(evidence.candidate, evidence.baseline, paired=False, day_sigma={"tpot_ms p50": 0.10})
    assert only(wild, SPEED).outcome == "cannot tell"


def test_missing_series_is_not_available_and_never_a_number() -> None:
    gate = only(Evidence({}, {}), SPEED)
    assert (gate.outcome, gate.value, gate.note) == ("not available", None, "the candidate has no tpot_ms")
    assert overall([gate]) == "not available"


@pytest.mark.parametrize(("steps", "outcome"), [(25.0, "pass"), (26.0, "fail"), (12.0, "pass"), (math.inf, "fail")])
def test_first_call_ceiling_is_at_most(steps: float, outcome: str) -> None:
    limits = Thresholds(ceiling={"ttfa_steps": {"p95": 25}})
    gate = only(Evidence({"ttfa_steps": [[10.0] * 10 + [steps] * 10] * 5}), limits)
    assert gate.outcome == outcome


@pytest.mark.parametrize(
    ("share", "before", "outcomes"),
    [
        (0.95, 0.97, ["pass", "pass"]),
        (0.79, None, ["fail"]),
        (0.85, 0.97, ["pass", "fail"]),
        (0.80, 0.90, ["pass"] * 2),
    ],
)
def test_residency_floor_and_drop(share: float, before: float | None, outcomes: list[str]) -> None:
    gates = evaluate(Evidence({}, residency=(share, before)), Thresholds())
    assert [g.outcome for g in gates] == outcomes


def test_quality_is_compared_case_by_case() -> None:
    limits = Thresholds(quality={"call_exact": 0.02})
    before = [1.0] * 900 + [0.0] * 100

    def gate(after: list[float]) -> Gate:
        return only(
            Evidence({}, candidate_quality={"call_exact": after}, baseline_quality={"call_exact": before}), limits
        )

    assert gate(before).outcome == "pass"
    assert gate([0.0] * 80 + before[80:]).outcome == "fail"
    assert gate(before[:500]).outcome == "cannot tell"
    assert "500 cases against 1000" in gate(before[:500]).note


def test_thresholds_per_hardware(tmp_path: Path) -> None:
    assert thresholds("anything").regression["tpot_ms"] == {"p50": 1.05, "p95": 1.05}
    own = tmp_path / "t.yaml"
    own.write_text("default: {residency_floor: 0.8}\nhardware: {'Apple M1*': {residency_floor: 0.7}}\n")
    assert thresholds("Apple M1 Pro", own).residency_floor == 0.7
    assert thresholds("Apple M4", own).residency_floor == 0.8
    own.write_text("default: {residency_flor: 0.8}\n")
    with pytest.raises(UserError, match="not a thresholds file"):
        thresholds("x", own)
    assert THRESHOLDS.exists()


def test_false_alarms_and_detection_on_simulated_builds() -> None:
    """The full 1,000 builds are in the slow test and in `scripts/measure gate-statistics`."""
    limits = thresholds("default")
    assert simulation.rate("fail", 25, 0.0, limits) == 0
    assert simulation.rate("fail", 25, 0.10, limits) >= 0.95


@pytest.mark.slow
def test_false_alarms_and_detection_on_a_thousand_builds() -> None:
    limits = thresholds("default")
    assert simulation.rate("fail", 1000, 0.0, limits) <= 0.01
    assert simulation.rate("fail", 1000, 0.10, limits) >= 0.95


GATES = [
    Gate("tpot_ms p50", "fail", 1.05, "ratio", 1.12, 1.08, 1.16),
    Gate("ttft_ms p50", "cannot tell", 1.05, "ratio", 1.04, 0.99, 1.09, more_rounds=12),
    Gate("joules", "not available", 1.05, "ratio", note="not available here: needs macOS"),
    Gate("ane residency", "pass", 0.8, "share", 0.97),
    Gate("ttfa_steps p95", "fail", 25, "steps", math.inf),
]


def test_outputs() -> None:
    suite = ElementTree.fromstring(outputs.junit(GATES))
    assert {k: suite.get(k) for k in ("tests", "failures", "errors", "skipped")} == {
        "tests": "5", "failures": "2", "errors": "1", "skipped": "1"
    }  # fmt: skip
    message = suite.find("testcase/failure").get("message")  # type: ignore[union-attr]
    assert message == "fail; +12.0 % (limit +5.0 %); between +8.0 % and +16.0 %"
    tree = json.loads(json.dumps(outputs.to_json(GATES), allow_nan=False))
    assert tree["outcome"] == "fail" and tree["gates"][4]["value"] == "inf"
    text = outputs.document(GATES, title="t").markdown()
    assert "❌ Over the limit: tpot_ms p50, ttfa_steps p95." in text
    assert "not available here: needs macOS" in text
