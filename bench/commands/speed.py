"""`bench speed` and `bench toolcalls`: how fast, and how right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import click

from bench import report as reports
from bench import results, rounds
from bench.options import REPORT_FILE, batch_policy, failing, say, show, workload_options
from bench.results import Report
from bench.runners._job import Job
from bench.runners.endpoint import drift
from mlxkd.errors import UserError
from mlxkd.metric import Metric
from mlxkd.report import Document, Heading, Section, Table, Text, Tiles

SPEED_HELP = """\b
Examples:
  bench speed runs/demo/student
  bench speed runs/demo/student --workload offline --batch-policy auto --rounds 10 -o report.json
  bench speed http://localhost:8080/v1 --determinism
  bench speed student-4bit student-8bit --html speed.html
"""
CALLS_HELP = """\b
Examples:
  bench toolcalls runs/demo/student
  bench toolcalls runs/demo/student --records data/test.jsonl --json
  bench toolcalls http://localhost:8080/v1
"""


def jobs(targets: tuple[str, ...], given: dict[str, Any], passes: int = 1) -> dict[str, Job]:
    """One job per target, named after the last part of its location."""
    found: dict[str, Job] = {}
    for location in targets:
        name = Path(location.rstrip("/")).name or location
        while name in found:
            name += "'"
        found[name] = Job(
            kind=rounds.kind_of(location), location=location, workload=given["workload"],
            max_tokens=given["max_tokens"], requests=given["requests"],
            records=given["records"] and str(given["records"]),
            batch=batch_policy(given["batch_policy"]), draft=given["draft"], model=given["model"], seed=given["seed"],
            passes=passes,
        )  # fmt: skip
    return found


def add_residency(report: Report) -> None:
    """The predicted residency of every bundle among the targets."""
    from ane.residency.predict import predict

    for target in report.targets:
        if target.kind == "bundle":
            found = predict(target.location)
            report.residency[target.name] = {"share": found.share, "method": "predicted", "chip": found.chip}


@click.command(epilog=SPEED_HELP, short_help="Measure TTFT, time per token, throughput and calls.")
@click.argument("targets", nargs=-1, required=True, metavar="TARGET...")
@workload_options
@click.option(
    "--rounds", "count", type=click.IntRange(1), default=3, show_default=True, help="Fresh processes per target"
)
@click.option("--pause", type=float, default=0.0, help="Idle seconds before each process")
@click.option("--determinism", is_flag=True, help="Endpoints: ask everything twice and report drift and fingerprints")
@click.option("--replay", type=REPORT_FILE, help="Earlier report: how many answers are still the same")
@click.option("-o", "--output", type=REPORT_FILE, help="Write the report as JSON")
@click.option("--html", "html_file", type=REPORT_FILE, help="Write the report as HTML")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON")
@failing
def speed(targets: tuple[str, ...], count: int, pause: float, determinism: bool, replay: Path | None,
          output: Path | None, html_file: Path | None, as_json: bool, **given: Any) -> None:  # fmt: skip
    """Measure targets (MLX folders, bundles, endpoints) in interleaved rounds, each in a fresh process."""
    wanted = jobs(targets, given, passes=2 if determinism else 1)
    report, outcomes = rounds.measure(wanted, rounds=count, seed=given["seed"], pause=pause, say=say)
    add_residency(report)
    for name, made in outcomes.items():
        if determinism and wanted[name].kind == "endpoint":
            report.notes.append(determinism_note(name, [p for o in made for p in o.passes], made[0].details))
    if replay:
        report.notes += replay_notes(report, results.load(replay))
    finish(report, output, html_file, as_json=as_json)


def determinism_note(name: str, passes: list[list[str]], details: dict[str, Any]) -> str:
    """Identical-output share and first difference over every pass."""
    share, first = drift(passes)
    where = "" if first is None else f", first difference in request {first + 1}"
    prints = ", ".join(details.get("fingerprints", ())) or "none"
    return (
        f"{name}: {100 * share:.0f} % of the answers identical over {len(passes)} passes{where}; fingerprints: {prints}"
    )


def replay_notes(report: Report, earlier: Report) -> list[str]:
    """How many answers of an earlier report still come, target by target."""
    if earlier.workload.hash != report.workload.hash:
        raise UserError("the earlier report asked something else", hint="replay with the same workload and settings")
    found = []
    for name, answers in report.answers.items():
        if len(earlier.answers.get(name, ())) == len(answers):
            share, first = drift([earlier.answers[name], answers])
            where = "" if first is None else f"; request {first + 1} is the first that changed"
            found.append(f"{name}: {100 * share:.0f} % of the answers of {earlier.created} came again{where}")
    if not found:
        raise UserError("the earlier report has no answers of these targets", hint="name the targets the same")
    return found


def finish(report: Report, output: Path | None, html_file: Path | None, *, as_json: bool, **extra: Any) -> None:
    """Write what was asked for and print the rest."""
    document = reports.document(report, **extra)
    if output:
        report.save(output)
        say(f"wrote {output}")
    if html_file:
        say(f"wrote {document.write(html_file)}")
    show(document, json.loads(report.model_dump_json()), as_json=as_json)


@click.command(epilog=CALLS_HELP, short_help="Run a tool-call suite against any target.")
@click.argument("target")
@workload_options
@click.option("-o", "--output", type=REPORT_FILE, help="Write the report as JSON")
@click.option("--json", "as_json", is_flag=True, help="Print JSON")
@failing
def toolcalls(target: str, output: Path | None, as_json: bool, **given: Any) -> None:
    """Ask for tool calls and judge them: exact, schema-valid, right tool, and how soon. Records give the suite."""
    wanted = jobs((target,), given)
    kind: Literal["toolcalls"] = "toolcalls"
    report, outcomes = rounds.measure(wanted, rounds=1, kind=kind, say=say)
    (name, made), = outcomes.items()  # fmt: skip
    if not made[0].scores:
        raise UserError(
            "no case could be judged",
            where=target,
            hint="the model needs a chat template, the records expected answers",
        )
    if output:
        report.save(output)
    metrics = score_metrics(report, name)
    tree = {key: value.to_json() for key, value in metrics.items()}
    show(_calls_document(report, name, metrics), tree, as_json=as_json)


def score_metrics(report: Report, name: str) -> dict[str, Metric]:
    """Shares of the cases, and the clocks of the calls."""
    device = report.rounds[0].device
    found = {
        score: Metric(sum(values) / len(values), "share", "measured", device, len(values))
        for score, values in report.quality[name].items()
    }
    clocks = ("ttfa_ms", "ttfa_tokens", "ttfa_steps", "ttfa_overhead_tokens")
    return found | {s: reports.metric(report, name, s) for s in clocks}


def _calls_document(report: Report, name: str, metrics: dict[str, Metric]) -> Document:
    judged, answers = report.quality[name]["call_exact"], report.answers[name]
    rows = [(i, "exact" if ok else "wrong", text) for i, (ok, text) in enumerate(zip(judged, answers, strict=True), 1)]
    sections: list[Section] = [
        Text(f"{sum(map(int, judged))} of {len(judged)} answers are the expected call."),
        Tiles(metrics),
        Heading("Answers"),
        Table(("case", "verdict", "answer"), rows),
    ]
    return Document("bench toolcalls", sections, f"{name} on {report.hardware.chip}")
