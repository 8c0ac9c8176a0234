"""Differentiable k-means palettes (Cho et al., DKM, 2108.12659) in bounded memory.

Attention A = softmax(-(w - c)^2 / tau) over the entries; c' = A.T w / sum A, repeated; w' = A c'. The plain form
keeps [weights, entries] for every iteration. Here each pass runs over chunks with analytic gradients, so that
the largest array is [CHUNK, entries] beside a few of the weight's own size. Same order as coremltools' palettizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import mlx.core as mx

TAU = 1e-4  # coremltools' default
ITERATIONS = 3
FLOOR = 1e-7  # keeps every entry alive, as coremltools does
CHUNK = 1 << 16


def _chunks(x: mx.array) -> Iterator[slice]:
    for start in range(0, x.shape[-1], CHUNK):
        yield slice(start, start + CHUNK)


def _after(x: mx.array, *earlier: mx.array) -> mx.array:
    # Without the dependency MLX may start every chunk before it finishes one, and hold them all.
    return mx.depends(x, list(earlier)) if earlier else x


def _attention(x: mx.array, c: mx.array, tau: mx.array) -> tuple[mx.array, mx.array]:
    """Floored attention [g, n, k] and where the floor did not act."""
    soft = mx.softmax(-mx.square(x[..., None] - c[:, None, :]) / tau, axis=-1)
    return mx.maximum(soft, FLOOR), soft


def _logit_pullback(
    soft: mx.array, flow: mx.array, x: mx.array, c: mx.array, tau: mx.array
) -> tuple[mx.array, mx.array]:
    """Gradients to x [g, n] and c [g, k] of a function of the attention whose gradient is ``flow`` [g, n, k]."""
    flow = mx.where(soft >= FLOOR, flow, 0.0)
    logits = soft * (flow - mx.sum(soft * flow, axis=-1, keepdims=True))
    slope = logits * (2 / tau) * (x[..., None] - c[:, None, :])
    return -mx.sum(slope, axis=-1), mx.sum(slope, axis=1)


@mx.custom_function
def _moments(x: mx.array, c: mx.array, tau: mx.array) -> tuple[mx.array, mx.array]:
    """(sum A x, sum A), each [g, k]."""
    first, mass = mx.zeros_like(c), mx.zeros_like(c)
    for part in _chunks(x):
        here = _after(x[:, part], mass)
        attention, _ = _attention(here, c, tau)
        first, mass = first + mx.sum(attention * here[..., None], axis=1), mass + mx.sum(attention, axis=1)
    return first, mass


@_moments.vjp
def _moments_vjp(primals: Any, cotangents: Any, _: Any) -> tuple[mx.array, ...]:
    x, c, tau = primals
    dfirst, dmass = cotangents
    dxs: list[mx.array] = []
    dc = mx.zeros_like(c)
    for part in _chunks(x):
        here = _after(x[:, part], dc, *dxs[-1:])
        attention, soft = _attention(here, c, tau)
        flow = dfirst[:, None, :] * here[..., None] + dmass[:, None, :]
        dx, more = _logit_pullback(soft, flow, here, c, tau)
        dxs.append(dx + mx.sum(attention * dfirst[:, None, :], axis=-1))
        dc = dc + more
    return mx.concatenate(dxs, axis=1), dc, mx.zeros_like(tau)


@mx.custom_function
def _mixture(x: mx.array, c: mx.array, values: mx.array, tau: mx.array) -> mx.array:
    """sum over k of A[k] values[k], [g, n], attention from ``c``."""
    parts: list[mx.array] = []
    for part in _chunks(x):
        here = _after(x[:, part], *parts[-1:])
        parts.append(mx.sum(_attention(here, c, tau)[0] * values[:, None, :], axis=-1))
    return mx.concatenate(parts, axis=1)


@_mixture.vjp
def _mixture_vjp(primals: Any, cotangent: mx.array, _: Any) -> tuple[mx.array, ...]:
    x, c, values, tau = primals
    dxs: list[mx.array] = []
    dc, dvalues = mx.zeros_like(c), mx.zeros_like(c)
    for part in _chunks(x):
        here, flow = _after(x[:, part], dc, dvalues, *dxs[-1:]), cotangent[:, part, None]
        attention, soft = _attention(here, c, tau)
        dx, more = _logit_pullback(soft, flow * values[:, None, :], here, c, tau)
        dxs.append(dx)
        dc, dvalues = dc + more, dvalues + mx.sum(attention * flow, axis=1)
    return mx.concatenate(dxs, axis=1), dc, dvalues, mx.zeros_like(tau)


def soft_palette(
    groups: mx.array, palette: mx.array, tau: float = TAU, iterations: int = ITERATIONS
) -> tuple[mx.array, mx.array]:
    """Soft-assigned weights and the palette they moved to.

    Args:
        groups: weights float32 [g, n], one row per palette.
        palette: starting entries float32 [g, k]; no gradient goes to them.
        tau: temperature in squared weight units; towards 0 the assignment hardens.
        iterations: attention passes.

    Returns:
        weights float32 [g, n] and palettes float32 [g, k], both differentiable in ``groups``.
    """
    temperature = mx.array(tau, mx.float32)
    centres = mx.stop_gradient(palette)
    before = centres
    for _ in range(iterations):
        before = centres
        first, mass = cast(tuple[mx.array, mx.array], _moments(groups, before, temperature))
        centres = first / mass
    weights = cast(mx.array, _mixture(groups, before, centres, temperature))
    return weights, centres
