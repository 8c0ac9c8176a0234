"""Layers that train on the grid they ship on, swapped in per instance and never per class.

A swapped layer keeps its parameters under their own names (the float master) and gains a `qat` note that is
no parameter. Ranges and held codes are parameters `qat_<target>_<name>` beside the weight, so that checkpoints
carry them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxkd.compat import dora_linear_class, lora_linear_class, switch_linear_class
from mlxkd.quant.activations import fake_activations
from mlxkd.quant.grids import Codes, Grid, Ranges

ADAPTER = ("lora_a", "lora_b", "m")  # what trains in an adapter; "m" in DoRA only
RESIDUAL = "residual"  # beside held codes: what the master had beyond them


@dataclass(frozen=True)
class Spec:
    """How one layer is stored for one target.

    Args:
        grid: where the weight lies.
        dtype: deployment dtype of scales, palettes and decoded values.
        kernel: run the deployed kernel in the training forward; else the decoded grid and a dense product.
        range_names: ranges held by the layer for this target, learned or frozen.
        code_names: codes held fixed while only ranges train; empty when codes follow the master.
        tau: temperature of differentiable palettes; None assigns the nearest entry, straight through.
        activations: activation grid of the layer's input, or None.
        fitted: ranges start where the squared error is small.
    """

    grid: Grid
    dtype: mx.Dtype
    kernel: bool
    range_names: tuple[str, ...] = ()
    code_names: tuple[str, ...] = ()
    tau: float | None = None
    activations: str | None = None
    fitted: bool = False


@dataclass
class LayerState:
    """The `qat` note of a swapped layer.

    Args:
        path: where the layer is in the model.
        float_class: what it was.
        specs: by target.
        active: the target that the forward runs on; None: the float master.
        sharpness: of annealed rounding in the training forward, a scalar; None rounds, straight through.
    """

    path: str
    float_class: type[nn.Module]
    specs: dict[str, Spec] = field(default_factory=dict)
    active: str | None = None
    sharpness: mx.array | None = None


def parameter_name(target: str, name: str) -> str:
    """The parameter that holds a range; targets may hold characters that attribute names may not."""
    return f"qat_{''.join(c if c.isalnum() else '_' for c in target)}_{name}"


def held_name(target: str, name: str) -> str:
    """The parameter that holds fixed codes."""
    return parameter_name(target, f"held_{name}")


def dtype_name(dtype: mx.Dtype) -> str:
    """ "float32", "float16" or "bfloat16"."""
    return str(dtype).removeprefix("mlx.core.")


def master(module: nn.Module) -> mx.array:
    """The float weight behind a layer; of a low-rank adapter the merged one, as mlx-lm's fuse() orders it."""
    if "lora_a" not in module:
        return module.weight
    weight = module.linear.weight
    merged = weight + ((module.scale * module.lora_b.T) @ module.lora_a.T).astype(weight.dtype)
    if "m" not in module:
        return merged
    # DoRA: rows of learned length; no gradient flows through the length that they have (2402.09353, section 4.3).
    return merged * (module.m / mx.stop_gradient(mx.linalg.norm(merged, axis=1)))[:, None].astype(weight.dtype)


def master_shape(module: nn.Module) -> tuple[int, ...]:
    """Shape of the float weight behind a layer."""
    return tuple((module.linear if "lora_a" in module else module).weight.shape)


def spec_of(module: nn.Module, target: str | None = None) -> tuple[str, Spec] | None:
    """(target, spec) of a swapped layer: of ``target`` when given, else of the active one; None when float."""
    state: LayerState | None = getattr(module, "qat", None)
    name = target or (state.active if state else None)
    return (name, state.specs[name]) if state and name in state.specs else None


def ranges_of(module: nn.Module, target: str, spec: Spec) -> Ranges:
    """The ranges a layer holds for one target; empty when the grid takes them from the weight."""
    return {name: module[parameter_name(target, name)] for name in spec.range_names}


def starting_ranges(module: nn.Module, spec: Spec) -> Ranges:
    """Where the ranges that a layer holds start, from its present master; empty when it holds none."""
    if not spec.range_names:
        return {}
    return spec.grid.fitted_ranges(master(module)) if spec.fitted else spec.grid.ranges(master(module))


def held_codes(module: nn.Module, target: str, spec: Spec) -> Codes:
    """The codes a layer holds fixed for one target; empty when they follow the master."""
    return {name: module[held_name(target, name)] for name in spec.code_names}


def deployed_codes(module: nn.Module, target: str, spec: Spec) -> Codes:
    """The codes that ship: the held ones under the present ranges, or those of the master."""
    ranges, held = ranges_of(module, target, spec), held_codes(module, target, spec)
    if held:
        return {**held, **spec.grid.stored(ranges, spec.dtype)}
    return spec.grid.codes_for(master(module), ranges, spec.dtype)


