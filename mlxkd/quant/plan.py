"""Which layer lies on which grid, and putting a model on a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from mlxkd.compat import quantized_switch_linear_class
from mlxkd.errors import UserError
from mlxkd.quant.activations import width_fault
from mlxkd.quant.grids import FLOAT, Grid, grid
from mlxkd.quant.grids._mlx import MLXGrid
from mlxkd.quant.modules import (
    RESIDUAL,
    LayerState,
    Spec,
    dtype_name,
    held_name,
    master,
    master_shape,
    parameter_name,
    qat_class,
    starting_ranges,
)

Plan = dict[str, str]
Rules = Iterable[tuple[str, str]]
Execution = Literal["auto", "kernel", "dense"]
DEFAULT_TARGET = "default"


def quantisable(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that can lie on a grid, by path, in model order; a layer reachable by two paths is listed once.

    Raises:
        UserError: the model is quantised already; its codes are what it is, there is nothing to train.
    """
    packed = (nn.QuantizedLinear, nn.QuantizedEmbedding, nn.QQLinear, quantized_switch_linear_class())
    done = [path for path, module in model.named_modules() if isinstance(module, packed)]
    if done:
        raise UserError(
            f"the student is quantised already ({len(done)} layers, first {done[0]})",
            hint="start from its float weights: requantising changes codes",
        )
    found: dict[int, tuple[str, nn.Module]] = {}
    modules = dict(model.named_modules())
    for path, module in modules.items():
        inside_adapter = "lora_a" in modules.get(path.rpartition(".")[0], {})
        if qat_class(module) is not None and not inside_adapter:
            found.setdefault(id(module), (path, module))
    return dict(sorted(found.values(), key=lambda item: _natural(item[0])))


def _natural(path: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in path.split(".")]


def plan_for(model: nn.Module, default: str, rules: Rules = ()) -> Plan:
    """A plan: every quantisable layer's path -> grid name.

    Args:
        model: a float model of mlx-lm's; its own ``quant_predicate`` is honoured where no rule speaks.
        default: grid of the layers no rule names. ``"a|b|float"`` takes the first that the layer's shape allows.
        rules: (glob over paths, grid or alternatives), first match wins, e.g. ``("*.mlp.*", "mlx-affine3-g32")``.

    Raises:
        UserError: an unknown grid, a rule that matches nothing, or layers that no alternative fits, all named.
    """
    layers = quantisable(model)
    rules = list(rules)
    idle = [pattern for pattern, _ in rules if not any(fnmatchcase(path, pattern) for path in layers)]
    if idle:
        raise UserError(
            f"no quantisable layer matches {', '.join(idle)}", hint=f"layers: {', '.join(list(layers)[:4])}"
        )
    plan, faults = {}, []
    for path, module in layers.items():
        ruled = next((names for pattern, names in rules if fnmatchcase(path, pattern)), None)
        names = ruled or _own_wish(model, path, module, default)
        chosen, reasons = _first_fit(names, master_shape(module))
        if chosen is None:
            faults.append(f"{path} ({'; '.join(reasons)})")
        else:
            plan[path] = chosen
    if faults:
        raise UserError(
            f"{len(faults)} of {len(layers)} layers do not fit their grid: {', '.join(faults)}",
            hint=f"allow another: grid '{default}|float' leaves them float, or give them their own rule",
        )
    return plan


def _first_fit(names: str, shape: tuple[int, ...]) -> tuple[str | None, list[str]]:
    reasons = []
    for name in names.split("|"):
        if name == FLOAT:
            return FLOAT, []
        fault = grid(name).fault(shape)
        if fault is None:
            return name, []
        reasons.append(f"{name}: {fault}")
    return None, reasons


def _own_wish(model: nn.Module, path: str, module: nn.Module, default: str) -> str:
    """What the model's family says about a layer: False keeps it float, a dict is a grid of mlx-lm's."""
    predicate = getattr(model, "quant_predicate", None)
    wish: Any = predicate(path, module) if predicate else True
    if isinstance(wish, Mapping) and isinstance(grid(default.split("|")[0]), MLXGrid):
        mode = wish.get("mode", "affine")
        return f"mlx-affine{wish['bits']}-g{wish['group_size']}" if mode == "affine" else f"mlx-{mode}"
    return default if wish else FLOAT


