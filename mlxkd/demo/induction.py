"""Start a fresh Llama with a copying circuit instead of waiting for one to form.

An induction head (Olsson et al. 2022, arXiv 2209.11895) finds the earlier place where the current token stood
and repeats what came next. It forms late in training because two layers must meet by chance. Here they are
written into the initial weights and training refines them: head 0 of layer 0 attends to the previous token,
head 0 of layer 1 looks for a position whose previous token equals the current one and copies its token.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

PREVIOUS_SHARPNESS = 8.0  # score of the previous token per frequency used, after the 1/sqrt(d) of attention
MATCH_SCORE = 24.0  # score of a matching position over others
COPY_GAIN = 4.0  # size of the copied embedding beside the residual stream
SMALL = 0.1  # scale of all other output projections at the start


def seed_induction(model: Any) -> None:
    """Write the circuit into ``model`` (mlx-lm's Llama, tied embedding, at least two layers), in place."""
    layers = model.model.layers
    embedding = model.model.embed_tokens
    common = _common_direction(embedding)
    for layer in layers:
        layer.self_attn.o_proj.weight = layer.self_attn.o_proj.weight * SMALL
        layer.mlp.down_proj.weight = layer.mlp.down_proj.weight * SMALL
    size = layers[0].self_attn.q_proj.weight.shape[0] // layers[0].self_attn.n_heads
    base = float(model.args.rope_theta)
    moved = _attend_to_previous(layers[0].self_attn, common, size, base)
    _match_and_copy(layers[1].self_attn, embedding.weight, moved, size)
    mx.eval(model.parameters())


def _common_direction(embedding: nn.Embedding) -> mx.array:
    """Add one unit vector to every embedding; queries can then be constant although there are no biases."""
    width = embedding.weight.shape[1]
    common = mx.ones(width) / width**0.5
    embedding.weight = embedding.weight + common
    return common


def _set_rows(linear: nn.Linear, rows: mx.array) -> None:
    """Replace the first rows (head 0) of a projection."""
    linear.weight = mx.concatenate([rows, linear.weight[rows.shape[0] :]])


def _attend_to_previous(attention: Any, common: mx.array, size: int, base: float) -> mx.array:
    """Constant query and key whose rotary phases agree at distance 1; returns the map token -> residual [D, D].

    With RoPE the score at distance d is the sum over frequencies of cos(theta * (d - 1)).
    """
    width = common.shape[0]
    half, used = size // 2, size // 8
    theta = base ** (-mx.arange(used) * 2.0 / size)
    # A normalised input has component sqrt(D / 2) along the common direction (embedding and common part equal in size).
    strength = (PREVIOUS_SHARPNESS * size**0.5) ** 0.5 / (width / 2) ** 0.5
    query, key = mx.zeros(size), mx.zeros(size)
    query[:used] = 1.0
    key[:used], key[half : half + used] = mx.cos(theta), mx.sin(theta)
    _set_rows(attention.q_proj, strength * query[:, None] * common[None])
    _set_rows(attention.k_proj, strength * key[:, None] * common[None])
    value = _random(size, width)
    # Sized so that the moved token weighs as much in the residual stream as the token itself.
    output = _random(width, size) / (width / 2) ** 0.5
    _set_rows(attention.v_proj, value)
    attention.o_proj.weight = mx.concatenate([output, attention.o_proj.weight[:, size:]], axis=1)
    return output @ value


def _match_and_copy(attention: Any, embedding: mx.array, moved: mx.array, size: int) -> None:
    """Compare the current token with every position's previous token, in slow rotary dimensions; copy the token."""
    width = embedding.shape[1]
    half = size // 2
    slow = [*range(half // 2, half), *range(half + half // 2, size)]
    finder = mx.zeros((size, width))
    finder[mx.array(slow)] = _random(len(slow), width)
    asks = finder @ moved
    tokens = embedding - embedding.mean(axis=0)
    # Normalisation multiplies by sqrt(D / 2) before layer 0 and, with the moved token added, by sqrt(D / 4) here.
    before, here = (width / 2) ** 0.5, (width / 4) ** 0.5
    q, k = (tokens @ asks.T) * here, (tokens @ moved.T @ finder.T) * before * here
    match = (q * k).sum(axis=1).mean().item() / size**0.5
    _set_rows(attention.q_proj, asks * (MATCH_SCORE / match))
    _set_rows(attention.k_proj, finder)
    reader = _random(size, width)
    _set_rows(attention.v_proj, reader)
    attention.o_proj.weight = mx.concatenate([COPY_GAIN * reader.T, attention.o_proj.weight[:, size:]], axis=1)


def _random(rows: int, columns: int) -> mx.array:
    """Gaussian with unit-norm rows on average over columns."""
    return mx.random.normal((rows, columns)) / columns**0.5
