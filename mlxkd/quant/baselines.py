"""Post-training quantisation, to compare with: rounding on any grid, and mlx-lm's DWQ, AWQ and GPTQ."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxkd import compat
from mlxkd.errors import UserError, unknown
from mlxkd.quant.grids import Codes, grid
from mlxkd.quant.grids.mlx_affine import AffineGrid
from mlxkd.quant.pack import Packed, clone, pack
from mlxkd.quant.plan import Execution, Rules, attach, plan_for

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
    rate: float = DWQ_RATE,
    batch_size: int = 4,
    execution: Execution = "auto",
) -> Packed:
    """Quantise a copy of a float model without quantisation-aware training.

    Args:
        grid_name: a grid, or alternatives "a|b|float" for "rtn" and "dwq".
        method: "rtn" rounds (k-means for palettes); the others are mlx-lm's own functions.
        rules: per-layer grids, for "rtn" and "dwq".
        rows: int [n, width] calibration tokens, for all but "rtn".
        held_out: int [n, width] tokens that "dwq" reports on; ``rows`` when None.
        rate, batch_size: of "dwq".
        execution: of "dwq", in training: MLX's quantised kernels, or the decoded weight and a dense product ("auto":
            dense on a CPU, whose quantised kernels are slow). The function trained is the same but for rounding.

    Raises:
        UserError: an unknown method, a grid or width the method cannot do, or no calibration rows.
    """
    if method not in get_args(Method):
        raise unknown("quantisation method", method, get_args(Method))
    if method == "rtn":
        return pack(attach(clone(model), plan_for(model, grid_name, rules)), config)
    if rows is None:
        raise UserError(f"{method} needs calibration text", hint="give training rows")
    if method in ("awq", "gptq"):
        return _layerwise(model, config, grid_name, method, mx.array(rows))
    packed = pack(attach(clone(model), plan_for(model, grid_name, rules)), config)
    rigid = [path for path, name in packed.grids.items() if not isinstance(grid(name), AffineGrid)]
    if rigid:
        raise UserError(f"DWQ trains affine scales and biases; not affine: {', '.join(rigid)}")
    student = packed.model
    student.unfreeze(keys=[], recurse=True)
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    with _dense(student, execution == "dense" or (execution == "auto" and on_cpu)):
        compat.dwq(
            student,
            model,
            rows,
            rows if held_out is None else held_out,
            rate=rate,
            batch_size=batch_size,
            dtype=packed.dtype,
        )
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


@contextmanager
def _dense(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Let quantised layers compute densely meanwhile, instance by instance."""
    dense: dict[type[nn.Module], type[nn.Module]] = {
        nn.QuantizedLinear: _DenseLinear,
        nn.QuantizedEmbedding: _DenseEmbedding,
    }
    swapped = [(m, type(m)) for m in model.modules() if wanted and type(m) in dense]
    for module, own in swapped:
        module.__class__ = dense[own]
    try:
        yield
    finally:
        for module, own in swapped:
            module.__class__ = own


def _layerwise(model: nn.Module, config: dict[str, Any], grid_name: str, method: str, rows: mx.array) -> Packed:
    chosen = grid(grid_name)
    if not isinstance(chosen, AffineGrid):
        raise UserError(f"mlx-lm's {method.upper()} makes affine grids, not {grid_name}")
    if method == "gptq" and chosen.bits not in GPTQ_BITS:
        raise UserError(f"mlx-lm's GPTQ packs {GPTQ_BITS} bits, not {chosen.bits}", hint="choose dwq or awq")
    plan_for(model, grid_name)  # names the layers whose width does not fit
    twin = clone(model)
    function = compat.awq if method == "awq" else compat.gptq
    return from_mlx_lm(twin, function(twin, config, rows, bits=chosen.bits, group=chosen.group))


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
