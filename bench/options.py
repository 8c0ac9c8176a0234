"""Options that several commands share, and how commands end."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from bench.workloads import names
from mlxkd.errors import UserError

REPORT_FILE = click.Path(path_type=Path, dir_okay=False)
FOLDER = click.Path(path_type=Path, file_okay=False)


def failing(command: Callable[..., Any]) -> Callable[..., Any]:
    """A fault that the person can mend is printed to stderr with its hint; exit code 2."""

    @functools.wraps(command)
    def wrapped(*args: Any, **given: Any) -> Any:
        try:
            return command(*args, **given)
        except UserError as error:
            click.echo(f"bench: {error}", err=True)
            sys.exit(2)

    return wrapped


def workload_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of everything that runs a workload."""
    for option in reversed(
        [
            click.option("--workload", type=click.Choice(names()), default="interactive", show_default=True),
            click.option(
                "--records", type=REPORT_FILE, help="JSON lines of conversations instead of the built-in requests"
            ),
            click.option("--requests", type=click.IntRange(1), help="Requests per round [default: the workload's own]"),
            click.option("--max-tokens", type=click.IntRange(1), default=64, show_default=True, help="Per request"),
            click.option(
                "--batch-policy", default="auto", show_default=True, metavar="auto|N", help="Rows decoded together"
            ),
            click.option("--draft", type=click.Choice(["none", "ngram"]), default="none", show_default=True),
            click.option("--seed", type=int, default=0, show_default=True),
            click.option("--model", help="Model name at an endpoint [default: its first]"),
        ]
    ):
        command = option(command)
    return command


def batch_policy(text: str) -> Any:
    """ "auto" or a number of rows; raises UserError."""
    if text == "auto" or (text.isdigit() and int(text) > 0):
        return text if text == "auto" else int(text)
    raise UserError(f"--batch-policy {text!r} is neither auto nor a number", hint="try --batch-policy 4")


def say(line: str) -> None:
    """Progress, on stderr."""
    click.echo(line, err=True)


def show(document: Any, tree: dict[str, Any] | None, *, as_json: bool) -> None:
    """Data on stdout: JSON, or the document as Markdown."""
    click.echo(json.dumps(tree, ensure_ascii=False, indent=2) if as_json else document.markdown(), nl=as_json)
