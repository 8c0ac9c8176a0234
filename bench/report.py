"""A bench report as a document: verdict, figures, plots, conditions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.outputs import TONES, table
from bench.recommend import Advice
from bench.results import UNITS, Report
from mlxkd.metric import Metric
from mlxkd.report import Document, Figure, Heading, Section, Table, Text, Tiles, plots
from mlxkd.report.values import show_quantity

if TYPE_CHECKING:
    from ane.residency.predict import Residency
    from bench.baselines import Found
    from bench.gates import Gate

SHOWN = {
    "ttft_ms": "time to first token", "tpot_ms": "time per token", "ttfa_ms": "time to the first valid call",
    "ttfa_steps": "model steps to the first valid call", "request_ms": "whole request",
    "joules_per_token": "energy per token",
}  # fmt: skip
PHASES = {"tokenize_ms": "tokenizer", "prefill_ms": "prefill", "first_step_ms": "first step"}
NO_ENERGY = "not available here: needs macOS and macmon"


def document(
    report: Report,
    *,
    gates: Sequence[Gate] = (),
    advice: Advice | None = None,
    residency: Sequence[Residency] = (),
    history: Sequence[Found] = (),
) -> Document:
    """The whole report."""
    sections: list[Section] = []
    if advice:
        sections += [Text(advice.sentence, advice.tone), Text("Because " + "; ".join(advice.reasons) + ".")]
        sections.append(Text("Limits: " + "; ".join(advice.limits) + "."))
    if gates:
        from bench.gates import overall

        sections.append(Text(f"Gates: {overall(gates)}.", TONES[overall(gates)]))
    sections += [Text(note, "note") for note in [*_labels(report), *_unsaid(report, advice)]]
    sections += [*_figures(report), *_plots(report)]
    if gates:
        sections += [Heading("Gates"), table(gates)]
    for found in residency:
        sections += residency_sections(found)
    sections += _history(report, history)
    sections += [*_counters(report), *_conditions(report)]
    subtitle = f"{report.workload.name} on {report.hardware.chip}, {report.created}"
    return Document(f"bench {report.kind}", sections, subtitle, _details(report))


def _labels(report: Report) -> list[str]:
    """What a reader must know of each target: what its figures do not say, and how its rows were chosen."""
    return [f"{t.name}: {t.details[key]}" for t in report.targets for key in ("label", "rows") if t.details.get(key)]


def _unsaid(report: Report, advice: Advice | None) -> list[str]:
    """The report's notes but for those that repeat the advice above them."""
    said = advice.notes if advice else ()
    return [note for note in report.notes if note not in said]


def metric(report: Report, target: str, series: str) -> Metric:
    """A figure of a target; energy says what it needs where it is missing."""
    found = report.metric(target, series)
    if series == "joules_per_token" and found.value is None:
        return Metric(None, found.unit, "measured", found.device, note=NO_ENERGY)
    return found


def _figures(report: Report) -> list[Section]:
    first = report.targets[0].name
    tiles = {SHOWN[s]: metric(report, first, s) for s in ("ttft_ms", "tpot_ms", "ttfa_steps", "joules_per_token")}
    sections: list[Section] = [Tiles(tiles)] if len(report.targets) == 1 else []
    rows = []
    for series, words in SHOWN.items():
        for target in report.targets:
            found = metric(report, target.name, series)
            tail = [None, None, None] if found.value is None else [found.p95, found.n, found.censored or None]
            rows.append((words, target.name, found, *tail))
    names = ("figure", "target", "p50", "p95", "observations", "never happened")
    return [*sections, Heading("Figures"), Table(names, rows)]


def _finite(report: Report, target: str, series: str) -> list[float]:
    return [v for r in report.series(target, series) for v in r if math.isfinite(v)]


