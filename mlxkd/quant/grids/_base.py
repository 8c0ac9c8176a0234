"""The contract of a grid, and the straight-through functions every grid shares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from mlxkd.errors import UserError

Codes = dict[str, mx.array]
Ranges = dict[str, mx.array]


@dataclass(frozen=True)
class Constexpr:
    """What Core ML needs to hold a weight compressed.

    Args:
        op: MIL op, "constexpr_blockwise_shift_scale", "constexpr_lut_to_dense", or "const" where none fits.
        bits: width of one code in the ``data`` or ``indices`` array, which is stored one code per byte.
        arrays: keyword arguments of the op, for the weight's own two axes [out, in]. A 1x1 convolution
            appends two axes of size one (to a palette: before its last two axes).
    """

    op: str
    bits: int
    arrays: dict[str, np.ndarray]


def stand_in(shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
    """An array of a shape and dtype that takes no memory: one zero, broadcast."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def eased_round(position: mx.array, sharpness: mx.array) -> mx.array:
    """Rounding that can be soft: the identity as ``sharpness`` goes to 0, the nearest integer as it grows.

    n + (1 + tanh(k (f - 1/2)) / tanh(k / 2)) / 2 between the integers n and n + 1, where f is the fraction; continuous
    everywhere (Differentiable Soft Quantization, Gong et al. 2019, arXiv 1908.05033, with k raised by a schedule).
    """
    below = mx.floor(position)
    return below + 0.5 + 0.5 * mx.tanh(sharpness * (position - below - 0.5)) / mx.tanh(0.5 * sharpness)


def eased_slope(position: mx.array, eased: mx.array, sharpness: mx.array) -> mx.array:
    """Derivative of `eased_round` from what it gave: k / 2 (1 - t^2) / tanh(k / 2), t the tangent in it.

    Args:
        position, eased: argument and result of `eased_round`, float32 of one shape; so is what returns.
        sharpness: k, a scalar.
    """
    ends = mx.tanh(0.5 * sharpness)
    t = 2.0 * ends * (eased - mx.floor(position) - 0.5)
    return 0.5 * sharpness * (1.0 - t * t) / ends


