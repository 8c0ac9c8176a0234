"""Reports, baselines and calibrations: exact identity, nothing overwritten, every refusal with its reasons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from bench import baselines, calibration, results
from bench.gates import Thresholds
from bench.hardware import Conditions, Hardware
from bench.results import Report, Round, Target, Workload
from mlxkd.errors import UserError

MACHINE = Hardware(chip="Apple M4", cores=10, memory_gb=16, system="macOS 15.1", power_source="AC", low_power=False)


def report(**changes: Any) -> Report:
    rng = np.random.default_rng(0)
    rounds = [
        Round(target=t, index=i, samples={"tpot_ms": list(rng.lognormal(0, 0.01, 20)), "ttfa_steps": [9.0, None]},
              device="Apple M4 GPU")
        for i in range(10) for t in ("new",)
    ]  # fmt: skip
    fields: dict[str, Any] = {
        "kind": "speed", "created": "2026-01-02T03:04:05+00:00", "hardware": MACHINE,
        "workload": Workload(name="interactive", hash="abc"),
        "targets": [Target(name="new", kind="mlx", location="student", backend="mlx gpu", artefact="f00")],
        "rounds": rounds,
    }  # fmt: skip
    return Report(**(fields | changes))


@pytest.fixture(autouse=True)
def clean_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bless from a folder that is no repository: provenance is unknown there, never dirty."""
    monkeypatch.chdir(tmp_path)


def test_round_trip_and_published_schema(tmp_path: Path) -> None:
    path = report().save(tmp_path / "r.json")
    assert results.load(path) == report()
    published = json.loads(results.SCHEMA_FILE.read_text())
    assert published == results.schema()
    jsonschema.validate(json.loads(path.read_text()), published)


def test_censored_samples_are_infinite_in_quantiles() -> None:
    metric = report().metric("new", "ttfa_steps")
    assert (metric.censored, metric.p95, metric.n, metric.unit) == (10, np.inf, 20, "steps")
    missing = report().metric("new", "joules_per_token")
    assert missing.value is None and missing.note


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not a bench report: Invalid JSON"), ('{"kind": "x"}', "not a bench report: .* at kind")],
)
def test_malformed_reports(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        results.load(path)
    with pytest.raises(UserError, match="cannot read the report"):
        results.load(tmp_path / "none.json")


def test_bless_appends_and_find_takes_the_newest(tmp_path: Path) -> None:
    first = baselines.bless(report(), "first release", folder=tmp_path / "b")
    bytes_before = first.read_bytes()
    second = baselines.bless(report(created="2026-02-02T00:00:00+00:00"), "faster", folder=tmp_path / "b")
    assert first != second and first.read_bytes() == bytes_before
    assert baselines.find(report(), folder=tmp_path / "b").path == second
    assert [f.baseline.reason for f in baselines.history(report(), folder=tmp_path / "b")] == [
        "first release",
        "faster",
    ]


def test_bless_names_every_fault(tmp_path: Path) -> None:
    hot = [r.model_copy(update={"conditions": Conditions(problems=["on battery"])}) for r in report().rounds[:4]]
    with pytest.raises(UserError) as caught:
        baselines.bless(report(rounds=hot), " ", folder=tmp_path)
    for part in ("no reason given", "too few rounds: 4", "conditions were not nominal: on battery"):
        assert part in str(caught.value)
    with pytest.raises(UserError, match="uncommitted changes"):
        raise UserError("; ".join(baselines.faults(report(), "new", clean=False)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hardware": MACHINE.model_copy(update={"low_power": True})}, "low_power: True against False"),
        ({"hardware": MACHINE.model_copy(update={"system": "macOS 26"})}, "system: macOS 26 against macOS 15.1"),
        ({"workload": Workload(name="offline", hash="x")}, "workload: offline against interactive"),
        (
            {"targets": [Target(name="new", kind="mlx", location="s", backend="mlx cpu", artefact="1")]},
            "backend: mlx cpu against mlx gpu",
        ),
    ],
)
def test_another_identity_is_refused_unless_forced(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    folder = tmp_path / "b"
    with pytest.raises(UserError, match="no baseline yet"):
        baselines.find(report(), folder=folder)
    baselines.bless(report(), "first", folder=folder)
    with pytest.raises(UserError, match=f"differs in {reason}"):
        baselines.find(report(**changes), folder=folder)
    assert reason in baselines.find(report(**changes), folder=folder, force=True).differs[0]


def test_versions_are_provenance_not_identity() -> None:
    other = MACHINE.model_copy(update={"versions": {"mlx": "9"}, "thermal": "warning level 1"})
    assert other.key == MACHINE.key and not MACHINE.differences(other)


def test_calibration_measures_noise_and_says_what_it_refuses(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def noisy(target: str, i: int) -> Round:
        samples = {"tpot_ms": list(rng.lognormal(rng.normal(0, 0.10), 0.01, 20))}
        return Round(target=target, index=i, samples=samples, device="d")

    targets = [Target(name=n, kind="mlx", location="s", backend="mlx gpu") for n in ("a", "b")]
    trial = report(kind="calibration", targets=targets, rounds=[noisy(t, i) for i in range(10) for t in "ab"])
    limits = Thresholds(regression={"tpot_ms": {"p50": 1.05}})
    day = calibration.measure(trial, limits)
    (name, error, seen, needed, verdict) = calibration.rows(day, limits)[0]
    assert name == "tpot_ms p50" and 7 < error < 30  # sqrt(2) x 10 % within the spread of ten rounds
    assert seen > 5 and needed > 10 and verdict == f"refused below {needed} rounds"
    for date in range(5):
        calibration.add(tmp_path, MACHINE, day.model_copy(update={"created": f"2026-01-0{date + 1}T00:00:00"}))
    known = calibration.read(tmp_path, MACHINE)
    assert known.noise("abc") == day.error_per_round and known.day_sigma("abc") == {"tpot_ms p50": 0.0}
    assert known.noise("other workload") == {}
    with pytest.raises(UserError, match="not a calibration report"):
        calibration.measure(report(), limits)
