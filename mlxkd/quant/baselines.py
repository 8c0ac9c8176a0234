"""Post-training quantisation, to compare with: rounding on any grid, and mlx-lm's DWQ, AWQ and GPTQ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, get_args

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxkd import compat
from mlxkd.errors import UserError, unknown
from mlxkd.quant.grids import FLOAT, Codes, grid
from mlxkd.quant.grids.mlx_affine import AffineGrid
from mlxkd.quant.pack import Packed, clone, pack
from mlxkd.quant.plan import Execution, Plan, Rules, attach, plan_for

Method = Literal["rtn", "dwq", "awq", "gptq"]
GPTQ_BITS = (2, 4, 8)
DWQ_RATE = 1e-6  # mlx-lm's default


def post_training(
    model: nn.Module,
    config: dict[str, Any],
    grid_name: str,
    method: Method = "rtn",
    *,
    rules: Rules = (),
    rows: np.ndarray | None = None,
    held_out: np.ndarray | None = None,
    fitted_ranges: bool = False,
    rate: float = DWQ_RATE,
    batch_size: int = 4,
    execution: Execution = "auto",
) -> Packed:
    """Quantise a copy of a float model without quantisation-aware training.

    Args:
        grid_name: a grid, or alternatives "a|b|float".
        method: "rtn" rounds (k-means for palettes); the others are mlx-lm's own functions.
        rules: per-layer grids; "gptq" makes one grid and can leave layers float, "awq" takes every layer.
        rows: int [n, width] calibration tokens, for all but "rtn".
        held_out: int [n, width] tokens that "dwq" reports on; ``rows`` when None.
        fitted_ranges: affine scales and biases where the squared error is small, for "rtn" and as the start of "dwq".
        rate, batch_size: of "dwq".
        execution: of "dwq", in training: MLX's quantised kernels, or the decoded weight and a dense product ("auto":
            dense on a CPU, whose quantised kernels are slow). The function trained is the same but for rounding.

    Raises:
        UserError: an unknown method, a grid or width the method cannot do, or no calibration rows.
    """
    if method not in get_args(Method):
        raise unknown("quantisation method", method, get_args(Method))
    if fitted_ranges and method not in ("rtn", "dwq"):
        raise UserError(f"mlx-lm's {method.upper()} takes its own ranges", hint="fitted ranges go with rtn and dwq")
    plan = plan_for(model, grid_name, rules)
    if fitted_ranges and not any(isinstance(grid(name), AffineGrid) for name in plan.values() if name != FLOAT):
        raise UserError(
            f"no layer on an affine grid, and {grid_name} has no ranges to fit", hint="palettes are fitted anyhow"
        )
    if method == "rtn":
        return _rounded(model, config, plan, fitted_ranges)
    if rows is None:
        raise UserError(f"{method} needs calibration text", hint="give training rows")
    if method in ("awq", "gptq"):
        return _layerwise(model, config, plan, method, mx.array(rows))
    packed = _rounded(model, config, plan, fitted_ranges)
    return _dwq(packed, model, rows, rows if held_out is None else held_out, rate, batch_size, execution)


def _rounded(model: nn.Module, config: dict[str, Any], plan: Plan, fitted: bool) -> Packed:
    return pack(attach(clone(model), plan, learned_ranges=fitted, fitted_ranges=fitted), config)


def _dwq(
    packed: Packed,
    teacher: nn.Module,
    rows: np.ndarray,
    held_out: np.ndarray,
    rate: float,
    batch_size: int,
    execution: Execution,
) -> Packed:
    """Let mlx-lm's DWQ train the scales and biases of a rounded copy against the float model."""
    rigid = [path for path, name in packed.grids.items() if not isinstance(grid(name), AffineGrid)]
    if rigid:
        raise UserError(f"DWQ trains affine scales and biases; not affine: {', '.join(rigid)}")
    student = packed.model
    student.unfreeze(keys=[], recurse=True)
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    with _dense(student, execution == "dense" or (execution == "auto" and on_cpu)):
        compat.dwq(student, teacher, rows, held_out, rate=rate, batch_size=batch_size, dtype=packed.dtype)
    return from_mlx_lm(student, packed.config)