def attach(
    model: nn.Module,
    plan: Plan,
    *,
    target: str = DEFAULT_TARGET,
    dtype: mx.Dtype | None = None,
    execution: Execution = "auto",
    learned_ranges: bool = False,
    fitted_ranges: bool = False,
    tau: float | None = None,
    activations: str | None = None,
) -> nn.Module:
    """Put a model's layers on their grids, in place and instance by instance; returns the model.

    Call it once per target to train one master for several; the last one attached is active. Class and
    methods of layers outside the plan, and of every other model, stay as they are.

    Args:
        plan: layer path -> grid name, from `plan_for`.
        target: a name for this plan.
        dtype: deployment dtype; the weights' own when None.
        execution: the deployed kernel in the forward ("kernel"), the decoded grid and a dense product ("dense"),
            or whichever is fast here ("auto": kernels on a GPU, dense on a CPU).
        learned_ranges: make scales (palettes) parameters, started where the grid puts them; grids without
            learned ranges take them from the weight as always.
        fitted_ranges: start learned scales and biases where the squared error is small, not at the extremes of
            the weights: much nearer to the float model at 2 and 3 bits. Palettes always start so.
        tau: differentiable palettes (DKM) at this temperature for palette grids; call `settle` after each update.
        activations: grid of the inputs of linear layers ("int8-token", "mxfp8", "nvfp4"); simulated in training,
            recorded in the artefact, left out of packed MLX layers, which have no such kernel.

    Raises:
        UserError: a path that is no quantisable layer, a shape that does not fit, no kernel for the grid, or
            fitted ranges that are not learned.
    """
    if fitted_ranges and not learned_ranges:
        raise UserError("fitted ranges are where learned ranges start", hint="attach with learned_ranges=True")
    layers = quantisable(model)
    strangers = [path for path in plan if path not in layers]
    if strangers:
        raise UserError(f"the plan names layers that the model has not: {', '.join(strangers)}")
    for path, name in plan.items():
        if name != FLOAT:
            module, chosen = layers[path], grid(name)
            fault = chosen.fault(master_shape(module))
            if fault:
                raise UserError(f"{name} does not fit {path}: {fault}", hint="choose another grid for it, or float")
            spec = _spec(chosen, dtype or master(module).dtype, execution, learned_ranges, path)
            spec = replace(spec, fitted=fitted_ranges, tau=tau if chosen.range_names == ("palette",) else None)
            if activations and not isinstance(module, nn.Embedding):
                spec = replace(spec, activations=_checked(activations, path, module))
            _swap(path, module, target, spec, learned_ranges)
    activate(model, target)
    return model


def _checked(activations: str, path: str, module: nn.Module) -> str:
    fault = width_fault(activations, master_shape(module)[-1])
    if fault:
        raise UserError(f"activations on {activations} do not fit the input of {path}: {fault}")
    return activations


def _spec(chosen: Grid, dtype: mx.Dtype, execution: Execution, learned: bool, path: str) -> Spec:
    has_kernel = chosen.packing is not None
    if execution == "kernel" and not has_kernel:
        raise UserError(f"MLX has no kernel for {chosen.name} (layer {path})", hint="use execution 'auto' or 'dense'")
    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    if dtype not in chosen.dtypes:
        allowed = ", ".join(dtype_name(d) for d in chosen.dtypes)
        raise UserError(
            f"{chosen.name} (layer {path}) cannot be deployed in {dtype_name(dtype)}",
            hint=f"Core ML computes in float16: deploy in {allowed}",
        )
    kernel = has_kernel and (execution == "kernel" or (execution == "auto" and on_gpu))
    return Spec(chosen, dtype, kernel, chosen.range_names if learned or chosen.holds_ranges else ())


def _swap(path: str, module: nn.Module, target: str, spec: Spec, learned: bool) -> None:
    swapped = qat_class(module)
    assert swapped is not None
    if not hasattr(module, "qat"):
        module.qat = LayerState(path, type(module))
        module.__class__ = swapped
    module.qat.specs[target] = spec
    for name, value in starting_ranges(module, spec).items():
        module[parameter_name(target, name)] = value
        if not learned:
            module.freeze(recurse=False, keys=parameter_name(target, name))


def attached(model: nn.Module) -> dict[str, nn.Module]:
    """The swapped layers of a model, by path."""
    return {module.qat.path: module for _, module in model.named_modules() if hasattr(module, "qat")}


def activate(model: nn.Module, target: str | None, layers: Iterable[str] | None = None) -> None:
    """Choose the target that the forward runs on; None is the float master itself.

    A compiled step freezes the choice: make one compiled step for each target.

    Args:
        layers: paths to switch; all swapped layers when None.

    Raises:
        UserError: no layer was attached for this target.
    """
    found = attached(model)
    known = {name for module in found.values() for name in module.qat.specs}
    if target is not None and target not in known:
        raise UserError(f"no layer is attached for target {target!r}", hint=f"attached: {', '.join(sorted(known))}")
    for path in found if layers is None else layers:
        found[path].qat.active = target


def refresh_ranges(model: nn.Module, target: str = DEFAULT_TARGET) -> None:
    """Take held ranges (palettes) anew from the present masters, in place; learned ones start over as well."""
    for module in attached(model).values():
        spec = module.qat.specs.get(target)
        if spec:
            for name, value in starting_ranges(module, spec).items():
                module[parameter_name(target, name)] = value


def forget(module: nn.Module, target: str, spec: Spec) -> None:
    """Drop the ranges and held codes of one target from a layer."""
    names = [parameter_name(target, name) for name in spec.range_names]
    names += [held_name(target, name) for name in (*spec.code_names, RESIDUAL) if spec.code_names]
    for name in names:
        del module[name]
        module._no_grad.discard(name)


def detach(model: nn.Module) -> nn.Module:
    """Give every swapped layer its float class back, in place; learned ranges go, masters stay. Returns the model."""
    for module in attached(model).values():
        state: LayerState = module.qat
        for target, spec in state.specs.items():
            forget(module, target, spec)
        module.__class__ = state.float_class
        del module.qat
    return model
