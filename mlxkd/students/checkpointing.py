"""Recompute layers in the backward pass: memory for time, on one model's own layers only."""

from __future__ import annotations

import functools
from typing import Any

import mlx.nn as nn

from mlxkd.errors import UserError


def checkpoint_layers(model: nn.Module) -> nn.Module:
    """Make every layer of ``model`` keep only its inputs for the backward pass, in place; returns the model.

    Instances change, never classes: a teacher of the same family goes on as before, unlike with mlx-lm's
    ``grad_checkpoint``, which replaces ``__call__`` on the class.

    Raises:
        UserError: a model without a list of layers.
    """
    layers: list[Any] = list(getattr(model, "layers", []))
    if not layers:
        raise UserError("this family has no list of layers to checkpoint", where="training.checkpoint_layers")
    for layer in layers:
        kind: Any = type(layer)
        layer.__class__ = _checkpointed(kind)
    return model


@functools.cache
def _checkpointed(base: Any) -> Any:
    class Checkpointed(base):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            # Wrapped at each call, so that a clone checkpoints its own parameters and not the original's.
            return nn.utils.checkpoint(self, functools.partial(base.__call__, self))(*args, **kwargs)

    Checkpointed.__name__ = base.__name__
    return Checkpointed
