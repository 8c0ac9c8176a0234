"""Which parts of a teacher matter, on real inputs.

Width: a channel or head whose activation is small whatever the token contributes little to the residual stream
(Minitron, arXiv 2407.14679, section 2.1). Depth: a layer whose output points where its input did changes little; its
block influence is 1 - cos(input, output), averaged over tokens (ShortGPT, arXiv 2403.03853, equation 1).
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxkd.errors import UserError
from mlxkd.students.split import Split


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


class _Influence(nn.Module):
    """Stands in for a layer and keeps the mean cosine between its input and output."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.cosine = mx.array(1.0)

    def __call__(self, x: mx.array, *arguments: Any, **options: Any) -> mx.array:
        y: mx.array = self.inner(x, *arguments, **options)
        a, b = x.astype(mx.float32), y.astype(mx.float32)
        norms = mx.linalg.norm(a, axis=-1) * mx.linalg.norm(b, axis=-1)
        self.cosine = mx.mean(mx.sum(a * b, axis=-1) / mx.maximum(norms, 1e-12))
        return y

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


def block_influence(model: nn.Module, inputs: np.ndarray) -> list[float]:
    """The block influence of every layer.

    Args:
        model: float weights; layers that return their hidden states.
        inputs: int32 [B, S] token ids to probe with.
    """
    backbone: Any = Split(model, verify=False).backbone
    layers = list(backbone.layers)
    recorders = [_Influence(layer) for layer in layers]
    backbone.layers = recorders
    try:
        model(mx.array(inputs))
        return [1 - float(recorder.cosine) for recorder in recorders]
    finally:
        backbone.layers = layers


def deepest_layers(model: nn.Module, inputs: np.ndarray, keep: int) -> list[int]:
    """The ``keep`` layers of greatest block influence, ascending.

    Raises:
        UserError: more layers than there are.
    """
    found = block_influence(model, inputs)
    if not 0 < keep <= len(found):
        raise UserError(f"depth must lie between 1 and the teacher's {len(found)}, not {keep}", where="student")
    return sorted(int(i) for i in np.argsort(-np.array(found), kind="stable")[:keep])


def mlp_channels(model: nn.Module, inputs: np.ndarray, keep: int) -> list[list[int]]:
    """For each layer the ``keep`` most important MLP channels, ascending.

    Args:
        model: float weights; layers with ``mlp.down_proj``.
        inputs: int32 [B, S] token ids to probe with.
        keep: channels per layer.

    Raises:
        UserError: a family without such MLPs, or more channels than there are.
    """
    totals = _activity(model, inputs, "mlp", "down_proj", "MLP channels")
    size = len(totals[0])
    if not 0 < keep <= size:
        raise UserError(f"mlp_width must lie between 1 and the teacher's {size}, not {keep}", where="student")
    return [_largest(total, keep) for total in totals]


def attention_groups(model: nn.Module, inputs: np.ndarray, groups: int, keep: int) -> list[list[int]]:
    """For each layer the ``keep`` KV heads whose query heads are most active, ascending.

    Args:
        model: float weights; layers with ``self_attn.o_proj``.
        inputs: int32 [B, S] token ids to probe with.
        groups: KV heads of the model.
        keep: of them, per layer.

    Raises:
        UserError: a family without such attention, or more heads than there are.
    """
    if not 0 < keep <= groups:
        raise UserError(f"kv_heads must lie between 1 and the teacher's {groups}, not {keep}", where="student")
    totals = _activity(model, inputs, "self_attn", "o_proj", "attention heads")
    return [_largest(total.reshape(groups, -1).mean(axis=1), keep) for total in totals]


def _largest(totals: np.ndarray, keep: int) -> list[int]:
    return sorted(int(c) for c in np.argsort(-totals, kind="stable")[:keep])


def _activity(model: nn.Module, inputs: np.ndarray, part: str, projection: str, what: str) -> list[np.ndarray]:
    """Per layer the mean absolute input [channels] of a projection."""
    owners: list[Any] = [getattr(layer, part, None) for layer in getattr(model, "layers", [])]
    if not owners or not all(hasattr(owner, projection) for owner in owners):
        raise UserError(f"{what} can be pruned only where every layer has {part}.{projection}", where="student")
    recorders = [_Recorder(getattr(owner, projection)) for owner in owners]
    try:
        for owner, recorder in zip(owners, recorders, strict=True):
            setattr(owner, projection, recorder)
        model(mx.array(inputs))
        return [np.array(recorder.total) for recorder in recorders]
    finally:
        for owner, recorder in zip(owners, recorders, strict=True):
            setattr(owner, projection, recorder.inner)
