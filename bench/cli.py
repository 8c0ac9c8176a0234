"""The `bench` command."""

from __future__ import annotations

import click

from bench.commands import compare, judge, residency, speed

GUIDE = """\
bench measures what you would ship and says whether it got worse.

What to do next:
  1. Is my machine quiet enough to tell?   bench calibrate runs/demo/student
  2. How fast is it?                       bench speed runs/demo/student -o report.json --html report.html
  3. Would it run on the Neural Engine?    bench ane-residency BUNDLE
  4. MLX model or Core ML bundle?          bench compare runs/demo/student BUNDLE
  5. Does it still call tools right?       bench toolcalls runs/demo/student
  6. Keep a good report as the baseline:   bench bless report.json --reason "first release"
  7. Is today's build worse?               bench gate report.json

A target is an MLX model folder, a bundle made by `mlxkd export`, or the URL of an OpenAI-compatible server.
Exit codes: 0 pass, 1 fail, 2 could not run, 3 cannot tell. `bench COMMAND --help` ends in examples.
"""


@click.group(invoke_without_command=True, short_help="Measure models and gate releases.")
@click.version_option(package_name="mlxkd", prog_name="bench")
@click.pass_context
def main(context: click.Context) -> None:
    """Measure MLX models, Core ML bundles and endpoints; gate releases on the figures.

    \b
    Examples:
      bench speed runs/demo/student
      bench gate report.json
    """
    if context.invoked_subcommand is None:
        click.echo(GUIDE, nl=False)


for command in (
    speed.speed, compare.compare, residency.ane_residency, speed.toolcalls, judge.gate, judge.bless, judge.calibrate,
    judge.report,
):  # fmt: skip
    main.add_command(command)
