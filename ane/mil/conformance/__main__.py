"""``python -m ane.mil.conformance``: harvest the suite, replay it, choose the sample for CI."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from ane.mil.conformance import case, suite, table
from mlxkd.errors import UserError
from mlxkd.files import atomic_file, write_json

ROOT = click.option(
    "--cache", type=click.Path(path_type=Path, file_okay=False), help="Where cases live (default: the user's cache)."
)


@click.group()
def main() -> None:
    """Run coremltools' operation tests against the reference runtime.

    \b
    python -m ane.mil.conformance harvest --seconds 600
    python -m ane.mil.conformance replay
    """


def _root(cache: Path | None) -> Path:
    return cache or case.cache_folder()


@main.command()
@click.option("--seconds", type=float, default=600.0, show_default=True, help="Stop after this long.")
@click.option("--only", multiple=True, help="Part of the suite: a file or a test, as iOS17/test_conv.py::TestConv.")
@ROOT
def harvest(seconds: float, only: tuple[str, ...], cache: Path | None) -> None:
    """Store cases, round-robin over the suite; the next call goes on where this one ends."""
    root = _root(cache)
    root.mkdir(parents=True, exist_ok=True)
    suite.run(only or None, results=root / "harvest.jsonl", store=root / "cases", seconds=seconds)
    click.echo(f"{sum(1 for _ in case.stored(root / 'cases'))} cases in {root}", err=True)


@main.command()
@click.option("--docs", type=click.Path(path_type=Path), help="Write the page here, as docs/mil-conformance.md.")
@ROOT
def replay(docs: Path | None, cache: Path | None) -> None:
    """Run every stored case with the present code and write what came of it."""
    root = _root(cache)
    records = replayed(root)
    page = table.markdown(records, f"{suite.version()}")
    if docs is None:
        click.echo(page)
    else:
        with atomic_file(docs) as temporary:
            temporary.write_text(page, encoding="utf-8")
    failed = sum(r["status"] == "failed" for r in records)
    click.echo(f"{failed} failed", err=True)
    sys.exit(bool(failed))


def replayed(root: Path) -> list[table.Record]:
    """Fresh records of every stored case, with what the harvest noted about the tests; kept in ``replay.jsonl``.

    Raises:
        UserError: nothing is stored.
    """
    fresh = list(suite.replay(root / "cases"))
    if not fresh:
        raise UserError("no case is stored", where=str(root), hint="python -m ane.mil.conformance harvest")
    noted = [r for r in suite.read_results(root / "harvest.jsonl") if r["status"] in ("nothing", "collected")]
    with atomic_file(root / "replay.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(r) + "\n" for r in (*noted, *fresh)), encoding="utf-8")
    return [*noted, *fresh]


@main.command()
@ROOT
def sample(cache: Path | None) -> None:
    """Choose from the last replay the tests that CI repeats, into sample.json."""
    chosen = table.choose(suite.read_results(_root(cache) / "replay.jsonl"))
    write_json(suite.SAMPLE, {"coremltools": suite.version(), **chosen})
    click.echo(f"{len(chosen['every_run'])} tests for every run, {len(chosen['strata'])} in all", err=True)


def run() -> None:
    """Entry point: a user's mistake ends with its message and code 2."""
    try:
        main()
    except UserError as error:
        click.echo(str(error), err=True)
        sys.exit(2)


if __name__ == "__main__":
    run()