def fake_weight(module: nn.Module, target: str | None = None) -> mx.array:
    """The weight as deployed, straight-through differentiable; the plain weight of a float layer.

    Quantise a head once per step with this and let every chunk use the result. A layer with differentiable
    palettes or annealed rounding gives its soft weight while it is in training mode.
    """
    found = spec_of(module, target)
    if found is None:
        return master(module)
    name, spec = found
    ranges = ranges_of(module, name, spec)
    if spec.code_names:
        return spec.grid.held(held_codes(module, name, spec), ranges, spec.dtype)
    if spec.tau is not None and module.training:
        return spec.grid.soft(master(module), ranges, spec.dtype, spec.tau)[0]
    if annealing(module):
        return spec.grid.eased(master(module), ranges, spec.dtype, module.qat.sharpness)
    return spec.grid.fake(master(module), spec.dtype, ranges)


def annealing(module: nn.Module) -> bool:
    """Whether the forward rounds softly."""
    return module.training and module.qat.sharpness is not None


def _linear(module: nn.Module, x: mx.array) -> mx.array:
    found = spec_of(module)
    if found is None:
        return x @ master(module).T
    name, spec = found
    if spec.activations:
        x = fake_activations(x, spec.activations)
    if not spec.kernel or annealing(module):
        return x @ fake_weight(module).T
    if spec.code_names:
        product = spec.grid.linear(x, deployed_codes(module, name, spec))
        assert product is not None
        return product
    return spec.grid.fake_linear(x, master(module), spec.dtype, ranges_of(module, name, spec))


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
        dtype = spec.grid.lookup_dtype(spec.dtype)
        if not spec.grid.rowwise or spec.code_names or spec.tau is not None:
            return fake_weight(self).astype(dtype)[x]
        # Groups lie within rows: quantising the looked-up rows alone gives the same values.
        flat = x.reshape(-1)
        ranges = {key: value[flat] for key, value in ranges_of(self, name, spec).items()}
        if annealing(self):
            rows = spec.grid.eased(self["weight"][flat], ranges, spec.dtype, self.qat.sharpness)
        else:
            rows = spec.grid.fake(self["weight"][flat], spec.dtype, ranges)
        return rows.astype(dtype).reshape(*x.shape, -1)

    def as_linear(self, x: mx.array) -> mx.array:
        return _linear(self, x)


class _Experts:
    """The call of mlx-lm's SwitchLinear with every expert's weight on the grid."""

    def __call__(self: Any, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        found = spec_of(self)
        if found and found[1].activations:
            x = fake_activations(x, found[1].activations)
        if found and found[1].kernel and not found[1].code_names and not annealing(self):
            name, spec = found
            ranges = ranges_of(self, name, spec)
            function = _kernel_experts(spec.grid, spec.dtype, tuple(ranges), sorted_indices)
            y = function(x, self["weight"], indices, *ranges.values())
        else:
            y = _gather(x, fake_weight(self), indices, sorted_indices)
        return y + mx.expand_dims(self["bias"][indices], -2) if "bias" in self else y


class _Adapter:
    """mlx-lm's LoRALinear or DoRALinear with the merged weight on the grid; adapter dropout has no meaning there."""

    def __call__(self: Any, x: mx.array) -> mx.array:
        y = _linear(self, x)
        return y + self.linear["bias"] if "bias" in self.linear else y


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

        def dense(weight: mx.array, *learned: mx.array) -> mx.array:
            return _gather(x, grid.fake(weight, dtype, dict(zip(names, learned, strict=True))), indices, sorted_indices)

        _, (dw, *dranges) = mx.vjp(dense, [w, *ranges.values()], [cotangent])
        return (dx, dw, mx.zeros_like(indices), *dranges)

    return experts


@cache
def _classes() -> dict[type[nn.Module], type[nn.Module]]:
    # Built on first use: two base classes live in mlx-lm, which is not imported at import time.
    experts, lora, dora = switch_linear_class(), lora_linear_class(), dora_linear_class()
    return {
        nn.Linear: QATLinear,
        nn.Embedding: QATEmbedding,
        experts: type("QATSwitchLinear", (_Experts, experts), {"__doc__": "SwitchLinear on its active grid."}),
        lora: type("QATLoRALinear", (_Adapter, lora), {"__doc__": "LoRALinear, merged, on its active grid."}),
        dora: type("QATDoRALinear", (_Adapter, dora), {"__doc__": "DoRALinear, merged, on its active grid."}),
    }


def qat_class(module: nn.Module) -> type[nn.Module] | None:
    """The training class of a layer that can lie on a grid, or None."""
    classes = _classes()
    if type(module) in classes.values():
        return type(module)
    return classes.get(type(module))
