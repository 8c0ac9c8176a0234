"""The body of ``mlxkd export``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from ane.convert.options import CHUNK_BYTES, KEEP, TARGETS, Options

EPILOG = """\b
Examples:
  mlxkd export runs/demo/student --to coreml --out student.bundle
  mlxkd export model --to coreml --out model.bundle --profile gpu --context 4096
  mlxkd export model --to coreml --out model.bundle --weights ane-lut4 --batch 1,2 --check 50
"""


def _sizes(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[int, ...]:
    """Batch sizes from ``--batch 1,2 --batch 4``."""
    try:
        return tuple(int(part) for value in values for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{','.join(values)!r} is no list of sizes, as 1,2,4") from error


@click.command("export", epilog=EPILOG, short_help="Write a Core ML bundle of a model.")
@click.argument("model")
@click.option("--to", type=click.Choice(["coreml"]), default="coreml", show_default=True, help="Kind of bundle")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Bundle folder, replaced when all is done")
@click.option("--profile", type=click.Choice(["ane", "gpu"]), default="ane", show_default=True)
@click.option("--target", type=click.Choice(TARGETS), default="iOS18", show_default=True, help="Oldest system")
@click.option(
    "--context", type=int, help="Tokens per row, a multiple of 32 [default: 2048, or the model's longest if less]"
)
@click.option("--prefill", type=int, default=64, show_default=True, help="Tokens per prefill call")
@click.option("--verify", type=int, default=0, help="Tokens per verify call (drafts + 1) [default: no such function]")
@click.option(
    "--batch", multiple=True, default=("1",), callback=_sizes, metavar="N,...", help="Rows, as 1,2,4 [default: 1]"
)
@click.option("--kv", type=click.Choice(["state", "explicit"]), default="state", show_default=True)
@click.option("--embedding", type=click.Choice(["host", "model"]), help="Who embeds [default: by profile]")
@click.option("--positions", type=click.Choice(["host", "model"]), help="Who makes masks and rotary tables")
@click.option("--head", type=click.Choice(["logits", "argmax"]), default="logits", show_default=True)
@click.option("--head-width", type=int, help="Vocabulary rows per head convolution [default: by profile; 0: all]")
@click.option("--chunk-bytes", type=int, default=CHUNK_BYTES, show_default=True, help="Most weight bytes per package")
@click.option("--chunks", type=int, help="Exact number of packages")
@click.option("--rewind", type=int, default=64, show_default=True, help="Tokens a sliding window can go back")
@click.option("--weights", default=KEEP, show_default=True, help='"keep", "float", or a grid to quantise to')
@click.option("--master", type=click.Path(path_type=Path), help="Float model to quantise from [default: MODEL itself]")
@click.option("--check", "steps", type=click.IntRange(0), default=0, help="Compare so many greedy tokens with MLX")
@click.option("--chip", help="Chip whose rules the lint applies [default: the rule table's]")
@click.option("--strict", is_flag=True, help="Exit 1 on lint warnings too")
def command(model: str, to: str, out: Path, steps: int, chip: str | None, strict: bool, **choices: Any) -> None:
    """Convert MODEL, an mlx-lm folder or repository, for Core ML."""
    from ane.convert.card import size
    from ane.convert.export import export
    from ane.convert.lint import lint
    from ane.convert.progress import Bar
    from ane.residency.chips import chip as known_chip
    from ane.residency.predict import DEFAULT_CHIP

    target = known_chip(chip or DEFAULT_CHIP).name  # an unknown one is refused before anything is replaced
    with Bar() as bar:
        manifest = export(model, out, Options(**choices), bar)
        bar.stage("applying the residency rules")
        found = lint(out, target) if manifest.profile == "ane" else None
    click.echo(f"{out}: {size(manifest)}", err=True)
    if manifest.expected_loss:
        losses = sorted(manifest.expected_loss.values())
        click.echo(
            f"quantised on export, not trained for {choices['weights']}: relative weight error median "
            f"{losses[len(losses) // 2]:.3f}, worst {losses[-1]:.3f}; check the model's quality before shipping",
            err=True,
        )
    passed = True
    if found is not None:
        for text in found.lines():
            click.echo(text, err=True)
        passed = not found.failures and not (strict and found.warnings)
    if steps:
        passed = _check(model, out, steps, manifest.expected_loss) and passed
    sys.exit(0 if passed else 1)


def _check(model: str, out: Path, steps: int, lossy: dict[str, float]) -> bool:
    from ane.convert.check import check
    from ane.convert.progress import Bar

    if lossy:
        click.echo("the check compares with the unquantised model: differences are the quantisation's", err=True)
    with Bar("tokens") as bar:
        outcome = check(model, out, steps, progress=bar)
    click.echo(outcome.text())
    return outcome.passed or bool(lossy)
