"""The body of ``mlxkd evaluate``: tool calls and speed of one model on held-out requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import mlx.nn as nn
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mlxkd import compat, runtime
from mlxkd.data.records import load_records
from mlxkd.demo import world
from mlxkd.errors import UserError
from mlxkd.evaluation.answers import answer_all, cut_to_answers
from mlxkd.evaluation.clocks import Summary
from mlxkd.evaluation.speed import time_answers
from mlxkd.evaluation.toolcalls.scoring import aggregate
from mlxkd.metric import Metric

DEMO_SETS: tuple[world.Set, ...] = ("known", "composed", "words")
Sets = dict[str, list[dict[str, Any]]]
WARM_UP = 2
EPILOG = """\b
Examples:
  mlxkd evaluate runs/demo/student --suite toolcalls --limit 50
  mlxkd evaluate runs/demo/student --suite speed --json
  mlxkd evaluate model --suite toolcalls --data held-out.jsonl
"""


def held_out(data: Path | None, limit: int) -> Sets:
    """Held-out requests by set: the demo's, or those of a file (one per assistant turn).

    Raises:
        UserError: a file without conversations.
    """
    if data is None:
        sets = {name: world.conversations(name, 7, limit) for name in DEMO_SETS}
        return {name: [cut_to_answers(record)[0] for record in records] for name, records in sets.items()}
    records = [r for r in load_records(data) if r.kind == "messages"]
    cases = [c for r in records for c in cut_to_answers({"messages": list(r.messages), "tools": list(r.tools)})]
    if not cases:
        raise UserError("no conversation with an assistant turn", where=str(data))
    return {data.stem: cases[:limit]}


def tool_calls(
    model: nn.Module,
    tokenizer: Any,
    sets: dict[str, list[dict[str, Any]]],
    max_tokens: int,
    rows: int,
    console: Console,
) -> dict[str, Metric]:
    """Exactness and validity by set, keys ``set/figure``."""
    found: dict[str, Metric] = {}
    with Progress(console=console) as progress:
        for name, cases in sets.items():
            task = progress.add_task(name, total=len(cases))
            answers = answer_all(
                model, tokenizer, cases, max_tokens=max_tokens, rows=rows, on_answer=lambda t=task: progress.advance(t)
            )
            scores = aggregate([a.score for a in answers], runtime.device_name())
            found |= {f"{name}/{key}": metric for key, metric in scores.items()}
    return found


def speed(
    model: nn.Module, tokenizer: Any, sets: dict[str, list[dict[str, Any]]], max_tokens: int
) -> dict[str, Metric]:
    """Latencies of lone requests, the first ones left out as warm-up."""
    cases = [case for part in sets.values() for case in part]
    timed = time_answers(model, tokenizer, [*cases[:WARM_UP], *cases], max_tokens=max_tokens)
    return Summary(WARM_UP, [timing for timing, _ in timed]).metrics(runtime.device_name())


@click.command("evaluate", epilog=EPILOG, short_help="Score tool calls or time answers of a model.")
@click.argument("model")
@click.option("--suite", type=click.Choice(["toolcalls", "speed"]), default="toolcalls", show_default=True)
@click.option("--data", type=click.Path(path_type=Path), help="Conversations [default: the demo's held-out sets]")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="Requests per set")
@click.option("--max-tokens", type=click.IntRange(1), default=96, show_default=True)
@click.option("--rows", type=click.IntRange(1), default=16, show_default=True, help="Requests side by side (toolcalls)")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object")
def command(model: str, suite: str, data: Path | None, limit: int, max_tokens: int, rows: int, as_json: bool) -> None:
    """Judge MODEL, packed or float, on the kernels it would ship with."""
    runtime.keep_heap()
    sets = held_out(data, limit)
    loaded, tokenizer, _ = compat.load(model)
    console = Console(stderr=True)
    if suite == "toolcalls":
        found = tool_calls(loaded, tokenizer, sets, max_tokens, rows, console)
    else:
        found = speed(loaded, tokenizer, sets, max_tokens)
    if as_json:
        click.echo(json.dumps({key: metric.to_json() for key, metric in found.items()}, indent=2))
        return
    table = Table(title=f"{model}: measured on {runtime.device_name()}", title_justify="left")
    for column in ("", "value", "p50", "p90", "p95", "n", "censored"):
        table.add_column(column, justify="left" if not column else "right")
    for key, m in found.items():
        shown = [f"{v:.4g}" if v is not None else "–" for v in (m.value, m.p50, m.p90, m.p95)]
        table.add_row(f"{key} ({m.unit})", *shown, str(m.n), str(m.censored))
    Console().print(table)
