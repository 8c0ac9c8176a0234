"""The commands as a person types them, on a real model and a real bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click
import jsonschema
import pytest
from click.testing import CliRunner, Result

from bench import gating, results
from bench.cli import main

TINY = ["--requests", "2", "--max-tokens", "4"]


def bench(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def bundle(stories_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ane.convert.export import export
    from ane.convert.options import Options

    out = tmp_path_factory.mktemp("bundle") / "b"
    export(stories_model, out, Options(context=128, prefill=8))
    return out


@pytest.fixture(scope="module")
def measured(stories_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("speed") / "report.json"
    done = bench(
        "speed", stories_model, "--rounds", 1, *TINY, "-o", path, "--html", path.with_suffix(".html"), "--json"
    )
    assert done.exit_code == 0, done.output
    return path


def test_no_arguments_show_what_to_do_next() -> None:
    done = bench()
    assert done.exit_code == 0
    for name in main.commands:
        assert f"bench {name}" in done.output or name == "report"


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_help_ends_in_examples_that_parse(name: str) -> None:
    """Each example's options exist: click parses the line without running it."""
    command = main.commands[name]
    text = bench(name, "--help").output
    examples = [line.split()[1:] for line in text.split("Examples:")[1].splitlines() if line.strip()]
    assert examples and all(words[0] == name for words in examples)
    for words in examples:
        line = " ".join(words[1:])
        arguments = [w.strip('"') for w in line.replace('"first release"', "first").split()]
        with click.Context(command) as context:
            command.parse_args(context, arguments)


def test_speed_writes_a_valid_report_and_a_page(measured: Path) -> None:
    jsonschema.validate(json.loads(measured.read_text()), json.loads(results.SCHEMA_FILE.read_text()))
    page = measured.with_suffix(".html").read_text()
    assert "not available here: needs macOS and macmon" in page and "time per token" in page
    assert "No outlier is removed" in page


def test_a_missing_target_exits_2_with_a_hint(tmp_path: Path) -> None:
    done = bench("speed", tmp_path / "none", "--rounds", 1)
    assert done.exit_code == 2 and "no such model folder" in done.output and "hint:" in done.output
    assert bench("speed", tmp_path, "--batch-policy", "many").exit_code == 2


@pytest.mark.slow
def test_replay_tells_drift(measured: Path, stories_model: Path) -> None:
    done = bench("speed", stories_model, "--rounds", 1, *TINY, "--replay", measured)
    assert "100 % of the answers of" in done.output and "came again" in done.output


def test_bless_refuses_and_gate_needs_a_baseline(measured: Path, tmp_path: Path) -> None:
    refused = bench("bless", measured, "--reason", "x", "--baselines", tmp_path / "b")
    assert refused.exit_code == 2 and "too few rounds: 1, at least 10 are needed" in refused.output
    missing = bench("gate", measured, "--baselines", tmp_path / "b")
    assert missing.exit_code == 2 and "no baseline yet" in missing.output


def blessed(measured: Path, folder: Path) -> Path:
    """A baseline of the measured report: ten rounds under nominal conditions, whatever this machine was doing."""
    report = results.load(measured)
    first = report.rounds[0].model_copy(update={"conditions": results.Conditions()})
    report.rounds = [first.model_copy(update={"index": i}) for i in range(10)]
    path = report.save(folder / "ten.json")
    from bench import baselines

    return baselines.bless(results.load(path), "test", folder=folder / "b")


def test_gate_reruns_both_sides_and_tells(measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blessed(measured, tmp_path)
    loose = tmp_path / "loose.yaml"
    loose.write_text("default: {looks: 1, regression: {tpot_ms: {p50: 50.0}}}\n")
    done = bench("gate", measured, "--baselines", tmp_path / "b", "--rounds", 3, "--thresholds", loose, "--json",
                 "--junit", tmp_path / "j.xml")  # fmt: skip
    assert done.exit_code == 0, done.output
    tree = json.loads(done.output[done.output.index("{") :])
    assert tree["outcome"] == "pass" and tree["gates"][0]["name"] == "tpot_ms p50"
    assert ElementTree.parse(tmp_path / "j.xml").getroot().get("failures") == "0"


def test_stored_figures_without_calibration_cannot_tell(
    measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blessed(measured, tmp_path)
    done = bench("gate", measured, "--baselines", tmp_path / "b", "--stored")
    assert done.exit_code == 3 and "five days of calibration" in done.output


def test_residency_of_a_bundle(bundle: Path, tmp_path: Path) -> None:
    done = bench("ane-residency", bundle, "--svg", tmp_path / "r.svg", "--html", tmp_path / "r.html")
    assert done.exit_code == 0, done.output
    assert "not available here: needs macOS" in done.output and "| planned |" in done.output
    assert "changes of device, chunk_00.mlpackage decode" in done.output
    ElementTree.parse(tmp_path / "r.svg")
    strict = bench("ane-residency", bundle, "--threshold", 1.0, "--json")
    assert strict.exit_code == 1
    tree = json.loads(strict.output)
    assert tree["method"] == "predicted" and {p["missing"] for p in tree["planned"]} == {
        "not available here: needs macOS"
    }
    refused = bench("ane-residency", bundle, "--contribute", tmp_path / "c.json")
    assert refused.exit_code == 2 and "run this on a Mac" in refused.output


def test_compare_agrees_and_does_not_pretend_to_know_a_mac(bundle: Path, stories_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "compare.json"
    done = bench("compare", stories_model, bundle, "--rounds", 1, *TINY, "--json", "-o", path)
    assert done.exit_code == 0, done.output
    tree = json.loads(done.output[done.output.index("{") :])
    assert tree["figures"]["agreement"]["kl_mean"]["value"] < 0.01
    assert tree["residency"]["bundle"]["method"] == "predicted"
    assert any("Cannot tell from here" in note for note in tree["notes"])
    assert {t["backend"] for t in tree["targets"]} == {"mlx cpu", "mil"}
    report = results.load(path)
    side = (report, report.target("bundle"), gating.job_for(report.target("bundle"), report))
    said = report.answers["bundle"]
    both = report.model_copy(update={"answers": {"candidate": said, "baseline": [said[0], "another answer"]}})
    assert gating.agreements(both, {"candidate": side, "baseline": side}, print) == {
        "candidate": [1.0, 1.0],
        "baseline": [1.0, 0.0],
    }
    swapped = bench("compare", bundle, stories_model)
    assert swapped.exit_code == 2 and "takes an MLX model and a bundle" in swapped.output


def test_toolcalls_need_a_chat_template(stories_model: Path) -> None:
    done = bench("toolcalls", stories_model, *TINY)
    assert done.exit_code == 2 and "no case could be judged" in done.output


@pytest.mark.slow
def test_calibrate_writes_the_noise_floor(stories_model: Path, tmp_path: Path) -> None:
    done = bench("calibrate", stories_model, "--rounds", 3, *TINY, "--baselines", tmp_path, "--json")
    assert done.exit_code in (0, 3), done.output
    tree = json.loads(done.output[done.output.index("{") :])
    assert Path(tree["file"]).exists() and {g["gate"] for g in tree["gates"]} >= {"tpot_ms p50", "ttft_ms p95"}