class _DenseLinear(nn.QuantizedLinear):
    """nn.QuantizedLinear as a dense product with its decoded weight."""

    def __call__(self, x: mx.array) -> mx.array:
        y = x @ _decoded(self).T
        return y + self["bias"] if "bias" in self else y


class _DenseEmbedding(nn.QuantizedEmbedding):
    """nn.QuantizedEmbedding whose tied head is a dense product with its decoded weight."""

    def as_linear(self, x: mx.array) -> mx.array:
        return x @ _decoded(self).T


def _decoded(module: nn.Module) -> mx.array:
    ranges = {name: module[name] for name in ("scales", "biases")}
    affine = grid(f"mlx-affine{module.bits}-g{module.group_size}")
    return affine.held({"weight": module.weight}, ranges, module.scales.dtype)


def _dense(model: nn.Module, wanted: bool) -> AbstractContextManager[None]:
    """Let quantised layers compute densely meanwhile."""
    dense: dict[type[nn.Module], type[nn.Module]] = {
        nn.QuantizedLinear: _DenseLinear,
        nn.QuantizedEmbedding: _DenseEmbedding,
    }
    return _as([(m, dense[type(m)]) for m in model.modules() if wanted and type(m) in dense])


@contextmanager
def _as(layers: Iterable[tuple[nn.Module, type[nn.Module]]]) -> Iterator[None]:
    """Let layers be of other classes meanwhile, instance by instance."""
    swapped = [(module, type(module), other) for module, other in layers]
    for module, _, other in swapped:
        module.__class__ = other
    try:
        yield
    finally:
        for module, own, _ in swapped:
            module.__class__ = own


def _absent(_: nn.Module) -> None:
    raise AttributeError("to_quantized")


def _left_float(kind: type[nn.Module]) -> type[nn.Module]:
    """A class that mlx-lm's GPTQ passes over: not exactly a linear layer, and with nothing to quantise it by."""
    return type(f"Float{kind.__name__}", (kind,), {"to_quantized": property(_absent)})


def _layerwise(model: nn.Module, config: dict[str, Any], plan: Plan, method: str, rows: mx.array) -> Packed:
    used = sorted({name for name in plan.values() if name != FLOAT})
    left = [path for path, name in plan.items() if name == FLOAT]
    if len(used) != 1:
        named = ", ".join(used) or "every layer stays float"
        raise UserError(f"mlx-lm's {method.upper()} makes one grid, not {len(used)} ({named})", hint="rtn mixes grids")
    chosen = grid(used[0])
    if not isinstance(chosen, AffineGrid):
        raise UserError(f"mlx-lm's {method.upper()} makes affine grids, not {chosen.name}")
    if method == "gptq" and chosen.bits not in GPTQ_BITS:
        raise UserError(f"mlx-lm's GPTQ packs {GPTQ_BITS} bits, not {chosen.bits}", hint="choose dwq or awq")
    if method == "awq" and left:
        raise UserError(
            f"mlx-lm's AWQ quantises every layer and cannot leave float: {', '.join(left)}",
            hint="choose a group that divides their widths; or rtn, dwq, gptq",
        )
    twin = clone(model)
    function = compat.awq if method == "awq" else compat.gptq
    with _as([(m, _left_float(type(m))) for path, m in twin.named_modules() if path in left]):
        made = function(twin, config, rows, bits=chosen.bits, group=chosen.group)
    return from_mlx_lm(twin, made)


def from_mlx_lm(model: nn.Module, config: dict[str, Any]) -> Packed:
    """See a model that mlx-lm quantised as a packed student; nothing is copied or quantised again.

    Raises:
        UserError: no layer is quantised, or one lies on a grid that is unknown here.
    """
    grids: dict[str, str] = {}
    codes: dict[str, Codes] = {}
    for path, module in model.named_modules():
        if "scales" in module:
            affine = f"mlx-affine{module.bits}-g{module.group_size}"
            grids[path] = grid(affine if module.mode == "affine" else f"mlx-{module.mode}").name
            codes[path] = {key: module[key] for key in ("weight", "scales", "biases") if key in module}
    if not codes:
        raise UserError("no layer of this model is quantised")
    dtypes = [layer["scales"].dtype for layer in codes.values() if layer["scales"].dtype != mx.uint8]
    model.eval()
    mx.eval(model.parameters())
    return Packed(model, config, grids, codes, dtypes[0] if dtypes else mx.bfloat16)