def _plots(report: Report) -> list[Section]:
    sections: list[Section] = [Heading("Distributions")]
    for series in ("ttft_ms", "tpot_ms", "itl_ms"):
        samples = {t.name: _finite(report, t.name, series) for t in report.targets}
        samples = {name: values for name, values in samples.items() if values}
        if samples:
            words = SHOWN.get(series, "gap between tokens")
            picture = plots.distributions(samples, unit=UNITS[series], title=words)
            medians = ", ".join(f"{n} {sorted(v)[len(v) // 2]:.3g} {UNITS[series]}" for n, v in samples.items())
            sections.append(Figure(picture, alt=f"{words}: medians {medians}"))
    parts = {t.name: _phases(report, t.name) for t in report.targets}
    parts = {name: row for name, row in parts.items() if row}
    if parts:
        picture = plots.stacked(parts, unit="ms", title="where the first token's time goes (means)")
        means = "; ".join(f"{n} {', '.join(f'{w} {v:.3g} ms' for w, v in row.items())}" for n, row in parts.items())
        sections.append(Figure(picture, alt=f"time to first token by phase: {means}"))
    return sections


def _phases(report: Report, target: str) -> dict[str, float]:
    found = {words: _finite(report, target, series) for series, words in PHASES.items()}
    return {words: sum(values) / len(values) for words, values in found.items() if values}


def residency_sections(found: Residency) -> list[Section]:
    """Share, picture and the operations that fall off."""
    from ane.residency.picture import svg

    shares = ", ".join(f"{name} {show_quantity(share, 'share')}" for name, share in found.by_function().items())
    rows = [
        (f.function, p.name, p.op, show_quantity(p.share, "share"), p.device, p.rule, p.reason, p.fix, p.confidence)
        for f in found.functions
        for p in f.exceptions[:20]
    ]
    names = ("function", "operation", "kind", "cost", "device", "rule", "reason", "what would move it", "confidence")
    said = [(f.function, x.rule, x.verdict, x.reason, x.fix) for f in found.functions for x in f.findings]
    handovers = {f"changes of device, {f.package} {f.function}": len(f.segments) - 1 for f in found.functions}
    sections: list[Section] = [
        Heading("Neural Engine residency"),
        Tiles({f"share on {found.chip}": found.metric(), **handovers}),
        Text("Each change of device costs about 0.125 ms (rule R26); the share does not count that."),
        Figure(svg(found), alt=f"operations by predicted device: {shares}", caption=f"Predicted: {shares}."),
    ]
    if rows:
        sections += [Heading("Operations that fall off", 3), Table(names, rows)]
    if said:
        sections += [Heading("About whole functions", 3), Table(("function", "rule", "verdict", "reason", "fix"), said)]
    return sections


def _history(report: Report, history: Sequence[Found]) -> list[Section]:
    if len(history) < 2:
        return []
    series: dict[str, tuple[list[float], list[float]]] = {}
    for name in ("ttft_ms", "tpot_ms"):
        values = [metric(f.baseline.report, f.baseline.target, name).value for f in history]
        points = [(float(i), v) for i, v in enumerate(values, 1) if v is not None]
        series[SHOWN[name]] = ([x for x, _ in points], [y for _, y in points])
    picture = plots.curves(series, x="baseline", y="ms (median)", points=True)
    reasons = [(i, f.baseline.report.created[:10], f.baseline.reason) for i, f in enumerate(history, 1)]
    return [
        Heading("History"),
        Figure(picture, alt="medians over the blessed baselines"),
        Table(("baseline", "date", "reason"), reasons),
    ]


def _counters(report: Report) -> list[Section]:
    names = sorted({name for r in report.rounds for name in r.counters})
    rows = []
    for name in names:
        for target in report.targets:
            values = [r.counters.get(name) for r in report.rounds if r.target == target.name]
            known = sorted(v for v in values if v is not None)
            if known:
                rows.append((name, target.name, known[len(known) // 2], known[0], known[-1]))
    return [Heading("Counters"), Table(("counter", "target", "median", "least", "most"), rows)] if rows else []


def _conditions(report: Report) -> list[Section]:
    problems = report.problems()
    words = "Conditions were nominal in every round." if not problems else "Not nominal: " + "; ".join(problems) + "."
    return [Heading("Conditions"), Text(words, "plain" if not problems else "unsure"), Text(report.policy)]


def _details(report: Report) -> dict[str, object]:
    return {
        "hardware key": report.hardware.key,
        "hardware": report.hardware.model_dump(exclude={"versions"}, exclude_none=True),
        "versions": report.hardware.versions,
        "workload": report.workload.model_dump(),
        "targets": [t.model_dump(exclude_none=True) for t in report.targets],
    }
