"""`bench ane-residency`: predicted anywhere, planned and measured on a Mac, never mixed."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ane.residency import contribute, paired, picture, plan, signals
from ane.residency.chips import ORDER
from ane.residency.plan import NEEDS_MACOS, Plan
from ane.residency.predict import DEFAULT_CHIP, Residency, predict
from ane.residency.program import packages
from bench import hardware
from bench.options import FOLDER, REPORT_FILE, failing, say
from bench.report import residency_sections
from mlxkd.errors import UserError
from mlxkd.files import atomic_file, write_json
from mlxkd.report import Document, Heading, Section, Table, Text
from mlxkd.report.values import show_quantity
from mlxkd.runtime import versions

HELP = """\b
Examples:
  bench ane-residency runs/demo/bundle
  bench ane-residency runs/demo/bundle --chip m4 --svg residency.svg --json
  bench ane-residency runs/demo/bundle --paired 50
  bench ane-residency runs/demo/bundle --xctrace intervals.xml --html residency.html
"""


def measured(bundle: Path, pairs: int | None, xctrace: Path | None, powermetrics: Path | None) -> list[tuple[str, str]]:
    """What paired latencies and recorded traces say, as (source, finding); none of them is a residency."""
    found = []
    if pairs:
        words = str(paired.measure(bundle, pairs=pairs)) if sys.platform == "darwin" else NEEDS_MACOS
        found.append(("paired latency", words))
    if xctrace:
        intervals = signals.parse_xctrace(_text(xctrace))
        busy = sum(i.duration for i in intervals)
        found.append(("xctrace", f"{len(intervals)} Neural Engine intervals, {busy * 1e3:.1f} ms in all"))
    if powermetrics:
        samples = [s for s in signals.parse_powermetrics(_text(powermetrics)) if s.ane is not None]
        seconds = sum(s.seconds for s in samples)
        mean = sum(s.seconds * (s.ane or 0.0) for s in samples) / seconds if seconds else 0.0
        words = f"{1000 * mean:.0f} mW of Neural Engine power over {seconds:.0f} s, idle included"
        found.append(("powermetrics", words if mean else "the Neural Engine counter reads zero"))
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError("cannot read this recording", where=str(path)) from error


def planned(found: Residency, bundle: Path) -> list[Plan]:
    """The plan of every function of every package; missing ones carry their reason."""
    places = {p.name: p for p in packages(bundle)}
    return [plan.plan(places[f.package], f.function) for f in found.functions]


def disagreements(found: Residency, plans: Sequence[Plan]) -> list[tuple[str, str, str, str]]:
    """(function, operation, predicted, planned) wherever the two sources differ."""
    return [
        (f.function, *difference)
        for f, p in zip(found.functions, plans, strict=True)
        for difference in plan.disagreements({x.name: x.device for x in f.placements}, p)
    ]


def sections(found: Residency, plans: Sequence[Plan], traces: Sequence[tuple[str, str]]) -> list[Section]:
    """Which sources there are, what each says, where they disagree, and what falls off."""
    shares = [(p.package, p.function, p.share, p.missing) for p in plans]
    rows: list[Any] = [("predicted", "all", show_quantity(found.share, "share"), f"rule table for {found.chip}")]
    rows += [
        ("planned", f, "–" if s is None else show_quantity(s, "share"), m or package) for package, f, s, m in shares
    ]
    rows += [("measured", "all", "–", f"{source}: {words}") for source, words in traces]
    if not traces:
        rows.append(("measured", "all", "–", NEEDS_MACOS if sys.platform != "darwin" else "record one: see --help"))
    made: list[Section] = [Heading("Sources"), Table(("source", "function", "share", "from"), rows)]
    differ = disagreements(found, plans)
    if differ:
        made += [Heading("Where they disagree", 3), Table(("function", "operation", "predicted", "planned"), differ)]
    return [*made, *residency_sections(found)]


@click.command("ane-residency", epilog=HELP, short_help="Which operations run on the Neural Engine, and why not.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--chip", type=click.Choice(sorted(ORDER)), default=None, help="[default: this machine's, else m1]")
@click.option(
    "--threshold", type=click.FloatRange(0, 1), default=0.8, show_default=True, help="Exit 1 below this share"
)
@click.option("--calibrations", type=FOLDER, help="Folder of plans from real Macs [default: the shipped ones]")
@click.option("--xctrace", type=REPORT_FILE, help="xctrace export of the ane-hw-intervals table")
@click.option("--powermetrics", type=REPORT_FILE, help="Output of powermetrics recorded while the bundle ran")
@click.option("--paired", "pairs", type=click.IntRange(3), help="macOS: time so many decode steps with and without it")
@click.option("--contribute", type=REPORT_FILE, help="macOS: write this machine's plan as a calibration")
@click.option("--svg", type=REPORT_FILE, help="Write the picture")
@click.option("--html", "html_file", type=REPORT_FILE, help="Write the report as HTML")
@click.option("--json", "as_json", is_flag=True, help="Print JSON")
@failing
def ane_residency(bundle: Path, chip: str | None, threshold: float, calibrations: Path | None, xctrace: Path | None,
                  powermetrics: Path | None, pairs: int | None, contribute: Path | None, svg: Path | None,
                  html_file: Path | None, as_json: bool) -> None:  # fmt: skip
    """Predict (anywhere), plan and measure (on a Mac) what of a bundle runs on the Neural Engine."""
    found = predict(bundle, chip or _own_chip(), calibrations=calibrations)
    plans, traces = planned(found, bundle), measured(bundle, pairs, xctrace, powermetrics)
    if contribute:
        _contribute(found, plans, contribute)
    if svg:
        with atomic_file(svg) as temporary:
            temporary.write_text(picture.svg(found), encoding="utf-8")
    passed = found.share >= threshold
    share = show_quantity(found.share, "share")
    shares = f"{share} of the cost runs on the Neural Engine (threshold {100 * threshold:.0f} %)"
    verdict = f"Predicted: {shares}."
    document = Document(
        f"Neural Engine residency of {bundle.name}",
        [Text(verdict, "good" if passed else "bad"), *sections(found, plans, traces)],
    )
    if html_file:
        say(f"wrote {document.write(html_file)}")
    if as_json:
        tree = found.to_json() | {
            "threshold": threshold,
            "planned": [{"function": p.function, "share": p.share, "missing": p.missing} for p in plans],
            "measured": [{"source": source, "finding": words} for source, words in traces],
            "disagreements": disagreements(found, plans),
        }
        click.echo(json.dumps(tree, ensure_ascii=False, indent=1))
    else:
        click.echo(document.markdown(), nl=False)
    sys.exit(0 if passed else 1)


def _own_chip() -> str:
    """This Mac's generation, or the strictest of the M series elsewhere."""
    name = hardware.cpu_chip()
    return name if name in ORDER else DEFAULT_CHIP


def _contribute(found: Residency, plans: Sequence[Plan], path: Path) -> None:
    missing = next((p.missing for p in plans if p.missing), None)
    if missing:
        raise UserError(f"no plan to contribute: {missing}", hint="run this on a Mac")
    profile = hardware.profile()
    from bench.rounds import artefact_hash

    machine = {
        "chip": profile.chip,
        "system": profile.system,
        "coremltools": str(versions()["coremltools"]),
        "package": artefact_hash(found.path) or "unknown",
    }
    made = {p.function: [{"op": o.op, "name": o.name, "device": o.device} for o in p.ops] for p in plans}
    write_json(path, contribute.contribution(found, made, machine=machine))
    say(f"wrote {path}; open a pull request with it")
