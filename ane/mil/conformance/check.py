"""Run one case on the reference runtime and judge the outputs.

fp32 models are held to the tolerance that their test asks for, as Core ML is on a Mac (1e-4 absolute and 1e-5
relative unless the test says otherwise). Some tests put fp16 tensors into a model of fp32 precision; those models
("mixed") are judged as fp16 ones.

For fp16 models Apple allows 0.5; here the allowance follows from rounding alone. With u = 2^-11, half the relative
spacing of fp16, it is ``8 u |expected|`` (inputs, weights and output each rounded, and a product or two of them) plus
eight times the largest change of the output tensor when every input is moved to a neighbouring fp16 number. What fp16
cannot hold (beyond 65504) may be infinite.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ane.mil.conformance import disputed
from ane.mil.conformance.case import Arrays, Case, read
from ane.mil.ops._arguments import Undocumented
from ane.mil.package import Function, load
from mlxkd.errors import UserError

Status = Literal["passed", "unsupported", "disputed", "failed"]
Precision = Literal["fp32", "mixed", "fp16"]
UNIT, FP16_MAX, FP16_TINY = 2.0**-11, 65504.0, 2.0**-24
FACTOR, DRAWS = 8.0, 3
# In nearly every program, and not what its test is about.
INCIDENTAL = {"cast", "const"}


@dataclass(frozen=True)
class Verdict:
    """What came of a case.

    Args:
        operations: types of the operations in the program, the incidental ones only where there is nothing else.
        precision: "fp32", "fp16", or "mixed" for a model of fp32 precision with fp16 tensors in it.
        opset: of the function.
        shape: "dynamic" if any input dimension is free, else the largest rank, as "rank 4".
        error: largest absolute difference, over all outputs and predictions; None if nothing was compared.
        tolerance: the largest allowance that was needed, as text for people.
        detail: why, when not passed.
    """

    status: Status
    operations: tuple[str, ...] = ()
    precision: Precision = "fp32"
    opset: str = ""
    shape: str = ""
    error: float | None = None
    tolerance: str = ""
    detail: str = ""
    seconds: float = 0.0


def evaluate(case: Case) -> Verdict:
    """Read the case's package from disk, run it, compare."""
    begin = time.perf_counter()
    function = load(case.model).function()
    about: dict[str, Any] = {"operations": _operations(function), "opset": function.spec.opset}
    about["shape"] = _shape(function)
    about["precision"] = precision = _precision(function, case.facts.dtype)
    missing = function.unsupported()
    if missing:
        return Verdict("unsupported", **about, detail="; ".join(missing))
    try:
        outputs = _run(function, [inputs for inputs, _ in case.steps])
    except Undocumented as error:
        return Verdict("unsupported", **about, detail=error.what)
    except UserError as error:
        status: Status = "passed" if disputed.wants_refusal(case.facts.test) else "failed"
        return Verdict(status, **about, detail=f"refused: {error}")
    status, worst, tolerance, detail = _judge(function, case, outputs, precision != "fp32")
    if status == "failed" and (reason := disputed.reason(case.facts.test)):
        status, detail = "disputed", f"{detail}: {reason}"
    return Verdict(
        status, **about, error=worst, tolerance=tolerance, detail=detail, seconds=time.perf_counter() - begin
    )


def _operations(function: Function) -> tuple[str, ...]:
    found = set(function.operations())
    return tuple(sorted(found - INCIDENTAL or found - {"const"}))


def _precision(function: Function, asked: str) -> Precision:
    if asked == "fp16":
        return "fp16"
    types = [t for _, t in function.spec.inputs]
    types += [t for node in function.spec.block.walk() for _, t in node.outputs]
    return "mixed" if any("fp16" in str(t) for t in types) else "fp32"


def _shape(function: Function) -> str:
    shapes = [getattr(t, "shape", None) for name, t in function.spec.inputs if name in function.inputs]
    if any(shape is None or None in shape for shape in shapes):
        return "dynamic"
    return f"rank {max((len(shape) for shape in shapes if shape is not None), default=0)}"


