"""What trains when: ranges first and codes after, several targets in turn, fewer bits as training goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from mlxkd.errors import UserError
from mlxkd.quant.grids import FLOAT, grid
from mlxkd.quant.modules import ADAPTER, RESIDUAL, held_codes, held_name, master, parameter_name, ranges_of
from mlxkd.quant.plan import DEFAULT_TARGET, activate, attached, forget

Trains = Literal["all", "ranges"]


@dataclass(frozen=True)
class Phase:
    """From ``start`` (a step) on, train ``target`` (None: the float model), codes and all or ranges alone."""

    start: int
    target: str | None
    trains: Trains = "all"


def phases(
    steps: int, *, share: float, targets: Sequence[str] = (DEFAULT_TARGET,), ranges_first: float = 0.0
) -> tuple[Phase, ...]:
    """Float training, then quantisation-aware training for the last ``share`` of ``steps``.

    Fuse it with the cool-down by letting the learning rate decay over the same last steps.

    Args:
        targets: one target, or several of falling width for progressive bits: each gets an equal part.
        ranges_first: part of each target's steps in which codes rest and only ranges train.

    Raises:
        UserError: a share outside (0, 1], or ranges_first outside [0, 1).
    """
    if not 0 < share <= 1 or not 0 <= ranges_first < 1:
        raise UserError(f"share {share} must lie in (0, 1] and ranges_first {ranges_first} in [0, 1)")
    begin = steps - round(steps * share)
    found = [Phase(0, None)] if begin else []
    for i, target in enumerate(targets):
        start = begin + (steps - begin) * i // len(targets)
        length = begin + (steps - begin) * (i + 1) // len(targets) - start
        if ranges_first:
            found.append(Phase(start, target, "ranges"))
        found.append(Phase(start + round(length * ranges_first), target))
    return tuple(found)


def phase_at(plan: Sequence[Phase], step: int) -> Phase:
    """The phase that a step belongs to."""
    return next(phase for phase in reversed(plan) if phase.start <= step)


def enter(model: nn.Module, phase: Phase) -> None:
    """Switch the model to a phase, in place. Compile the step anew afterwards: a compiled step freezes the choice.

    Raises:
        UserError: a phase that trains ranges alone on layers without learned ranges.
    """
    for target in {name for module in attached(model).values() for name in module.qat.specs}:
        if target != phase.target or phase.trains == "all":
            release(model, target)
    activate(model, phase.target)
    if phase.target and phase.trains == "ranges":
        hold(model, phase.target)


def hold(model: nn.Module, target: str = DEFAULT_TARGET) -> None:
    """Fix the codes of every layer of a target and freeze its master: ranges and norms go on training.

    With an affine grid this is what mlx-lm's DWQ trains.

    Raises:
        UserError: a layer whose ranges are not parameters.
    """
    layers = [m for m in attached(model).values() if target in m.qat.specs and not m.qat.specs[target].code_names]
    rigid = [m.qat.path for m in layers if not m.qat.specs[target].range_names]
    if rigid:
        hint = "attach with learned_ranges=True; small-float grids have none: leave such layers out or train all"
        raise UserError(f"nothing would train in {', '.join(rigid)}: their ranges are not learned", hint=hint)
    for module in layers:
        spec = module.qat.specs[target]
        codes = spec.grid.codes_for(master(module), ranges_of(module, target, spec), spec.dtype)
        for name in spec.range_names:  # sorted palettes and the like: the ranges that the codes mean
            module[parameter_name(target, name)] = codes[name].astype(mx.float32)
        kept = {name: value for name, value in codes.items() if name not in spec.range_names}
        residual = master(module) - spec.grid.decode(codes, master(module).dtype)
        for name, value in {**kept, RESIDUAL: residual}.items():
            module[held_name(target, name)] = value
        frozen = [held_name(target, name) for name in (*kept, RESIDUAL)]
        module.freeze(recurse=False, keys=[*frozen, *(k for k in ("weight", *ADAPTER) if k in module)])
        module.qat.specs[target] = replace(spec, code_names=tuple(kept))


def release(model: nn.Module, target: str = DEFAULT_TARGET) -> None:
    """Let codes follow the master again. The master moves with the ranges, so that no code changes here."""
    for module in attached(model).values():
        spec = module.qat.specs.get(target)
        if not spec or not spec.code_names:
            continue
        held, ranges = held_codes(module, target, spec), ranges_of(module, target, spec)
        residual = module[held_name(target, RESIDUAL)]
        codes = {**held, **spec.grid.stored(ranges, spec.dtype)}
        centre = spec.grid.decode(codes, residual.dtype)
        moved = centre + residual
        same = spec.grid.fake(moved, spec.dtype, ranges).astype(centre.dtype) == centre
        free = replace(spec, code_names=())
        forget(module, target, replace(spec, range_names=()))
        module.qat.specs[target] = free
        keys = [k for k in ADAPTER if k in module] if "lora_a" in module else ["weight"]
        module.unfreeze(recurse=False, keys=keys)
        if "lora_a" not in module:
            module.weight = mx.where(same, moved, centre)


def settle(model: nn.Module) -> None:
    """Move differentiable palettes to where their weights pull them, in place; call it after each update."""
    for module in attached(model).values():
        for target, spec in module.qat.specs.items():
            if spec.tau is not None:
                moved = spec.grid.soft(master(module), ranges_of(module, target, spec), spec.dtype, spec.tau)[1]
                for name, value in moved.items():
                    module[parameter_name(target, name)] = mx.stop_gradient(value)


SHARPEST = 100.0  # a fraction of 0.52 becomes 0.98
ANNEALED = 0.95  # of a phase; in the rest codes hardly move and ranges settle


def sharpness_at(progress: float) -> float:
    """Sharpness of annealed rounding after a share of a phase.

    From 1, nearly the identity, to SHARPEST by equal factors, and there it stays.
    """
    return float(SHARPEST ** min(1.0, progress / ANNEALED))


def check_annealing(plan: Mapping[str, str]) -> None:
    """Refuse a plan with layers on grids that have no soft rounding.

    Raises:
        UserError: such layers, all named.
    """
    rigid = [f"{path} ({name})" for path, name in plan.items() if name != FLOAT and not grid(name).anneals]
    if rigid:
        raise UserError(
            f"annealed rounding is for affine and int8 grids; these layers are on others: {', '.join(rigid)}",
            where="quantisation.rounding",
            hint="use straight_through; palettes have palette_temperature",
        )


def anneal(model: nn.Module, sharpness: mx.array | None) -> None:
    """Round softly in the training forward from now on, in place; packing and evaluation round as ever.

    Args:
        sharpness: a scalar; None goes back to straight-through rounding.
    """
    for module in attached(model).values():
        module.qat.sharpness = sharpness


def interleave(model: nn.Module, targets: Sequence[str], step: int, *, by: Literal["step", "layer"] = "step") -> None:
    """Choose the targets of a step, in place: one for all layers, or one for each layer in turn.

    by="layer" needs one compiled step for each ``step % len(targets)``.
    """
    if by == "step":
        activate(model, targets[step % len(targets)])
        return
    for i, path in enumerate(attached(model)):
        activate(model, targets[(step + i) % len(targets)], [path])
