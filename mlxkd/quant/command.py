"""The body of ``mlxkd quantize``: post-training quantisation and mixed-precision proposals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import numpy as np
from click.core import ParameterSource
from rich.console import Console
from rich.progress import Progress

from mlxkd import compat
from mlxkd.data.records import load_records
from mlxkd.data.render import render_all
from mlxkd.errors import UserError
from mlxkd.quant.baselines import DWQ_RATE, post_training
from mlxkd.quant.grids import grid
from mlxkd.quant.modules import master_shape
from mlxkd.quant.pack import Packed, save_student
from mlxkd.quant.plan import quantisable
from mlxkd.quant.propose import CANDIDATES, Proposal, divergence, propose
from mlxkd.runtime import device_name

BATCH = 4  # rows that a sensitivity run holds the logits of

EPILOG = """\b
Examples:
  mlxkd quantize model out --grid mlx-affine4-g64
  mlxkd quantize model out --grid "mlx-affine4-g32|float" --rule "*embed*=mlx-affine8-g32"
  mlxkd quantize model out --budget 3.5bpw --data texts.jsonl
  mlxkd quantize model out --budget 5bpw --data texts.jsonl --candidate ane-lut4 --candidate ane-lut8
  mlxkd quantize model out --grid mlx-affine3-g64 --fitted-ranges
  mlxkd quantize model out --method dwq --fitted-ranges --data texts.jsonl --rate 3e-4
"""


def parse_budget(text: str) -> float:
    """ "3.5bpw" or "3.5" as bits per weight.

    Raises:
        UserError: anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:bpw)?", text.strip())
    if not found:
        raise UserError(f"{text!r} is no budget", hint="write bits per weight, e.g. --budget 3.5bpw")
    return float(found[1])


def parse_rules(rules: tuple[str, ...]) -> list[tuple[str, str]]:
    """PATTERN=GRID pairs.

    Raises:
        UserError: a rule without "=".
    """
    bad = [rule for rule in rules if "=" not in rule]
    if bad:
        raise UserError(f"{bad[0]!r} is no rule", hint='write "PATTERN=GRID", e.g. --rule "*embed*=mlx-affine8-g64"')
    return [(pattern, name) for pattern, _, name in (rule.partition("=") for rule in rules)]


def token_rows(data: Path | None, tokenizer: Any, rows: int, width: int) -> np.ndarray | None:
    """Calibration tokens int32 [rows, width] from training data, in its order; None without data.

    Raises:
        UserError: too little text for one row.
    """
    if data is None:
        return None
    stream = np.concatenate([example.tokens for example in render_all(load_records(data), tokenizer)])
    count = min(rows, len(stream) // width)
    if not count:
        raise UserError(f"{len(stream)} tokens do not fill a row of {width}", where=str(data), hint="lower --width")
    return stream[: count * width].reshape(count, width).astype(np.int32)


@click.command("quantize", epilog=EPILOG, short_help="Quantise a model after training, or within a size budget.")
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--grid", "grid_name", default="mlx-affine4-g64", show_default=True, help='Grid, or "a|b|float".')
@click.option("--method", type=click.Choice(["rtn", "dwq", "awq", "gptq"]), default="rtn", show_default=True)
@click.option("--fitted-ranges", is_flag=True, help="Affine ranges of small squared error (rtn), DWQ's start (dwq).")
@click.option("--rule", "rules", multiple=True, metavar="PATTERN=GRID", help="Exception for layers; repeatable.")
@click.option("--budget", help="Bits per weight: choose a grid for each layer by sensitivity, e.g. 3.5bpw.")
@click.option("--candidate", "candidates", multiple=True, metavar="GRID", help="For --budget; repeatable.")
@click.option("--data", type=click.Path(path_type=Path), help="Calibration text, as for training.")
@click.option("--rows", type=click.IntRange(1), default=64, show_default=True, help="Calibration rows.")
@click.option("--width", type=click.IntRange(2), default=256, show_default=True, help="Tokens in a row.")
@click.option("--rate", type=float, default=DWQ_RATE, show_default=True, help="Learning rate of dwq.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
@click.pass_context
def command(context: click.Context, model: str, out: Path, rules: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Write a quantised mlx-lm folder. `mlxkd train` trains on the grid; docs/quantisation.md compares the methods."""
    folder = compat.resolve_model(model)
    loaded, tokenizer, config = compat.load(folder)
    calibration = token_rows(given["data"], tokenizer, given["rows"], given["width"])
    pairs, proposal = parse_rules(rules), None
    name = given["grid_name"]
    if given["candidates"] and not given["budget"]:
        raise UserError("--candidate says what --budget may choose from", hint="give --budget, or one --grid")
    if given["budget"]:
        chosen = context.get_parameter_source("grid_name") is not ParameterSource.DEFAULT
        if calibration is None or given["method"] != "rtn" or pairs or chosen or given["fitted_ranges"]:
            raise UserError(
                "--budget needs --data, and goes with neither --grid, --rule, --fitted-ranges nor a --method but rtn",
                hint="name the grids it may choose from with --candidate",
            )
        proposal = _proposed(
            loaded, _batches(calibration), parse_budget(given["budget"]), given["candidates"] or CANDIDATES
        )
        name, pairs = "float", proposal.rules()
    sizes = {path: master_shape(module) for path, module in quantisable(loaded).items()}
    method = {key: given[key] for key in ("method", "fitted_ranges")}
    packed = post_training(loaded, config, name, rules=pairs, rows=calibration, rate=given["rate"], **method)
    save_student(out, packed, folder, method)
    summary = {"out": str(out), "bits_per_weight": average_bits(packed, sizes), "grids": packed.grids}
    if proposal and calibration is not None:
        summary["divergence"] = {
            "unit": "nats per token",
            "device": device_name(),
            "measured": divergence(loaded, packed.model, _batches(calibration)),
            "predicted": proposal.divergence,  # the layers' own, added up
        }
    click.echo(json.dumps(summary, indent=2) if as_json else _words(summary, proposal))


def _batches(rows: np.ndarray) -> list[mx.array]:
    return [mx.array(rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)]


def _proposed(model: Any, batches: list[mx.array], budget: float, candidates: tuple[str, ...]) -> Proposal:
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("measuring layers", total=None)
        return propose(
            model, batches, budget, candidates, lambda done, total: progress.update(task, completed=done, total=total)
        )


def average_bits(packed: Packed, sizes: dict[str, tuple[int, ...]]) -> float:
    """Stored bits per weight over the quantisable layers; float ones at 16."""
    bits, total = 0.0, 0
    for path, shape in sizes.items():
        size = int(np.prod(shape))
        bits += size * (grid(packed.grids[path]).bits_per_weight(shape) if path in packed.grids else 16)
        total += size
    return bits / total


def _words(summary: dict[str, Any], proposal: Proposal | None) -> str:
    lines = [f"{summary['out']}: {summary['bits_per_weight']:.3g} bits per weight"]
    if proposal:
        lines += [f"  {name:18} {layer}" for layer, name in proposal.plan.items()]
        found = summary["divergence"]
        lines.append(
            f"divergence from the float model: {found['measured']:.4g} nats per token (measured on "
            f"{found['device']}); the layers' own add up to {found['predicted']:.4g} (predicted)"
        )
    return "\n".join(lines)
