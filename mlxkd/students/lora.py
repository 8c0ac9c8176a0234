"""Low-rank adapters on a student, and merging them without rounding again."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlxkd import compat
from mlxkd.errors import UserError
from mlxkd.trees import leaves


@dataclass(frozen=True)
class LoRA:
    """What to adapt.

    Args:
        rank: of the update.
        scale: factor on the update (mlx-lm's ``scale``, not alpha).
        dropout: before the update, 0 to below 1.
        layers: how many of the last layers; None for all.
        keys: names of modules within a layer; None for every linear layer.
        dora: decompose into magnitude and direction.
    """

    rank: int = 8
    scale: float = 20.0
    dropout: float = 0.0
    layers: int | None = None
    keys: Sequence[str] | None = None
    dora: bool = False


def attach(model: nn.Module, options: LoRA) -> nn.Module:
    """Freeze ``model`` and put adapters into it, in place; only they train.

    Raises:
        UserError: options out of range, or names that match no module.
    """
    if options.rank < 1 or not 0 <= options.dropout < 1:
        raise UserError(f"rank {options.rank} or dropout {options.dropout} is out of range", where="student.lora")
    model.freeze()
    compat.add_lora(model, options.rank, options.scale, options.dropout, options.layers, options.keys, options.dora)
    if not leaves(model.trainable_parameters()):
        raise UserError("no layer was adapted", where="student.lora.keys", hint=f"keys given: {options.keys}")
    return model


def adapted(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of every adapter."""
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "fuse")]


def merge(model: nn.Module, config: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Fold the adapters into the weights, in place.

    A quantised layer becomes a float one: rounding the sum to the grid again would lose the adapter (its effect is
    smaller than a step). The config says so per layer, and mlx-lm loads the result.

    Returns:
        The model, unfrozen, and its config.
    """
    merged = copy.deepcopy(config)
    found = adapted(model)
    if not found:
        raise UserError("this model has no adapters to merge", where="student.lora")
    model.update_modules(tree_unflatten([(name, module.fuse(dequantize=True)) for name, module in found]))
    if entry := merged.get("quantization"):
        entry |= {name: False for name, _ in found}
    model.unfreeze()
    return model, merged
