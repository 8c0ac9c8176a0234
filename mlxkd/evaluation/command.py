"""The body of ``mlxkd evaluate``: tool calls and speed of one model on held-out requests."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import mlx.nn as nn
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mlxkd import compat, runtime
from mlxkd.data.records import load_records
from mlxkd.decode.constrained import ToolGrammars
from mlxkd.decode.mlx_session import MlxSession
from mlxkd.demo import world
from mlxkd.errors import UserError
from mlxkd.evaluation.answers import answer_all, cut_to_answers, write_all
from mlxkd.evaluation.clocks import Summary
from mlxkd.evaluation.speed import TimedGrammars, time_answers
from mlxkd.evaluation.toolcalls.bfcl import judge, reader
from mlxkd.evaluation.toolcalls.parsing import parser_for
from mlxkd.evaluation.toolcalls.scoring import aggregate
from mlxkd.metric import Metric, from_samples

DEMO_SETS: tuple[world.Set, ...] = ("known", "composed", "words")
Sets = dict[str, list[dict[str, Any]]]
WARM_UP = 2
EPILOG = """\b
Examples:
  mlxkd evaluate runs/demo/student --suite toolcalls --limit 50
  mlxkd evaluate runs/demo/student --suite speed --json
  mlxkd evaluate model --suite toolcalls --data held-out.jsonl --constrain
  mlxkd evaluate model --suite toolcalls --data folder-of-BFCL_v4-files
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
    given = [{"messages": list(r.messages), "tools": list(r.tools), "source": r.source} for r in records]
    cases = [case for record in given for case in cut_to_answers(record)]
    if not cases:
        raise UserError("no conversation with an assistant turn", where=str(data))
    return {data.stem: cases[:limit]}


