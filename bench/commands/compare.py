"""`bench compare`: the same weights on two paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bench import agreement as agreements
from bench import rounds
from bench.commands.speed import add_residency, finish, jobs
from bench.options import REPORT_FILE, failing, say, workload_options
from bench.recommend import advise
from bench.runners._local import prompt_of
from bench.workloads import Load
from mlxkd.errors import UserError

HELP = """\b
Examples:
  bench compare runs/demo/student runs/demo/bundle
  bench compare runs/demo/student runs/demo/bundle --rounds 10 --html compare.html -o compare.json
"""


def agreement(mlx: str, bundle: str, load: Load) -> list[agreements.Agreement]:
    """Both backends over the workload's prompts, along the MLX model's greedy answers."""
    from mlxkd.decode.opening import open_worker
    from mlxkd.decode.tokens import Prompts

    worker = open_worker(mlx)
    first, second = worker.session(1), open_worker(bundle).session(1)
    if first.vocab_size != second.vocab_size:
        raise UserError(
            f"the vocabularies differ: {first.vocab_size} and {second.vocab_size} tokens",
            where=bundle,
            hint="export this bundle from this model: `mlxkd export`",
        )
    prompts, found = Prompts(worker.tokenizer), []
    for case in load.cases:
        prompt = prompt_of(prompts, case)
        room = min(first.max_context, second.max_context) - len(prompt)
        if room < 1:
            raise UserError(f"a prompt of {len(prompt)} tokens leaves no room", hint="choose shorter requests")
        found.append(agreements.agree(first, second, prompt, min(load.max_tokens, room)))
    return found


@click.command(epilog=HELP, short_help="MLX model or Core ML bundle: same weights, same prompts.")
@click.argument("mlx")
@click.argument("bundle")
@workload_options
@click.option(
    "--rounds", "count", type=click.IntRange(1), default=3, show_default=True, help="Fresh processes per side"
)
@click.option("-o", "--output", type=REPORT_FILE, help="Write the report as JSON")
@click.option("--html", "html_file", type=REPORT_FILE, help="Write the report as HTML")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON")
@failing
def compare(mlx: str, bundle: str, count: int, output: Path | None, html_file: Path | None, as_json: bool,
            **given: Any) -> None:  # fmt: skip
    """Answers, speed and energy of an MLX model and the bundle made from it, and which to ship."""
    if rounds.kind_of(mlx) != "mlx" or rounds.kind_of(bundle) != "bundle":
        raise UserError("compare takes an MLX model and a bundle", hint="bench compare runs/demo/student BUNDLE")
    wanted = dict(zip(("mlx", "bundle"), jobs((mlx, bundle), given).values(), strict=True))
    report, _ = rounds.measure(wanted, rounds=count, kind="compare", seed=given["seed"], say=say)
    add_residency(report)
    found = agreements.summary(agreement(mlx, bundle, wanted["mlx"].load()))
    same = [float(a == b) for a, b in zip(report.answers["mlx"], report.answers["bundle"], strict=True)]
    report.quality.setdefault("bundle", {})["agreement"] = same
    report.quality.setdefault("mlx", {})["agreement"] = [1.0] * len(same)
    report.figures["agreement"] = {
        name: {"value": value, "unit": "nats/token" if name.startswith("kl") else "share", "method": "measured",
               "device": report.rounds[0].device} for name, value in found.items()
    }  # fmt: skip
    advice = advise(report, found)
    report.notes += advice.notes
    finish(report, output, html_file, as_json=as_json, advice=advice)