def _run(function: Function, inputs: list[Arrays]) -> list[dict[str, Any]]:
    state = function.make_state("zero") if function.states else None
    # Core ML has no scalar inputs: models take [1] where the test has a scalar.
    return [function.predict({k: np.atleast_1d(v) for k, v in values.items()}, state) for values in inputs]


def _judge(function: Function, case: Case, outputs: list[dict[str, Any]], half: bool) -> tuple[Status, float, str, str]:
    """Status, worst difference, tolerance in words, and the first complaint."""
    spread: list[Arrays] | None = None
    worst, words = 0.0, "8 u" if half else f"{case.facts.atol:g} + {case.facts.rtol:g} rel"
    for index, (_, wanted) in enumerate(case.steps):
        for name, expected in wanted.items():
            got = np.asarray(_output(outputs[index], name))
            if got.shape != expected.shape and not (expected.shape == () and got.shape == (1,)):
                return "failed", worst, words, f"{name} has shape {got.shape}, expected {expected.shape}"
            worst = max(worst, _difference(got, expected))
            allowed = FACTOR * UNIT * _size(expected) + FACTOR * FP16_TINY if half else _allowance(case, expected)
            if _agrees(got, expected, allowed, half):
                continue
            if half:
                spread = spread if spread is not None else _spread(function, case, outputs)
                words = "8 u + spread"
                if _agrees(got, expected, allowed + FACTOR * float(spread[index][name]), True):
                    continue
            return "failed", worst, words, f"{name} is off by {_difference(got, expected):.3g}"
    return "passed", worst, words, ""


def _output(outputs: dict[str, Any], name: str) -> Any:
    """An output by the name in the program; saved models replace characters outside [A-Za-z0-9_]."""
    plain = "".join(c if c.isalnum() or c == "_" else "_" for c in name)
    return outputs[name] if name in outputs else outputs[plain]


def _size(expected: np.ndarray) -> np.ndarray:
    return np.abs(np.nan_to_num(expected.astype(np.float64), posinf=0, neginf=0))


def _allowance(case: Case, expected: np.ndarray) -> np.ndarray:
    return case.facts.atol + case.facts.rtol * _size(expected)


def _difference(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute difference where both are finite."""
    with np.errstate(invalid="ignore"):
        apart = np.abs(got.astype(np.float64) - expected.astype(np.float64))
    finite = apart[np.isfinite(apart)]
    return float(finite.max()) if finite.size else 0.0


def _agrees(got: np.ndarray, expected: np.ndarray, allowed: np.ndarray, half: bool) -> bool:
    got, expected = got.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore"):
        close = (np.abs(got - expected) <= allowed) | (got == expected) | (np.isnan(got) & np.isnan(expected))
        if half:
            close |= np.isinf(got) & (np.abs(expected) > FP16_MAX * (1 - UNIT)) & (np.sign(got) == np.sign(expected))
    return bool(close.all())


def _spread(function: Function, case: Case, outputs: list[dict[str, Any]]) -> list[Arrays]:
    """Largest change of each output when the inputs move to neighbouring fp16 numbers, over a few draws."""
    rng = np.random.default_rng(0)
    spread = [{name: np.zeros(()) for name in wanted} for _, wanted in case.steps]
    for _ in range(DRAWS):
        moved = _run(function, [{k: _neighbour(v, rng) for k, v in inputs.items()} for inputs, _ in case.steps])
        for index, found in enumerate(spread):
            for name, so_far in found.items():
                base, other = (np.asarray(_output(values[index], name)) for values in (outputs, moved))
                change = _difference(other, base) if base.shape == other.shape else np.inf
                found[name] = np.maximum(so_far, change)
    return spread


def _neighbour(value: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if value.dtype.kind != "f":
        return value
    half = value.astype(np.float16)
    towards = np.where(rng.random(half.shape) < 0.5, np.float16(-np.inf), np.float16(np.inf))
    return np.nextafter(half, towards.astype(np.float16)).astype(np.float32)


def record(folder: Path) -> dict[str, Any]:
    """A stored case's facts and verdict as one JSON object."""
    case = read(folder)
    verdict = evaluate(case)
    return {"key": case.facts.key, **vars(case.facts), **vars(verdict), "operations": list(verdict.operations)}
