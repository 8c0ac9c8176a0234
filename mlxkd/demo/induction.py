"""Start a fresh Llama with a copying circuit instead of waiting for one to form.

An induction head (Olsson et al. 2022, arXiv 2209.11895) finds the earlier place where the current token stood
and repeats what came next. It forms late in training because two layers must meet by chance. Here they are
written into the initial weights and training refines them: head 0 of layer 0 moves a sketch of the previous token
into a few coordinates that embeddings leave empty, head 0 of layer 1 looks for the position whose sketch is that of
the current token and copies its token.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

PREVIOUS_SHARPNESS = 8.0  # score of the previous token per frequency used, after the 1/sqrt(d) of attention
MATCH_SCORE = 20.0  # score of a matching position over others
COPY_GAIN = 3.0  # size of the copied token beside the token itself
SMALL = 0.1  # scale of all other output projections at the start


def seed_induction(model: Any) -> None:
    """Write the circuit into ``model`` (mlx-lm's Llama, tied embedding, at least two layers), in place."""
    layers, embedding = model.model.layers, model.model.embed_tokens
    attention = layers[0].self_attn
    size = attention.q_proj.weight.shape[0] // attention.n_heads
    sketch = size // 2
    for layer in layers:
        layer.self_attn.o_proj.weight = layer.self_attn.o_proj.weight * SMALL
        layer.mlp.down_proj.weight = layer.mlp.down_proj.weight * SMALL
    _make_room(embedding, sketch)
    content = embedding.weight.shape[1] - sketch - 1
    to_sketch = mx.random.normal((sketch, content)) / sketch**0.5
    _move_previous(attention, to_sketch, size, float(model.args.rope_theta))
    _match_and_copy(layers[1].self_attn, to_sketch, size)
    mx.eval(model.parameters())


def _make_room(embedding: nn.Embedding, sketch: int) -> None:
    """Coordinates of every embedding: content of unit length, then ``sketch`` zeros, then a constant one."""
    rows, width = embedding.weight.shape
    content = embedding.weight[:, : width - sketch - 1]
    content = content / mx.linalg.norm(content, axis=1, keepdims=True)
    embedding.weight = mx.concatenate([content, mx.zeros((rows, sketch)), mx.ones((rows, 1))], axis=1)


def _move_previous(attention: Any, to_sketch: mx.array, size: int, base: float) -> None:
    """Attend to the previous token and write its sketch into the empty coordinates.

    Query and key are constant; with RoPE their score at distance d is the sum over the ``size / 8`` fastest
    frequencies of cos(theta * (d - 1)).
    """
    sketch, content = to_sketch.shape
    half, used = size // 2, size // 8
    theta = base ** (-mx.arange(used) * 2.0 / size)
    query, key = mx.zeros(size), mx.zeros(size)
    query[:used] = 1.0
    key[:used], key[half : half + used] = mx.cos(theta), mx.sin(theta)
    # The constant coordinate is half of a normalised input's length sqrt(D).
    width = content + sketch + 1
    strength = (PREVIOUS_SHARPNESS * size**0.5) ** 0.5 / (width / 2) ** 0.5
    constant = mx.zeros(width)
    constant[-1] = strength
    _set_head(attention.q_proj, query[:, None] * constant[None])
    _set_head(attention.k_proj, key[:, None] * constant[None])
    values = mx.zeros((size, width))
    values[:sketch, :content] = to_sketch / (width / 2) ** 0.5
    outputs = mx.zeros((width, size))
    outputs[content : content + sketch, :sketch] = mx.eye(sketch)
    _set_head(attention.v_proj, values)
    _set_output(attention.o_proj, outputs)


def _match_and_copy(attention: Any, to_sketch: mx.array, size: int) -> None:
    """Compare the sketch of the current token with every position's moved one; copy the token found.

    The comparison takes the slower half of the rotary frequencies, which hardly turn within a conversation.
    """
    sketch, content = to_sketch.shape
    width, half = content + sketch + 1, size // 2
    slow = mx.array([*range(half // 2, half), *range(half + half // 2, size)])
    # A normalised input holds content, sketch and constant, each of length about sqrt(D / 3); 1/sqrt(d) follows.
    strength = (MATCH_SCORE * size**0.5 / (width / 3)) ** 0.5
    asks, answers = mx.zeros((size, width)), mx.zeros((size, width))
    asks[slow, :content] = strength * to_sketch
    answers[slow, content : content + sketch] = strength * mx.eye(sketch)
    reader = mx.random.normal((size, content)) / size**0.5
    values, outputs = mx.zeros((size, width)), mx.zeros((width, size))
    values[:, :content] = reader / (width / 3) ** 0.5
    outputs[:content] = COPY_GAIN * reader.T
    _set_head(attention.q_proj, asks)
    _set_head(attention.k_proj, answers)
    _set_head(attention.v_proj, values)
    _set_output(attention.o_proj, outputs)


def _set_head(linear: nn.Linear, rows: mx.array) -> None:
    """Replace the first rows (head 0) of a projection."""
    linear.weight = mx.concatenate([rows, linear.weight[rows.shape[0] :]])


def _set_output(linear: nn.Linear, columns: mx.array) -> None:
    """Replace the first columns (head 0) of an output projection."""
    linear.weight = mx.concatenate([columns, linear.weight[:, columns.shape[1] :]], axis=1)
