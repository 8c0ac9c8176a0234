"""``python -m ane.mil PACKAGE``: look at a package, and run it."""

from __future__ import annotations

import json
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import click
import numpy as np

from ane.mil.inputs import random_inputs
from ane.mil.limits import Limits, human
from ane.mil.package import Function, Package, load
from ane.mil.program import Feature
from ane.mil.trace import Entry
from mlxkd.errors import UserError
from mlxkd.files import atomic_file

EXAMPLES = """
Examples:

\b
  python -m ane.mil model.mlpackage
  python -m ane.mil model.mlpackage --run
  python -m ane.mil model.mlpackage --run --function decode --inputs x.npz --outputs y.npz
  python -m ane.mil model.mlpackage --trace --mode fp16 --json
"""


@click.command("mil", epilog=EXAMPLES)
@click.argument("package", type=click.Path(path_type=Path))
@click.option("--function", "name", help="Function to run or trace (default: the package's own default).")
@click.option("--run", "running", is_flag=True, help="Run it, on random inputs unless --inputs names some.")
@click.option("--trace", "tracing", is_flag=True, help="Run it and list every intermediate with its range.")
@click.option("--inputs", type=click.Path(path_type=Path), help="An .npz file with the inputs by name.")
@click.option("--outputs", type=click.Path(path_type=Path), help="Where to save the outputs, as .npz.")
@click.option("--mode", type=click.Choice(["exact", "fp16"]), default="exact", show_default=True, help="Precision.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of random inputs and random operations.")
@click.option("--memory", type=float, help="GiB that tensors may take (default: half of the machine's).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def mil(package: Path, as_json: bool, **options: Any) -> None:
    """Print functions, inputs, outputs, states, operations and weight bytes of an .mlpackage; run it.

    Exits 0 when it could be read (and run), 2 when it could not.
    """
    try:
        report = _report(package, **options)
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    click.echo(json.dumps(report, indent=2) if as_json else as_text(report))


def main() -> None:
    """Entry point of ``python -m ane.mil``."""
    mil(prog_name="python -m ane.mil")


def _report(
    path: Path,
    name: str | None,
    running: bool,
    tracing: bool,
    inputs: Path | None,
    outputs: Path | None,
    mode: Any,
    seed: int,
    memory: float | None,
) -> dict[str, Any]:
    package = load(path, limits=Limits(memory=int(memory * 2**30) if memory else None))
    report = summary(package)
    if running or tracing or inputs or outputs:
        function = package.function(name)
        given = _read(inputs) if inputs else random_inputs(function.spec, seed, function.limits)
        report["run"] = execute(function, given, tracing=tracing, mode=mode, seed=seed, outputs=outputs)
    return report


def summary(package: Package) -> dict[str, Any]:
    """What a package contains, as plain data."""
    return {
        "path": package.spec.path,
        "specification_version": package.spec.version,
        "default_function": package.default,
        "metadata": package.metadata,
        "weight_bytes": package.weight_bytes(),
        "functions": {name: _function(function) for name, function in package.functions.items()},
    }


def _function(function: Function) -> dict[str, Any]:
    return {
        "opset": function.spec.opset,
        "inputs": {name: _feature(f) for name, f in function.inputs.items()},
        "outputs": {name: _feature(f) for name, f in function.outputs.items()},
        "states": {name: str(t) for name, t in function.states.items()},
        "operations": dict(function.operations().most_common()),
        "unsupported": list(function.unsupported()),
    }


def _feature(feature: Feature) -> str:
    if feature.shapes:
        shape = " or ".join(str(list(s)) for s in feature.shapes)
    elif feature.ranges:
        shape = "[" + ", ".join(_span(low, high) for low, high in feature.ranges) + "]"
    else:
        shape = str(list(feature.shape)) if feature.shape else ""
    kind = {"array": "", "image": f"{feature.color} image "}.get(feature.kind, f"{feature.kind} ")
    return f"{kind}{feature.dtype}{shape}" + (" optional" if feature.optional else "")


def _span(low: int, high: int | None) -> str:
    return str(low) if low == high else f"{low}..{'' if high is None else high}"


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"no .npz file of inputs: {error}", where=str(path)) from error


def execute(
    function: Function, given: dict[str, np.ndarray], *, tracing: bool, mode: Any, seed: int, outputs: Path | None
) -> dict[str, Any]:
    """Run a function once on ``given`` (fresh states), and describe what came out."""
    state = function.make_state() if function.states else None
    start = time.perf_counter()
    entries: list[Entry] = []
    if tracing:
        trace = function.trace(given, state, mode=mode, seed=seed, keep=False)
        results, entries = trace.outputs, trace.entries
    else:
        results = function.predict(given, state, mode=mode, seed=seed)
    seconds = time.perf_counter() - start
    if outputs:
        with atomic_file(outputs) as temporary, temporary.open("wb") as stream:
            arrays: dict[str, Any] = {name: value for name, value in results.items() if isinstance(value, np.ndarray)}
            np.savez(stream, **arrays)
    report: dict[str, Any] = {
        "function": function.name,
        "mode": mode,
        "seconds": round(seconds, 4),
        "outputs": {name: _value(value) for name, value in results.items()},
    }
    if tracing:
        report["trace"] = [_entry(entry) for entry in entries]
        report["suspects"] = [entry.name for entry in entries if entry.suspect]
    return report


def _value(value: Any) -> dict[str, Any]:
    if not isinstance(value, np.ndarray):
        return {"value": value if isinstance(value, str | int | float) else str(value)}
    finite = value[np.isfinite(value)] if value.dtype.kind == "f" else value
    span = {"low": float(finite.min()), "high": float(finite.max())} if finite.size else {}
    return {"dtype": str(value.dtype), "shape": list(value.shape), "not_finite": int(value.size - finite.size), **span}


def _entry(entry: Entry) -> dict[str, Any]:
    fields = ("name", "operation", "dtype", "low", "high", "nan", "inf", "overflow")
    return {field: getattr(entry, field) for field in fields} | {"shape": list(entry.shape)}


def as_text(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"{report['path']}: specification {report['specification_version']}"]
    lines += [f"  {key}: {value}" for key, value in report["metadata"].items()]
    weights = ", ".join(f"{dtype} {human(size)}" for dtype, size in report["weight_bytes"].items() if size)
    lines.append(f"weights: {weights or 'none'}")
    for name, function in report["functions"].items():
        default = ", default" if name == report["default_function"] else ""
        lines.append(f"function {name} ({function['opset']}{default})")
        for group in ("inputs", "outputs", "states"):
            lines += [f"  {group[:-1]:<7} {key}: {value}" for key, value in function[group].items()]
        operations = ", ".join(f"{key} {count}" for key, count in function["operations"].items())
        lines.append(f"  operations: {operations}")
        lines += [f"  cannot run: {reason}" for reason in function["unsupported"]]
    return "\n".join(lines + _run_lines(report.get("run")))


def _run_lines(run: dict[str, Any] | None) -> list[str]:
    if run is None:
        return []
    lines = [f"ran {run['function']} ({run['mode']}) in {run['seconds']} s"]
    for entry in run.get("trace", ()):
        faults = "".join(f" {key}={entry[key]}" for key in ("nan", "inf", "overflow") if entry[key])
        span = "" if entry["low"] is None else f" {entry['low']:.6g} .. {entry['high']:.6g}"
        lines.append(f"  {entry['operation']:<22} {entry['name']}: {entry['dtype']}{entry['shape']}{span}{faults}")
    for name, value in run["outputs"].items():
        lines.append(f"  output {name}: " + ", ".join(f"{key} {item}" for key, item in value.items()))
    return lines
