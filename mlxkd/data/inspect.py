"""What training would see of a data file: spans in colour, lengths, and what would be truncated or skipped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlxkd import compat
from mlxkd.data.batching import Batches, Report, Shape
from mlxkd.data.example import Example
from mlxkd.data.records import load_records
from mlxkd.data.render import RenderOptions, render
from mlxkd.errors import UserError

# From what covers most to what says most: on a shared token the later colour wins.
STYLES = {
    "turn": "white",
    "structure": "blue",
    "preamble": "italic yellow",
    "end": "bold blue",
    "key": "cyan",
    "name": "bold magenta",
    "value": "bold green",
    "evidence": "bold yellow",
    "stop": "bold red",
}
CONTEXT = "bright_black"
EPILOG = """\b
Examples:
  mlxkd data inspect train.jsonl --model runs/demo/student
  mlxkd data inspect train.jsonl --model mlx-community/Qwen3-0.6B-4bit --shape 8x512 --shape 2x2048
"""


@dataclass
class Inspection:
    """Figures of one data file.

    Args:
        examples: rendered records.
        faults: one line per record that cannot be rendered, at most as many as records.
        report: what batching would do, or None when nothing is usable.
        unusable: why nothing is, or None.
    """

    examples: list[Example]
    faults: list[str] = field(default_factory=list)
    report: Report | None = None
    unusable: str | None = None

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 [n]."""
        return np.array([len(example) for example in self.examples], dtype=np.int64)

    def tokens_by_kind(self) -> Counter[str]:
        """Tokens in spans of each kind; a token on a border counts on both sides."""
        counts: Counter[str] = Counter()
        for example in self.examples:
            for span in example.spans:
                counts[span.kind] += span.end - span.start
        return counts


def inspect(
    path: str | Path,
    tokenizer: Any,
    shapes: Sequence[Shape],
    *,
    limit: int | None = None,
    options: RenderOptions | None = None,
) -> Inspection:
    """Read, render and batch a file as training would, collecting faults of rendering instead of stopping.

    Raises:
        UserError: the file itself cannot be read (names file, line and field).
    """
    examples: list[Example] = []
    faults: list[str] = []
    for record in load_records(path, limit):
        try:
            examples.append(render(record, tokenizer, options))
        except UserError as error:
            faults.append(str(error).splitlines()[0])
    found = Inspection(examples, faults)
    try:
        found.report = Batches(examples, shapes).report
    except UserError as error:
        found.unusable = error.what
    return found


def coloured(example: Example, tokenizer: Any) -> Text:
    """The example's text: each span in its colour, context dim."""
    kind = ["" for _ in range(len(example))]
    order = list(STYLES)
    for span in sorted(example.spans, key=lambda s: order.index(s.kind)):
        kind[span.start : span.end] = [span.kind] * (span.end - span.start)
    text = Text()
    start = 0
    for i in range(1, len(kind) + 1):
        if i == len(kind) or kind[i] != kind[start] or (example.weights[i] > 0) != (example.weights[start] > 0):
            piece = tokenizer.decode(example.tokens[start:i].tolist())
            plain = "white" if example.weights[start] > 0 else CONTEXT
            text.append(piece, STYLES.get(kind[start], plain))
            start = i
    return text


def show(found: Inspection, tokenizer: Any, console: Console, *, samples: int = 3) -> None:
    """Print samples, counts and lengths."""
    for example in found.examples[:samples]:
        console.rule(example.source, style=CONTEXT)
        console.print(coloured(example, tokenizer), soft_wrap=True)
    console.rule(style=CONTEXT)
    console.print(
        Text.assemble("spans: ", *((f"{kind} ", style) for kind, style in STYLES.items()), ("context", CONTEXT))
    )
    console.print(_table(found))
    for line in found.report.lines() if found.report else [f"nothing usable: {found.unusable}"]:
        console.print(line, highlight=False)
    for fault in found.faults:
        console.print(Text(f"cannot be rendered: {fault}", "red"))


def _table(found: Inspection) -> Table:
    table = Table("", "count", title=None)
    lengths = found.lengths
    table.add_row("examples", str(len(found.examples)))
    if len(lengths):
        for name, q in (("shortest", 0.0), ("median", 0.5), ("95 %", 0.95), ("longest", 1.0)):
            table.add_row(f"tokens, {name}", str(int(np.quantile(lengths, q, method="inverted_cdf"))))
    supervised = sum(example.supervised for example in found.examples)
    table.add_row("supervised tokens", f"{supervised} of {int(lengths.sum())}")
    for kind, count in sorted(found.tokens_by_kind().items()):
        table.add_row(f"  in {kind}", str(count))
    if found.report:
        for (rows, length), batches in found.report.shapes.items():
            table.add_row(f"batches of {rows}x{length}", str(batches))
    return table


def parse_shape(text: str) -> Shape:
    """ "8x512" as (8, 512)."""
    rows, _, length = text.partition("x")
    if not (rows.isdecimal() and length.isdecimal()):
        raise UserError(f"a shape looks like 8x512, not {text!r}", where="--shape")
    return int(rows), int(length)


@click.command("inspect", epilog=EPILOG, short_help="Show what training would see of a data file.")
@click.argument("path", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="Folder or repository whose tokenizer and chat template are used")
@click.option("--shape", "shapes", multiple=True, default=("8x512", "4x1024", "2x2048"), show_default=True)
@click.option("--samples", type=click.IntRange(0), default=3, show_default=True, help="Examples to print in colour")
@click.option("--limit", type=click.IntRange(1), help="Read so many records at most")
def inspect_command(path: Path, model: str, shapes: tuple[str, ...], samples: int, limit: int | None) -> None:
    """Show what training would see of a data file: spans in colour, counts, lengths, truncation."""
    tokenizer = compat.load_tokenizer(compat.resolve_model(model))
    found = inspect(path, tokenizer, [parse_shape(shape) for shape in shapes], limit=limit)
    show(found, tokenizer, Console(), samples=samples)
    if found.faults or found.unusable:
        raise SystemExit(1)


data_group = click.Group("data", {"inspect": inspect_command}, short_help="Look at training data.")
