"""Matrix products: linear, matmul, einsum and attention."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ane.mil.ops import _functions
from ane.mil.ops.registry import OpContext, op

Array = np.ndarray


def _product(ctx: OpContext, x: Array, y: Array) -> Array:
    """x @ y; integers stay integers, which a float backend could not hold exactly."""
    ctx.reserve(x.size // max(x.shape[-1], 1) * (y.shape[-1] if y.ndim > 1 else 1))
    if x.dtype.kind == "f" and y.dtype.kind == "f":
        return ctx.xp.matmul(x, y)
    return np.matmul(x, y)


@op("linear", versions=("ios15", "ios17"))
def linear(ctx: OpContext, *, x: Array, weight: Array, bias: Any = None) -> Array:
    """x weight^T + bias, weight[D_out, D_in]."""
    y = _product(ctx, x, np.swapaxes(weight, 0, 1))
    return y if bias is None else y + bias


@op("matmul", versions=("ios15", "ios17"))
def matmul(ctx: OpContext, *, x: Array, y: Array, transpose_x: bool = False, transpose_y: bool = False) -> Array:
    """NumPy's matmul after transposing the last two axes on request (vectors are never transposed)."""
    if transpose_x and x.ndim > 1:
        x = np.swapaxes(x, -1, -2)
    if transpose_y and y.ndim > 1:
        y = np.swapaxes(y, -1, -2)
    return _product(ctx, x, y)


@op("einsum", versions=("ios15",), variadic=("values",))
def einsum(ctx: OpContext, *, values: tuple[Array, ...], equation: str) -> Array:
    """NumPy's einsum; axes of length 1 broadcast against the same letter of the other operand."""
    equation = equation.replace(" ", "")
    terms, _, result = equation.partition("->")
    letters = terms.split(",")
    sizes: dict[str, int] = {}
    for term, value in zip(letters, values, strict=True):
        for letter, size in zip(term, value.shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    ctx.reserve(math.prod(sizes[letter] for letter in result))
    whole = [
        np.broadcast_to(value, tuple(sizes[letter] for letter in term))
        for term, value in zip(letters, values, strict=True)
    ]
    return ctx.xp.einsum(f"{terms}->{result}" if result else terms, *whole)


@op("scaled_dot_product_attention", versions=("ios18",))
def scaled_dot_product_attention(
    ctx: OpContext, *, query: Array, key: Array, value: Array, attn_mask: Any = None
) -> Array:
    """softmax(query key^T / sqrt(E) + mask) value, leading axes broadcast.

    A boolean mask says which keys take part; a row that may see none gives NaN, as the formula does.
    """
    scale = np.float32(1.0 / math.sqrt(query.shape[-1]))
    ctx.reserve(query.size // query.shape[-1] * key.shape[-2])
    scores = ctx.xp.matmul(query * scale, np.swapaxes(key, -1, -2))
    if attn_mask is not None:
        mask = np.asarray(attn_mask)
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    return ctx.xp.matmul(_functions.softmax(scores.astype(np.float32, copy=False)), value)
