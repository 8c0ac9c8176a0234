"""Heavy products on the faster of NumPy and MLX.

On a CPU, NumPy with its own OpenBLAS wins for everything here (matrix-vector products are bound by memory).
Where MLX has a GPU, large products move there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np

# Below this many multiply-adds the transfer to a GPU costs more than it saves.
GPU_WORTH = 1 << 24


class NumPyProducts:
    """matmul, einsum and conv in fp32 on the CPU."""

    def matmul(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """``x @ y``."""
        # One row or column is a matrix-vector product: BLAS reads the matrix nearly twice as fast that way.
        if y.ndim == 2 and 0 < x.size == x.shape[-1]:
            return (y.T @ x.reshape(-1)).reshape(*x.shape[:-1], y.shape[-1])
        if x.ndim == 2 and y.ndim > 1 and y.shape[-1] == 1 and 0 < y.size == y.shape[-2]:
            return (x @ y.reshape(-1)).reshape(*y.shape[:-2], x.shape[0], 1)
        return np.matmul(x, y)

    def einsum(self, equation: str, *values: np.ndarray) -> np.ndarray:
        """``np.einsum``, as one (batched) matrix product wherever two operands allow it."""
        plan = _as_matmul(equation) if len(values) == 2 else None
        return (
            _contract(plan, values[0], values[1], self.matmul) if plan else np.einsum(equation, *values, optimize=True)
        )

    def conv(
        self,
        x: np.ndarray,
        weight: np.ndarray,
        strides: tuple[int, ...],
        pads: tuple[tuple[int, int], ...],
        dilations: tuple[int, ...],
        groups: int,
    ) -> np.ndarray:
        """Cross-correlation of x[N,C,*spatial] with weight[O,C/groups,*kernel]; zero pads (before, after)."""
        if any(before or after for before, after in pads):
            x = np.pad(x, ((0, 0), (0, 0), *pads))
        batch, channels = x.shape[:2]
        out, kernel = weight.shape[0], weight.shape[2:]
        rank = len(kernel)
        if math.prod(kernel) == 1:
            columns = x[(slice(None), slice(None), *(slice(None, None, s) for s in strides))]
            spatial = columns.shape[2:]
        else:
            columns, spatial = _windows(x, kernel, strides, dilations)
        columns = columns.reshape(batch, groups, (channels // groups) * math.prod(kernel), math.prod(spatial))
        rows = weight.reshape(groups, out // groups, -1)
        if groups == 1:
            return self.matmul(rows[0], columns[:, 0]).reshape(batch, out, *spatial)
        if groups == channels:
            product = np.einsum("gok,ngks->ngos", rows, columns)
        else:
            product = self.matmul(rows, columns)
        return product.reshape(batch, out, *spatial[:rank])


class MLXProducts(NumPyProducts):
    """As NumPyProducts, with large products on MLX's GPU."""

    def matmul(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """``x @ y``."""
        if x.ndim < 2 or y.ndim < 2 or x.size * y.shape[-1] < GPU_WORTH:
            return super().matmul(x, y)
        import mlx.core as mx

        return np.array(mx.array(x) @ mx.array(y))

    def conv(
        self,
        x: np.ndarray,
        weight: np.ndarray,
        strides: tuple[int, ...],
        pads: tuple[tuple[int, int], ...],
        dilations: tuple[int, ...],
        groups: int,
    ) -> np.ndarray:
        """Cross-correlation of x[N,C,*spatial] with weight[O,C/groups,*kernel]; zero pads (before, after)."""
        if x.size * weight.shape[0] * math.prod(weight.shape[2:]) < GPU_WORTH * groups or weight.ndim > 4:
            return super().conv(x, weight, strides, pads, dilations, groups)
        import mlx.core as mx

        result = mx.conv_general(
            mx.moveaxis(mx.array(x), 1, -1),
            mx.moveaxis(mx.array(weight), 1, -1),
            strides,
            ([before for before, _ in pads], [after for _, after in pads]),
            dilations,
            groups=groups,
        )
        return np.array(mx.moveaxis(result, -1, 1))


@functools.cache
def products() -> NumPyProducts:
    """The faster backend of this machine: MLX where it computes on a GPU, else NumPy."""
    try:
        import mlx.core as mx
    except ImportError:
        return NumPyProducts()
    return MLXProducts() if mx.default_device().type == mx.DeviceType.gpu else NumPyProducts()


def _windows(
    x: np.ndarray, kernel: tuple[int, ...], strides: tuple[int, ...], dilations: tuple[int, ...]
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Patches [N, C, *kernel, *out] of x[N, C, *spatial], and the out shape."""
    rank = len(kernel)
    spans = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True))
    axes = tuple(range(2, 2 + rank))
    view = np.lib.stride_tricks.sliding_window_view(x, spans, axes)
    steps = (slice(None), slice(None), *(slice(None, None, s) for s in strides))
    view = view[(*steps, *(slice(None, None, d) for d in dilations))]
    spatial = view.shape[2 : 2 + rank]
    return view.transpose(0, 1, *range(2 + rank, 2 + 2 * rank), *axes), spatial


Plan = tuple[str, str, str, str, str, str]


@functools.lru_cache(maxsize=256)
def _as_matmul(equation: str) -> Plan | None:
    """Split the labels of a two-operand einsum into batch, left, right and summed ones, or None."""
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    left, _, right = inputs.partition(",")
    if not arrow or "." in equation or any(len(set(term)) != len(term) for term in (left, right, out)):
        return None
    batch = "".join(c for c in left if c in right and c in out)
    summed = "".join(c for c in left if c in right and c not in out)
    rows = "".join(c for c in left if c not in right)
    columns = "".join(c for c in right if c not in left)
    if sorted(batch + rows + columns) != sorted(out):
        return None
    return left, right, out, batch + rows + summed, batch + summed + columns, f"{batch},{rows},{summed},{columns}"


def _contract(
    plan: Plan, x: np.ndarray, y: np.ndarray, matmul: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    left, right, out, left_order, right_order, groups = plan
    sizes = dict(zip(left, x.shape, strict=True)) | dict(zip(right, y.shape, strict=True))
    batch, rows, summed, columns = groups.split(",")
    count = {group: math.prod(sizes[c] for c in group) for group in (batch, rows, summed, columns)}
    a = x.transpose([left.index(c) for c in left_order]).reshape(count[batch], count[rows], count[summed])
    b = y.transpose([right.index(c) for c in right_order]).reshape(count[batch], count[summed], count[columns])
    natural = batch + rows + columns
    result = matmul(a, b).reshape([sizes[c] for c in natural])
    return result.transpose([natural.index(c) for c in out])
