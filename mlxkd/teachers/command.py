"""The body of ``mlxkd teach --endpoint``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress

from mlxkd.data.records import load_records
from mlxkd.errors import UserError
from mlxkd.teachers.harvest import Budget, Harvest, harvest, questions
from mlxkd.teachers.http import Asking, HttpTeacher

REPLAYED = 8


def ask_endpoint(given: dict[str, Any]) -> Harvest:
    """Ask an endpoint about a dataset; see ``mlxkd teach --help``.

    Raises:
        UserError: no data or no model named, faulty records, or an endpoint that fails.
    """
    for name in ("data", "model"):
        if not given[name]:
            raise UserError(f"an endpoint needs --{name}", where="mlxkd teach --endpoint")
    if given["deterministic"] and given["temperature"]:
        raise UserError("--deterministic asks at temperature 0", where="--temperature", hint="leave it out")
    asking = Asking(given["model"], given["max_tokens"], given["temperature"], given["seed"], given["top_logprobs"])
    asked = questions(load_records(given["data"]), asking, given["endpoint"])
    budget = Budget(given["max_requests"], given["budget_tokens"])
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("asking the endpoint", total=None)
        return harvest(
            HttpTeacher(given["endpoint"], asking, timeout=given["timeout"], retries=given["retries"]),
            asked,
            Path(given["out"]),
            budget=budget,
            concurrency=given["concurrency"],
            replay=REPLAYED if given["deterministic"] else 0,
            on_answer=lambda done, total: progress.update(task, completed=done, total=total),
        )


def show(found: Harvest, out: Path, *, as_json: bool) -> int:
    """Say what came of it; returns the exit code: 0 whole, 1 when questions are left or answers drift."""
    if as_json:
        tree = {**vars(found), "fingerprints": sorted(found.fingerprints), "out": str(out)}
        click.echo(json.dumps(tree, ensure_ascii=False, indent=1))
    else:
        tokens = "tokens not counted by the server" if found.tokens is None else f"{found.tokens} tokens"
        click.echo(f"{out}: {found.asked} asked ({tokens}), {found.known} known before")
        if found.fingerprints:
            click.echo(f"system fingerprints: {', '.join(sorted(found.fingerprints))}")
        if found.replayed:
            click.echo(f"{found.replayed} answers asked for again, {len(found.drift)} differ")
        for entry in found.drift:
            click.echo(f"  drift in {entry['key']}: {entry['first']} then {entry['again']}")
        if found.left:
            click.echo(f"the budget ran out with {found.left} left; the same command goes on from here")
    return 1 if found.left or found.drift else 0
