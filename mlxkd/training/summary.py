"""What a run tells people: the table on the terminal, and the report page with its plots."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table as RichTable

from mlxkd.evaluation.answers import Answer
from mlxkd.files import write_json
from mlxkd.metric import Metric
from mlxkd.quant.pictures import stability_sections
from mlxkd.quant.stability import Stability
from mlxkd.report import Conversation, Document, Figure, Heading, Section, Table, Text, Tiles, plots
from mlxkd.runtime import artefact_metadata, device_name
from mlxkd.training.callbacks import Values, read_metrics
from mlxkd.training.result import Contender, RunResult, gap_closed, lead, to_json

ROWS = {
    "all/exact": "exactly right answers",
    "known/exact": "- tools known, wording new",
    "composed/exact": "- tools never seen",
    "all/exact_calls": "exactly right calls",
    "all/name": "right tool",
    "all/arguments": "right tool and arguments",
    "all/schema_valid": "valid under the schema",
    "all/false_calls": "calls where none wanted",
    "top1": "teacher's token on top",
    "kl": "KL to the teacher (nats)",
    "nll": "NLL of answers (nats)",
}
SAMPLES = 6


def write_report(result: RunResult) -> None:
    """Write report.json and report.html into the run folder."""
    write_json(result.folder / "report.json", to_json(result))
    document(result).write(result.folder / "report.html")


def rows(result: RunResult) -> list[tuple[str, list[Metric | None]]]:
    """Figures that at least one contender has, in reading order."""
    contenders = result.contenders.values()
    found = [(label, [c.metrics.get(key) for c in contenders]) for key, label in ROWS.items()]
    return [(label, metrics) for label, metrics in found if any(m is not None for m in metrics)]


def terminal_table(result: RunResult) -> RichTable:
    """The table that a run prints."""
    grid = result.recipe.quantisation.grid
    shape = "students not packed" if grid == "float" else f"students packed on {grid}"
    title = f"{result.recipe.name}: measured on {device_name()}; {shape}"
    table = RichTable(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for contender in result.contenders.values():
        table.add_column(contender.title, justify="right")
    table.add_row("parameters", *[f"{c.parameters:,}" for c in result.contenders.values()])
    table.add_row("weights", *[f"{c.bytes / 1e6:.2f} MB" for c in result.contenders.values()])
    for label, metrics in rows(result):
        table.add_row(label, *[_shown(m) for m in metrics])
    return table


def _shown(metric: Metric | None) -> str:
    if metric is None or metric.value is None:
        return "–"
    return f"{metric.value:.1%}" if metric.unit == "share" else f"{metric.value:.4f}"


def closing_lines(result: RunResult) -> list[str]:
    """What a person reads below the table."""
    gap = gap_closed(result)
    share = f"{gap.value:.0%}" if gap.value is not None else f"not known: {gap.note}"
    ahead = lead(result)
    points = f"{ahead.value:+.1f} points ({ahead.note})" if ahead.value is not None else f"not known: {ahead.note}"
    student = result.folder / "student"
    return [
        f"exact answers of the student over those of the twin: {points}",
        f"share of the gap between the twin without a teacher and the teacher that the student closes: {share}",
        f"{result.seconds / 60:.1f} minutes, peak memory {result.peak_bytes / 1e9:.2f} GB",
        f"report: {result.folder / 'report.html'}",
        f'try it: mlxkd generate {student} "remind me to call Ana at 6"',
    ]


def document(result: RunResult) -> Document:
    """The report page."""
    metrics = read_metrics(result.folder / "metrics.jsonl")
    sections: list[Section] = [Tiles(_tiles(result)), Heading("Who does how well"), _table(result)]
    exact = {c.title: c.metrics["all/exact"] for c in result.contenders.values() if "all/exact" in c.metrics}
    if exact:
        sections.append(Figure(plots.bars(exact), alt="share of exactly right answers by model"))
    sections += [Heading("Training"), *_curves(metrics)]
    sections += _stability(metrics)
    sections += _samples(result.contenders["student"])
    sections += [Heading("Data"), Text("\n\n".join(result.data_lines))]
    details = {"recipe": result.recipe.identity(), "seed": result.recipe.seed, **artefact_metadata()}
    return Document(f"Run {result.recipe.name}", sections, subtitle=_subtitle(result), details=details)


def _subtitle(result: RunResult) -> str:
    teacher, student = result.contenders.get("teacher"), result.contenders["student"]
    share = f", {student.parameters / teacher.parameters:.0%} of the teacher's" if teacher else ""
    return f"{student.parameters:,} parameters{share}, on {result.recipe.quantisation.grid}"


def _tiles(result: RunResult) -> dict[str, Metric | None]:
    student = result.contenders["student"]
    device = device_name()
    tiles: dict[str, Metric | None] = {}
    if "all/exact" in student.metrics:
        judged = {"student exact": student, "teacher exact": result.contenders["teacher"]}
        tiles |= {name: contender.metrics["all/exact"] for name, contender in judged.items()}
    tiles["lead over the twin"] = lead(result)
    tiles["gap closed"] = gap_closed(result)
    tiles["weights"] = Metric(student.bytes / 1e6, "MB", "measured", device)
    tiles["time"] = Metric(result.seconds / 60, "min", "measured", device)
    tiles["peak memory"] = Metric(result.peak_bytes / 1e9, "GB", "measured", device)
    return tiles


def _table(result: RunResult) -> Table:
    contenders = list(result.contenders.values())
    body: list[list[str | int | Metric | None]] = [["parameters", *[c.parameters for c in contenders]]]
    body.append(["weights", *[Metric(c.bytes, "bytes", "measured", device_name()) for c in contenders]])
    body += [[label, *metrics] for label, metrics in rows(result)]
    return Table(["", *[c.title for c in contenders]], body, "Packed models run on MLX's quantised kernels.")


def _series(metrics: Sequence[Values], key: str) -> dict[str, tuple[list[int], list[float]]]:
    runs = dict.fromkeys(str(v["run"]) for v in metrics)
    found = {run: [(v["step"], v[key]) for v in metrics if v["run"] == run and key in v] for run in runs}
    return {run: ([s for s, _ in points], [y for _, y in points]) for run, points in found.items() if points}


def _curves(metrics: Sequence[Values]) -> list[Section]:
    """Each loss term, the validation looks (where there are several), and the learning rate."""
    terms = dict.fromkeys(key for values in metrics for key in values if key.startswith("loss/"))
    wanted = [(key, f"{key.removeprefix('loss/').replace('_', ' ')}, training", _unit(key)) for key in terms]
    wanted += [("valid/kl", "KL to the teacher, validation", "nats/token"), ("rate", "learning rate", "rate")]
    sections: list[Section] = []
    for key, title, unit in wanted:
        series = _series(metrics, key)
        longest = max((len(steps) for steps, _ in series.values()), default=0)
        if longest > 1:
            smooth = max(longest // 20, 1) if key in terms else 1
            figure = plots.curves(series, y=unit, title=title, smooth=smooth)
            sections.append(Figure(figure, alt=f"{title} over training steps"))
    return sections


def _unit(term: str) -> str:
    return "hidden difference" if term.startswith("loss/hidden") else "nats/token"


def _stability(metrics: Sequence[Values]) -> list[Section]:
    """What became of the hidden states in the quantised phase, where the recipe watched it."""
    seen = [v for v in metrics if "valid/stability" in v]
    log = [reason for v in seen for reason in v["valid/reasons"]]
    return stability_sections([Stability.from_json(v["valid/stability"]) for v in seen], log)


def _samples(student: Contender) -> list[Section]:
    """Wrong answers first: they teach most."""
    answers = [a for part in student.answers.values() for a in part]
    if not answers:
        return []
    chosen = sorted(answers, key=lambda a: a.score.exact)
    wrong = [a for a in chosen if not a.score.exact][: SAMPLES // 2]
    right = [a for a in chosen if a.score.exact][: SAMPLES - len(wrong)]
    return [Heading("What it answers"), *[_conversation(a) for a in [*wrong, *right]]]


def _conversation(answer: Answer) -> Conversation:
    verdict = "right" if answer.score.exact else f"wrong: {answer.score.fault or 'not the call that was asked for'}"
    offered = ", ".join(tool["function"]["name"] for tool in answer.tools)
    expected = [{**answer.messages[-1], "role": "expected"}] if not answer.score.exact else []
    written = {"role": "assistant", "content": answer.text}
    return Conversation([*answer.messages[:-1], written, *expected], f"{verdict}; tools on offer: {offered}")
