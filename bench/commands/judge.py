"""`bench calibrate`, `bless`, `gate` and `report`: is today's build worse than the blessed one?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from bench import baselines, calibration, gating, hardware, outputs, results, rounds
from bench import report as reports
from bench.commands.speed import jobs
from bench.gates import EXIT, THRESHOLDS, overall, thresholds
from bench.options import FOLDER, REPORT_FILE, failing, say, show, workload_options
from mlxkd.files import atomic_file
from mlxkd.report import Document, Table, Text

GATE_HELP = """\b
Examples:
  bench gate report.json
  bench gate report.json --junit gates.xml --markdown gates.md
  bench gate report.json --stored --json
  bench gate report.json --baseline baselines/ab12/0003-2026-01-02.json --force
"""
BLESS_HELP = """\b
Examples:
  bench bless report.json --reason "first release"
"""
CALIBRATE_HELP = """\b
Examples:
  bench calibrate runs/demo/student
  bench calibrate runs/demo/student --rounds 20 --workload offline
"""
REPORT_HELP = """\b
Examples:
  bench report report.json --html report.html
  bench report report.json
"""
BASELINES = click.option("--baselines", "folder", type=FOLDER, default=baselines.FOLDER, show_default=True)
LIMITS = click.option(
    "--thresholds", "limits_file", type=REPORT_FILE, default=THRESHOLDS, help="YAML of limits by chip"
)


@click.command(epilog=GATE_HELP, short_help="Compare a report with the blessed baseline.")
@click.argument("report_file", metavar="REPORT", type=REPORT_FILE)
@click.option("--baseline", type=str, help="A baseline file [default: the newest of the same identity]")
@BASELINES
@LIMITS
@click.option("--target", help="Which target of the report")
@click.option("--rounds", "count", type=click.IntRange(3), default=10, show_default=True, help="Of the first look")
@click.option("--stored", is_flag=True, help="Judge by stored figures alone instead of running both sides again")
@click.option("--force", is_flag=True, help="Compare across different machines or workloads, and say so")
@click.option("--junit", type=REPORT_FILE, help="Write JUnit XML")
@click.option("--markdown", type=REPORT_FILE, help="Write a Markdown summary")
@click.option("--json", "as_json", is_flag=True, help="Print JSON")
@failing
def gate(report_file: Path, baseline: str | None, folder: Path, limits_file: Path, target: str | None, count: int,
         stored: bool, force: bool, junit: Path | None, markdown: Path | None, as_json: bool) -> None:  # fmt: skip
    """Exit 0 when every gate passes, 1 when one fails, 2 when nothing could run, 3 when it cannot be told.

    By default the report's artefact and the blessed one are run again next to each other in fresh processes.
    """
    report = results.load(report_file)
    name = report.target(target).name
    limits = thresholds(report.hardware.chip, limits_file)
    found = gating.chosen(report, name, baseline, folder=folder, force=force)
    if stored:
        verdict = gating.stored(report, name, found, limits, folder=folder)
    else:
        verdict = gating.rerun(report, name, found, limits, count=count, folder=folder, say=say)
    title = f"bench gate: {name} against {found.path.name}"
    document = outputs.document(verdict.gates, title=title, notes=verdict.notes)
    for path, text in ((junit, outputs.junit(verdict.gates)), (markdown, document.markdown())):
        if path:
            with atomic_file(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
    show(document, outputs.to_json(verdict.gates) | {"notes": list(verdict.notes)}, as_json=as_json)
    sys.exit(EXIT[overall(verdict.gates)])


@click.command(epilog=BLESS_HELP, short_help="Keep a report as the newest baseline.")
@click.argument("report_file", metavar="REPORT", type=REPORT_FILE)
@click.option("--reason", required=True, help="Why this one: it stays in the history")
@click.option("--target", help="Which target of the report")
@BASELINES
@failing
def bless(report_file: Path, reason: str, target: str | None, folder: Path) -> None:
    """Store a report for later gates. Needs nominal conditions, ten rounds and a clean tree; overwrites nothing."""
    path = baselines.bless(results.load(report_file), reason, folder=folder, target=target)
    click.echo(str(path))


@click.command(epilog=CALIBRATE_HELP, short_help="Measure this machine's noise.")
@click.argument("target")
@workload_options
@click.option("--rounds", "count", type=click.IntRange(3), default=10, show_default=True)
@BASELINES
@LIMITS
@click.option("--json", "as_json", is_flag=True, help="Print JSON")
@failing
def calibrate(target: str, count: int, folder: Path, limits_file: Path, as_json: bool, **given: Any) -> None:
    """Run one artefact against itself: which gates can this machine decide? Exit 3 when it must refuse one."""
    (job,) = jobs((target,), given).values()
    report, _ = rounds.measure({"first": job, "second": job}, rounds=count, kind="calibration", say=say)
    limits = thresholds(report.hardware.chip, limits_file)
    day = calibration.measure(report, limits)
    path = calibration.add(folder, hardware.profile(), day)
    rows = calibration.rows(day, limits)
    refused = [row[0] for row in rows if row[4] != "decidable"]
    names = ("gate", "error of one round, %", "smallest change seen, %", "rounds needed", "verdict")
    words = f"Refused with {count} rounds: {', '.join(refused)}." if refused else "Every gate can be decided."
    document = Document("Calibration", [Text(words, "unsure" if refused else "good"), Table(names, rows)])
    tree = {"file": str(path), "gates": [dict(zip(names, row, strict=True)) for row in rows]}
    show(document, tree, as_json=as_json)
    sys.exit(3 if refused or not rows else 0)


@click.command(epilog=REPORT_HELP, short_help="Show a report again, with its history.")
@click.argument("report_file", metavar="REPORT", type=REPORT_FILE)
@click.option("--html", "html_file", type=REPORT_FILE, help="Write HTML instead of printing Markdown")
@click.option("--schema", is_flag=True, help="Print the JSON Schema of reports")
@BASELINES
@failing
def report(report_file: Path, html_file: Path | None, schema: bool, folder: Path) -> None:
    """One self-contained HTML page, or Markdown for a pull request."""
    if schema:
        click.echo(json.dumps(results.schema(), indent=1))
        return
    known = results.load(report_file)
    history = baselines.history(known, folder=folder, target=known.targets[0].name)
    document = reports.document(known, history=history)
    if html_file:
        say(f"wrote {document.write(html_file)}")
    else:
        click.echo(document.markdown(), nl=False)
