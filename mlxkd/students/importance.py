"""Which MLP channels matter: mean absolute activation on real inputs.

A channel whose activation is small whatever the token contributes little to the residual stream
(Minitron, arXiv 2407.14679, section 2.1, width importance).
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxkd.errors import UserError


class _Recorder(nn.Module):
    """Stands in for a down projection and keeps the mean absolute value of what goes into it."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.total = mx.zeros(inner.weight.shape[-1])

    def __call__(self, x: mx.array) -> mx.array:
        self.total = self.total + mx.abs(x.astype(mx.float32)).reshape(-1, x.shape[-1]).mean(axis=0)
        result: mx.array = self.inner(x)
        return result


def mlp_channels(model: nn.Module, inputs: np.ndarray, keep: int) -> list[list[int]]:
    """For each layer the ``keep`` most important MLP channels, ascending.

    Args:
        model: float weights; layers with ``mlp.down_proj``.
        inputs: int32 [B, S] token ids to probe with.
        keep: channels per layer.

    Raises:
        UserError: a family without such MLPs, or more channels than there are.
    """
    mlps: list[Any] = [getattr(layer, "mlp", None) for layer in getattr(model, "layers", [])]
    if not mlps or not all(hasattr(mlp, "down_proj") for mlp in mlps):
        raise UserError("MLP channels can be pruned only where every layer has mlp.down_proj", where="student")
    size = int(mlps[0].down_proj.weight.shape[-1])
    if not 0 < keep <= size:
        raise UserError(f"mlp_width must lie between 1 and the teacher's {size}, not {keep}", where="student")
    recorders = [_Recorder(mlp.down_proj) for mlp in mlps]
    try:
        for mlp, recorder in zip(mlps, recorders, strict=True):
            mlp.down_proj = recorder
        model(mx.array(inputs))
        totals = [np.array(recorder.total) for recorder in recorders]
    finally:
        for mlp, recorder in zip(mlps, recorders, strict=True):
            mlp.down_proj = recorder.inner
    return [sorted(int(c) for c in np.argsort(-total, kind="stable")[:keep]) for total in totals]