class Suites:
    """The suites of one model.

    Args:
        model, tokenizer: as loaded.
        max_tokens: new tokens per answer at most.
        rows: requests side by side where nothing is timed.
        constrain: hold calls to the schemas of the tools on offer.
        console: for progress (stderr).
    """

    def __init__(self, model: nn.Module, tokenizer: Any, max_tokens: int, rows: int, constrain: bool, console: Console):
        self.model, self.tokenizer, self.max_tokens, self.rows = model, tokenizer, max_tokens, rows
        self.console = console
        self.grammars = ToolGrammars(tokenizer, MlxSession(model).vocab_size) if constrain else None

    def tool_calls(self, sets: Sets) -> dict[str, Metric]:
        """Exactness and validity by set, keys ``set/figure``."""
        found: dict[str, Metric] = {}
        for name, cases in sets.items():
            answers = self._watched(name, cases, answer_all)
            scores = aggregate([a.score for a in answers], runtime.device_name())
            found |= {f"{name}/{key}": metric for key, metric in scores.items()}
        return found

    def leaderboard(self, folder: Path, limit: int) -> dict[str, Metric]:
        """Accuracy on the BFCL categories of a folder under the leaderboard's rules, and its averages."""
        parser = parser_for(self.tokenizer)
        verdicts: dict[str, list[bool]] = {}
        for category in reader.categories_in(folder):
            cases = reader.load_cases(folder, category)[:limit]
            asked = [{"messages": c.messages, "tools": c.tools, "source": f"{folder}: {c.id}"} for c in cases]
            texts = self._watched(category, asked, write_all)
            verdicts[category] = [
                judge.fault(case, text, parser) is None for case, text in zip(cases, texts, strict=True)
            ]
        return judge.accuracies(verdicts, runtime.device_name())

    def speed(self, sets: Sets) -> dict[str, Metric]:
        """Latencies of lone requests; some are answered before as warm-up and not used."""
        cases = [case for part in sets.values() for case in part]
        warm_up = (cases * WARM_UP)[:WARM_UP]
        time_answers(self.model, self.tokenizer, warm_up, max_tokens=self.max_tokens, grammar=self.grammars)
        costs = TimedGrammars(self.grammars) if self.grammars else None
        timed = self._watched("speed", cases, time_answers, rows=1, grammar=costs)
        summary = Summary(timings=[timing for timing, _ in timed])
        device = runtime.device_name()
        found = summary.metrics(device)
        if costs:
            tokens = sum(timing.tokens for timing in summary.timings)
            found["grammar"] = Metric(costs.following * 1e3 / tokens, "ms/token", "measured", device, n=tokens)
            compiling = [seconds * 1e3 for seconds in costs.compiling]
            found["grammar_compile"] = from_samples(compiling, "ms", method="measured", device=device)
        return found

    def _watched(self, name: str, cases: list[dict[str, Any]], answer: Callable[..., list[Any]], **given: Any) -> Any:
        """Answer some cases under a bar; what it took stands on stderr even where there is no terminal."""
        given = {"max_tokens": self.max_tokens, "rows": self.rows, "grammar": self.grammars} | given
        started = time.perf_counter()
        with Progress(console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            task = progress.add_task(name, total=len(cases))
            found = answer(self.model, self.tokenizer, cases, on_answer=lambda: progress.advance(task), **given)
        many = f"{len(cases)} answer{'s' * (len(cases) != 1)}"
        self.console.print(f"{name}: {many} in {time.perf_counter() - started:.1f} s", highlight=False)
        return found


def show(found: dict[str, Metric], title: str, console: Console) -> None:
    """A table; columns that no figure fills are left out, and a missing figure says why."""
    columns = {
        "value": lambda m: _number(m.value) if m.value is not None else "–",
        "p50": lambda m: _number(m.p50),
        "p90": lambda m: _number(m.p90),
        "p95": lambda m: _number(m.p95),
        "n": lambda m: str(m.n),
        "censored": lambda m: str(m.censored or ""),
        "note": lambda m: (m.note or "") if m.value is None else "",
    }
    filled = {name: [of(m) for m in found.values()] for name, of in columns.items()}
    filled = {name: values for name, values in filled.items() if any(values)}
    table = Table()
    table.add_column("", no_wrap=True)
    for name in filled:
        table.add_column(name, justify="left" if name == "note" else "right")
    for row, (key, m) in enumerate(found.items()):
        table.add_row(f"{key} ({m.unit})", *(values[row] for values in filled.values()))
    console.print(title, highlight=False, soft_wrap=True)
    console.print(table)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


@click.command("evaluate", epilog=EPILOG, short_help="Score tool calls or time answers of a model.")
@click.argument("model")
@click.option("--suite", type=click.Choice(["toolcalls", "speed"]), default="toolcalls", show_default=True)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Conversations, or a folder of BFCL_v4 files [default: the demo's held-out sets]",
)
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="Requests per set")
@click.option("--max-tokens", type=click.IntRange(1), default=96, show_default=True)
@click.option("--rows", type=click.IntRange(1), default=16, show_default=True, help="Requests side by side (toolcalls)")
@click.option("--constrain", is_flag=True, help="Hold calls to the schemas of their tools, forced tokens for free")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object")
def command(
    model: str,
    suite: str,
    data: Path | None,
    limit: int,
    max_tokens: int,
    rows: int,
    constrain: bool,
    as_json: bool,
) -> None:
    """Judge MODEL, packed or float, on the kernels it would ship with."""
    runtime.keep_heap()
    leaderboard = data is not None and data.is_dir() and bool(reader.categories_in(data))
    if leaderboard and suite == "speed":
        raise UserError("the speed suite times conversations, not BFCL cases", where=str(data), hint="give a .jsonl")
    sets = {} if leaderboard else held_out(data, limit)
    loaded, tokenizer, _ = compat.load(model)
    suites = Suites(loaded, tokenizer, max_tokens, rows, constrain, Console(stderr=True))
    if leaderboard:
        assert data is not None
        found = suites.leaderboard(data, limit)
    elif suite == "toolcalls":
        found = suites.tool_calls(sets)
    else:
        found = suites.speed(sets)
    if as_json:
        click.echo(json.dumps({key: metric.to_json() for key, metric in found.items()}, indent=2))
        return
    show(found, f"{model}: measured on {runtime.device_name()}", Console())