def code_gradients(
    flow: mx.array, position: mx.array, codes: mx.array, slope: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Gradients of scale * code(position) + bias to w, scale and bias, where position = (w - bias) / scale.

    Returns [..., n], [...] and [...].

    Args:
        flow: gradient of the loss to the result, float32 [..., n]; one scale and bias to each n.
        position, codes: float32 [..., n].
        slope: of the code: 1 within the ends and 0 beyond is learned step size (Esser et al., arXiv 1902.08153),
            extended to a bias and without its constant factor: optimisers bring their own.
    """
    slope = slope.astype(flow.dtype)
    moved = mx.where(slope > 0, slope * position, 0.0)  # a scale of zero puts positions at infinity
    return flow * slope, mx.sum(flow * (codes - moved), axis=-1), mx.sum(flow * (1.0 - slope), axis=-1)


@dataclass(frozen=True)
class Grid(ABC):
    """How a weight [..., out, in] is stored; everything else asks it.

    ``dtype`` arguments are the deployment dtype: scales, palettes and decoded values are of it. A weight is
    cast to it before it is encoded, because that is what a packed model does.
    """

    name: str
    bits: int

    rowwise: ClassVar[bool] = True  # a row's codes depend on nothing outside the row
    range_names: ClassVar[tuple[str, ...]] = ()  # learned ranges this grid can train
    holds_ranges: ClassVar[bool] = False  # a layer keeps the ranges even when it does not learn them
    anneals: ClassVar[bool] = False  # `eased` exists
    dtypes: ClassVar[tuple[mx.Dtype, ...]] = (mx.float16, mx.bfloat16, mx.float32)  # deployment dtypes it allows

    @abstractmethod
    def fault(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape cannot lie on the grid, or None."""

    @abstractmethod
    def encode(self, w: mx.array, dtype: mx.Dtype) -> Codes:
        """Codes of ``w`` with ranges taken from ``w`` itself."""

    @abstractmethod
    def decode(self, codes: Codes, dtype: mx.Dtype) -> mx.array:
        """The weight [..., out, in] that the codes stand for."""

    @abstractmethod
    def bits_per_weight(self, shape: tuple[int, ...]) -> float:
        """Stored bits per weight, with 16-bit scales, for a weight of this shape."""

    @abstractmethod
    def constexpr(self, codes: Codes) -> Constexpr:
        """The codes of a weight [out, in] as the arrays of a Core ML ``constexpr`` op."""

    @abstractmethod
    def constexpr_form(self, shape: tuple[int, int]) -> Constexpr:
        """`constexpr` of any weight [out, in] of this shape: op, bits, and arrays without memory (see `stand_in`)."""

    def _lacks(self, what: str) -> UserError:
        return UserError(f"{self.name} has no {what}", where="quantisation.grid", hint="choose another grid")

    @abstractmethod
    def indices(self, codes: Codes) -> mx.array:
        """One unsigned code per weight, [..., out, in]: for counting flips and comparing machines."""

    def ranges(self, w: mx.array) -> Ranges:
        """The ranges that `encode` gives ``w``; empty where none are learned."""
        return {}

    def fitted_ranges(self, w: mx.array) -> Ranges:
        """Ranges of less squared error where the grid can say them (affine: `_fit.fit`); else those of `ranges`."""
        return self.ranges(w)

    def encode_with(self, w: mx.array, ranges: Ranges, dtype: mx.Dtype) -> Codes:
        """Codes of ``w`` under given ranges."""
        raise self._lacks("learned ranges")

    def pullback(self, cotangent: mx.array, w: mx.array, ranges: Ranges, dtype: mx.Dtype) -> tuple[mx.array, Ranges]:
        """Straight-through gradients of decode(encode_with(w, ranges)) to ``w`` and to every range."""
        raise self._lacks("learned ranges")

    def stored(self, ranges: Ranges, dtype: mx.Dtype) -> Ranges:
        """Ranges in the form and dtype that ship."""
        return {name: ranges[name].astype(dtype) for name in self.range_names}

    def range_pullback(self, cotangent: mx.array, codes: Codes) -> Ranges:
        """Gradients of decode(codes) to the ranges, codes fixed."""
        raise self._lacks("learned ranges")

    def beyond(self, w: mx.array, ranges: Ranges, dtype: mx.Dtype) -> mx.array:
        """Share (a scalar) of the weights that lie beyond the ends of their grid."""
        return mx.array(0.0)

    def soft(self, w: mx.array, ranges: Ranges, dtype: mx.Dtype, tau: float) -> tuple[mx.array, Ranges]:
        """Differentiable assignment; palettes only."""
        raise self._lacks("differentiable palette")

    def eased(self, w: mx.array, ranges: Ranges, dtype: mx.Dtype, sharpness: mx.array) -> mx.array:
        """The weight with its codes rounded by `eased_round`: near ``w`` when soft, near `fake` when sharp."""
        ranges = ranges or {name: mx.stop_gradient(value) for name, value in self.ranges(w).items()}
        result: mx.array = _eased(self, dtype, tuple(ranges))(w, sharpness, *ranges.values()).astype(dtype)
        return result

    def ease(self, w: mx.array, ranges: Ranges, dtype: mx.Dtype, sharpness: mx.array) -> mx.array:
        """`eased` in float32, without its gradient."""
        raise self._lacks("annealed rounding")

    def eased_pullback(
        self, cotangent: mx.array, w: mx.array, eased: mx.array, ranges: Ranges, dtype: mx.Dtype, sharpness: mx.array
    ) -> tuple[mx.array, Ranges]:
        """Gradients of `ease`, which gave ``eased``, to ``w`` and to every range."""
        raise self._lacks("annealed rounding")

    def linear(self, x: mx.array, codes: Codes, *, transpose: bool = True) -> mx.array | None:
        """x @ W.T (or x @ W) on the deployed kernel; None where MLX has none for this grid."""
        return None

    def gather_linear(self, x: mx.array, codes: Codes, indices: mx.array, sorted_indices: bool) -> mx.array | None:
        """The expert-wise product on the deployed kernel; None where MLX has none."""
        return None

    @property
    def packing(self) -> dict[str, Any] | None:
        """The entry of mlx-lm's ``config["quantization"]``; None where mlx-lm gets decoded weights."""
        return None

    def lookup_dtype(self, dtype: mx.Dtype) -> mx.Dtype:
        """The dtype in which a packed embedding returns its rows."""
        return dtype

    def codes_for(self, w: mx.array, ranges: Ranges, dtype: mx.Dtype) -> Codes:
        """Codes of the master ``w`` as it is deployed: the same call in training, packing and evaluation."""
        return self.encode_with(w, ranges, dtype) if ranges else self.encode(w, dtype)

    def fake(self, w: mx.array, dtype: mx.Dtype, ranges: Ranges | None = None) -> mx.array:
        """decode(encode(w)) in ``dtype``, exactly, with straight-through gradients to ``w`` and the ranges."""
        ranges = ranges or {}
        names = tuple(ranges)
        result: mx.array = _straight_through(self, dtype, names)(w, *(ranges[name] for name in names))
        return result

    def held(self, codes: Codes, ranges: Ranges, dtype: mx.Dtype) -> mx.array:
        """The weight of fixed codes under trained ranges, in ``dtype``; gradients go to the ranges alone."""
        function = _held(self, dtype, tuple(codes), tuple(ranges))
        result: mx.array = function(*codes.values(), *ranges.values())
        return result

    def fake_linear(self, x: mx.array, w: mx.array, dtype: mx.Dtype, ranges: Ranges | None = None) -> mx.array:
        """x @ fake(w).T with the deployed kernel in the forward; same gradients as the dense product."""
        ranges = ranges or {}
        names = tuple(ranges)
        result: mx.array = _kernel_linear(self, dtype, names)(x, w, *(ranges[name] for name in names))
        return result


def _gradients(grid: Grid, cotangent: mx.array, w: mx.array, ranges: Ranges, dtype: mx.Dtype) -> tuple[mx.array, ...]:
    if not ranges:
        return (cotangent.astype(w.dtype),)
    dw, dranges = grid.pullback(cotangent.astype(mx.float32), w, ranges, dtype)
    return (dw.astype(w.dtype), *(dranges[name].astype(ranges[name].dtype) for name in ranges))


# w + stop_gradient(q - w) is not exact in half precision, hence custom functions.
@cache
def _straight_through(grid: Grid, dtype: mx.Dtype, names: tuple[str, ...]) -> Callable[..., Any]:
    @mx.custom_function
    def fake(w: mx.array, *values: mx.array) -> mx.array:
        return grid.decode(grid.codes_for(w, dict(zip(names, values, strict=True)), dtype), dtype)

    @fake.vjp
    def fake_vjp(primals: Any, cotangent: mx.array, _: Any) -> tuple[mx.array, ...]:
        w, *values = primals if isinstance(primals, list | tuple) else (primals,)
        return _gradients(grid, cotangent, w, dict(zip(names, values, strict=True)), dtype)

    return fake


@cache
def _held(grid: Grid, dtype: mx.Dtype, code_names: tuple[str, ...], names: tuple[str, ...]) -> Callable[..., Any]:
    @mx.custom_function
    def held(*values: mx.array) -> mx.array:
        codes = dict(zip(code_names, values, strict=False))
        return grid.decode({**codes, **grid.stored(dict(zip(names, values[len(codes) :], strict=True)), dtype)}, dtype)

    @held.vjp
    def held_vjp(primals: Any, cotangent: mx.array, _: Any) -> tuple[mx.array, ...]:
        codes = dict(zip(code_names, primals, strict=False))
        gradients = grid.range_pullback(cotangent.astype(mx.float32), codes)
        return (*(mx.zeros_like(c) for c in codes.values()), *(gradients[name] for name in names))

    return held


# By itself, MLX would keep every step of the curve for the backward pass; the soft weight is enough.
@cache
def _eased(grid: Grid, dtype: mx.Dtype, names: tuple[str, ...]) -> Callable[..., Any]:
    @mx.custom_function
    def eased(w: mx.array, sharpness: mx.array, *values: mx.array) -> mx.array:
        return grid.ease(w, dict(zip(names, values, strict=True)), dtype, sharpness)

    @eased.vjp
    def eased_vjp(primals: Any, cotangent: mx.array, soft: mx.array) -> tuple[mx.array, ...]:
        w, sharpness, *values = primals
        ranges = dict(zip(names, values, strict=True))
        dw, dranges = grid.eased_pullback(cotangent.astype(mx.float32), w, soft, ranges, dtype, sharpness)
        to_ranges = (dranges[name].astype(ranges[name].dtype) for name in names)
        return (dw.astype(w.dtype), mx.zeros_like(sharpness), *to_ranges)

    return eased


@cache
def _kernel_linear(grid: Grid, dtype: mx.Dtype, names: tuple[str, ...]) -> Callable[..., Any]:
    @mx.custom_function
    def linear(x: mx.array, w: mx.array, *values: mx.array) -> mx.array:
        product = grid.linear(x, grid.codes_for(w, dict(zip(names, values, strict=True)), dtype))
        assert product is not None
        return product

    @linear.vjp
    def linear_vjp(primals: Any, cotangent: mx.array, _: Any) -> tuple[mx.array, ...]:
        x, w, *values = primals
        ranges = dict(zip(names, values, strict=True))
        dx = grid.linear(cotangent, grid.codes_for(w, ranges, dtype), transpose=False)
        assert dx is not None
        dw = cotangent.reshape(-1, cotangent.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        return (dx.astype(x.dtype), *_gradients(grid, dw, w, ranges, dtype))

    return linear
