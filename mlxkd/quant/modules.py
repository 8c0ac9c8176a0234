"""Layers that train on the grid they ship on, swapped in per instance and never per class.

A swapped layer keeps its parameters under their own names (the float master) and gains a `qat` note that is
no parameter. Learned ranges are parameters `qat_<target>_<range>` beside the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxkd.compat import switch_linear_class
from mlxkd.quant.grids import Grid, Ranges


@dataclass(frozen=True)
class Spec:
    """How one layer is stored for one target.

    Args:
        grid: where the weight lies.
        dtype: deployment dtype of scales, palettes and decoded values.
        kernel: run the deployed kernel in the training forward; else the decoded grid and a dense product.
        range_names: ranges held by the layer for this target, learned or frozen.
    """

    grid: Grid
    dtype: mx.Dtype
    kernel: bool
    range_names: tuple[str, ...] = ()


@dataclass
class LayerState:
    """The `qat` note of a swapped layer: its path, its float class, its specs by target, the active target."""

    path: str
    float_class: type[nn.Module]
    specs: dict[str, Spec] = field(default_factory=dict)
    active: str | None = None


def parameter_name(target: str, range_name: str) -> str:
    """The parameter that holds a learned range; targets may hold characters that attribute names may not."""
    return f"qat_{''.join(c if c.isalnum() else '_' for c in target)}_{range_name}"


def dtype_name(dtype: mx.Dtype) -> str:
    """ "float32", "float16" or "bfloat16"."""
    return str(dtype).removeprefix("mlx.core.")


def spec_of(module: nn.Module, target: str | None = None) -> tuple[str, Spec] | None:
    """(target, spec) of a swapped layer: of ``target`` when given, else of the active one; None when float."""
    state: LayerState | None = getattr(module, "qat", None)
    name = target or (state.active if state else None)
    return (name, state.specs[name]) if state and name in state.specs else None


def ranges_of(module: nn.Module, target: str, spec: Spec) -> Ranges:
    """The learned ranges of a layer for one target; empty when the grid takes them from the weight."""
    return {name: module[parameter_name(target, name)] for name in spec.range_names}


def fake_weight(module: nn.Module, target: str | None = None) -> mx.array:
    """The weight as deployed, straight-through differentiable; the plain weight of a float layer.

    Quantise a head once per step with this and let every chunk use the result.
    """
    found = spec_of(module, target)
    if found is None:
        return module.weight
    name, spec = found
    return spec.grid.fake(module.weight, spec.dtype, ranges_of(module, name, spec))


def _linear(module: nn.Module, x: mx.array) -> mx.array:
    found = spec_of(module)
    if found and found[1].kernel:
        name, spec = found
        return spec.grid.fake_linear(x, module.weight, spec.dtype, ranges_of(module, name, spec))
    return x @ fake_weight(module).T


class QATLinear(nn.Linear):
    """nn.Linear on its active grid."""

    def __call__(self, x: mx.array) -> mx.array:
        y = _linear(self, x)
        return y + self["bias"] if "bias" in self else y


class QATEmbedding(nn.Embedding):
    """nn.Embedding on its active grid, as a lookup and as a tied head."""

    def __call__(self, x: mx.array) -> mx.array:
        found = spec_of(self)
        if found is None:
            return self["weight"][x]
        name, spec = found
        ranges = ranges_of(self, name, spec)
        if not spec.grid.rowwise:
            return spec.grid.fake(self["weight"], spec.dtype, ranges).astype(spec.grid.lookup_dtype(spec.dtype))[x]
        # Groups lie within rows: quantising the looked-up rows alone gives the same values.
        flat = x.reshape(-1)
        rows = spec.grid.fake(self["weight"][flat], spec.dtype, {k: v[flat] for k, v in ranges.items()})
        return rows.astype(spec.grid.lookup_dtype(spec.dtype)).reshape(*x.shape, -1)

    def as_linear(self, x: mx.array) -> mx.array:
        return _linear(self, x)


class _Experts:
    """The call of mlx-lm's SwitchLinear with every expert's weight on the grid."""

    def __call__(self: Any, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        found = spec_of(self)
        if found and found[1].kernel:
            name, spec = found
            ranges = ranges_of(self, name, spec)
            function = _kernel_experts(spec.grid, spec.dtype, tuple(ranges), sorted_indices)
            y = function(x, self["weight"], indices, *ranges.values())
        else:
            y = _gather(x, fake_weight(self), indices, sorted_indices)
        return y + mx.expand_dims(self["bias"][indices], -2) if "bias" in self else y


def _gather(x: mx.array, w: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
    return mx.gather_mm(x, w.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=sorted_indices)


@cache
def _kernel_experts(grid: Grid, dtype: mx.Dtype, names: tuple[str, ...], sorted_indices: bool) -> Callable[..., Any]:
    """gather_qmm in the forward; its own gradient to x, the dense product's straight through to the weight."""

    def codes(w: mx.array, values: list[mx.array]) -> dict[str, mx.array]:
        return grid.codes_for(w, dict(zip(names, values, strict=True)), dtype)

    @mx.custom_function
    def experts(x: mx.array, w: mx.array, indices: mx.array, *values: mx.array) -> mx.array:
        product = grid.gather_linear(x, codes(w, list(values)), indices, sorted_indices)
        assert product is not None
        return product

    @experts.vjp
    def experts_vjp(primals: Any, cotangent: mx.array, _: Any) -> tuple[mx.array, ...]:
        x, w, indices, *values = primals
        packed = codes(w, values)
        _, (dx,) = mx.vjp(lambda v: grid.gather_linear(v, packed, indices, sorted_indices), [x], [cotangent])
        ranges = dict(zip(names, values, strict=True))

        def dense(master: mx.array, *learned: mx.array) -> mx.array:
            return _gather(x, grid.fake(master, dtype, dict(zip(names, learned, strict=True))), indices, sorted_indices)

        _, (dw, *dranges) = mx.vjp(dense, [w, *ranges.values()], [cotangent])
        return (dx, dw, mx.zeros_like(indices), *dranges)

    return experts


def qat_class(module: nn.Module) -> type[nn.Module] | None:
    """The training class of a layer that can lie on a grid, or None."""
    if type(module) in (nn.Linear, QATLinear):
        return QATLinear
    if type(module) in (nn.Embedding, QATEmbedding):
        return QATEmbedding
    experts = _experts_class()
    return experts if type(module) in (switch_linear_class(), experts) else None


@cache
def _experts_class() -> type[nn.Module]:
    # Built on first use: the base class lives in mlx-lm, which is not imported at import time.
    return type("QATSwitchLinear", (_Experts, switch_linear_class()), {"__doc__": "SwitchLinear on its active grid."})
