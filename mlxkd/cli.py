"""The ``mlxkd`` command: thin wrappers around plain functions."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mlxkd.errors import UserError

# Commands that live in other rooms: name -> (module, attribute). Imported only when asked for.
ROOMS: dict[str, tuple[str, str]] = {
    "data": ("mlxkd.data.inspect", "data_group"),
    "evaluate": ("mlxkd.evaluation.command", "command"),
    "export": ("ane.convert.command", "command"),
    "generate": ("mlxkd.decode.command", "make_command()"),
    "mil": ("ane.mil.command", "mil"),
    "quantize": ("mlxkd.quant.command", "command"),
}


class Commands(click.Group):
    """Loads a command's module when it is used, prints UserErrors plainly and exits with 2."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *ROOMS])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in ROOMS:
            module, attribute = ROOMS[cmd_name]
            found: Any = getattr(importlib.import_module(module), attribute.removesuffix("()"))
            command: click.Command = found() if attribute.endswith("()") else found
            return command
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(2)


class RecipeCommand(click.Command):
    """A command whose recipe is an option, and who says so when one stands alone."""

    allow_extra_args = True

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        if rest and not ctx.resilient_parsing:
            raise click.UsageError(f"{rest[0]} stands alone: a recipe is given as --recipe {rest[0]}", ctx)
        return rest


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mlxkd")
def main() -> None:
    """Distil and quantise small tool-calling language models.

    \b
    mlxkd train                                  the demo, from start to finish
    mlxkd generate runs/demo/student "wake me up at 7"
    mlxkd doctor                                 is this machine ready?
    """


def with_json(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --json."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")(command)


@main.command(cls=RecipeCommand, epilog="Example: mlxkd train --set training.steps=100 --out runs")
@click.option("--recipe", default="demo", show_default=True, help="A shipped recipe's name, or a YAML file.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe key; repeatable.")
@click.option("--teacher", help="Teacher: folder or Hugging Face repository (sets teacher.model).")
@click.option("--data", help="Training data: file or folder (sets data.train).")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs"), show_default=True)
@click.option("--name", help="Name of the run folder (sets name).")
@click.option("--resume", is_flag=True, help="Continue from the last checkpoint.")
@click.option("--print-recipe", is_flag=True, help="Print the resolved recipe and stop.")
@with_json
def train(
    recipe: str,
    overrides: tuple[str, ...],
    teacher: str | None,
    data: str | None,
    out: Path,
    name: str | None,
    resume: bool,
    print_recipe: bool,
    as_json: bool,
) -> None:
    """Distil a student; without arguments, the embedded demo."""
    resolved = _resolve(recipe, overrides, teacher=teacher, data=data, name=name)
    if print_recipe:
        click.echo(resolved.to_yaml(), nl=False)
        return
    from rich.console import Console

    from mlxkd import runtime
    from mlxkd.training import summary
    from mlxkd.training.loop import Interrupted
    from mlxkd.training.result import to_json
    from mlxkd.training.run import train as run

    runtime.keep_heap()
    runtime.set_device(resolved.device)
    try:
        result = run(resolved, out, resume=resume, console=Console(stderr=True))
    except Interrupted as stop:
        click.echo(f"\nstopped after step {stop.step}; continue with: {_command_line()} --resume", err=True)
        sys.exit(130)
    summary.write_report(result)
    if as_json:
        click.echo(json.dumps(to_json(result), indent=2))
        return
    Console().print(summary.terminal_table(result))
    for line in summary.closing_lines(result):
        click.echo(line)


TEACH_EXAMPLES = """\b
Examples:
  mlxkd teach --teacher big-model --data train.jsonl --out cache
  mlxkd teach --endpoint http://localhost:8080/v1 --model big --data asked.jsonl --out train.jsonl --deterministic
"""


@main.command(cls=RecipeCommand, epilog=TEACH_EXAMPLES)
@click.option("--recipe", default="demo", show_default=True, help="A shipped recipe's name, or a YAML file.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe key; repeatable.")
@click.option("--teacher", help="Teacher: folder or Hugging Face repository (sets teacher.model).")
@click.option("--data", help="Training data: file or folder (sets data.train).")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the cache, or JSONL to write.")
@click.option("--endpoint", metavar="URL", help="Ask an OpenAI-compatible server instead; its key: OPENAI_API_KEY.")
@click.option("--model", help="The endpoint's model.")
@click.option("--concurrency", type=click.IntRange(1), default=4, show_default=True, help="Requests at a time.")
@click.option("--max-tokens", type=click.IntRange(1), default=1024, show_default=True, help="Longest answer.")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Sent with every request.")
@click.option("--top-logprobs", type=click.IntRange(0, 20), default=0, help="Alternatives kept per token.")
@click.option("--max-requests", type=click.IntRange(1), help="Stop after so many requests.")
@click.option("--budget-tokens", type=click.IntRange(1), help="Stop after so many tokens by the server's count.")
@click.option("--timeout", type=click.FloatRange(0, min_open=True), default=120.0, show_default=True, help="Seconds.")
@click.option("--retries", type=click.IntRange(0), default=5, show_default=True, help="Per request.")
@click.option("--deterministic", is_flag=True, help="Greedy; ask some questions again and report what differs.")
@with_json
def teach(recipe: str, overrides: tuple[str, ...], teacher: str | None, data: str | None, out: Path,
          endpoint: str | None, as_json: bool, **given: Any) -> None:  # fmt: skip
    """Ask the teacher once and keep what it says. Resumable.

    A model writes a cache (train with --set teacher.cache=OUT); an endpoint writes training data (--data OUT).
    """
    if endpoint:
        from mlxkd.teachers.command import ask_endpoint, show

        found = ask_endpoint({**given, "endpoint": endpoint, "data": data, "out": out})
        sys.exit(show(found, out, as_json=as_json))
    from rich.console import Console

    from mlxkd import runtime
    from mlxkd.training.run import fill_cache

    resolved = _resolve(recipe, overrides, teacher=teacher, data=data)
    runtime.keep_heap()
    runtime.set_device(resolved.device)
    count = fill_cache(resolved, out, Console(stderr=True))
    click.echo(json.dumps({"out": str(out), "texts": count}) if as_json else f"{out}: {count} texts")


def _resolve(
    recipe: str, overrides: tuple[str, ...], *, teacher: str | None, data: str | None, **more: str | None
) -> Any:
    """The recipe under the flags of a command; flags first, so that --set has the last word."""
    from mlxkd.recipe import load_recipe

    given = {"teacher.model": teacher, "data.train": data, **more}
    flags = [f"{key}={json.dumps(value)}" for key, value in given.items() if value]
    if data:
        flags.append("data.demo=null")
    return load_recipe(recipe, (*flags, *overrides))


def _command_line() -> str:
    return " ".join(["mlxkd", *[a for a in sys.argv[1:] if a != "--resume"]])


@main.command()
@with_json
def doctor(as_json: bool) -> None:
    """Say whether this machine can train, and what would mend it; exits 1 when it cannot."""
    from mlxkd.doctor import examine

    findings = examine()
    if as_json:
        click.echo(json.dumps([f.to_json() for f in findings], indent=2))
    else:
        for finding in findings:
            click.echo(f"{finding.status:8} {finding.id:13} {finding.observed}")
            if finding.fix:
                click.echo(f"{'':22} hint: {finding.fix}")
    if any(f.status == "error" for f in findings):
        sys.exit(1)
