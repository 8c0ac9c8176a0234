"""Elementwise arithmetic, comparison, logic and rounding; cast and select."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ane.mil.ops import _functions
from ane.mil.ops.registry import OpContext, op
from ane.mil.types import HELD_AS

Array = np.ndarray


def _sign(x: Array) -> Array:
    return np.sign(x)


def _floor_div(x: Array, y: Array) -> Array:
    return np.floor_divide(x, y)


def _integer_pow(x: Array, y: Array) -> Array:
    """Integers too, as the exact power where it fits (a negative exponent truncates to zero)."""
    if np.issubdtype(np.result_type(x, y), np.floating):
        return np.power(x, y)
    return np.power(x.astype(np.float64), y)


UNARY: dict[str, Callable[[Array], Array]] = {
    "abs": np.abs,
    "acos": np.arccos,
    "asin": np.arcsin,
    "atan": np.arctan,
    "atanh": np.arctanh,
    "ceil": np.ceil,
    "cos": np.cos,
    "cosh": np.cosh,
    "erf": _functions.erf,
    "exp": np.exp,
    "exp2": lambda x: np.exp2(x.astype(np.float32)),
    "floor": np.floor,
    "logical_not": np.logical_not,
    "round": np.rint,  # halves go to the even neighbour
    "sign": _sign,
    "sin": np.sin,
    "sinh": np.sinh,
    "sqrt": np.sqrt,
    "square": np.square,
    "tan": np.tan,
    "tanh": np.tanh,
}
BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "equal": np.equal,
    "floor_div": _floor_div,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "logical_and": np.logical_and,
    "logical_or": np.logical_or,
    "logical_xor": np.logical_xor,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "mod": np.mod,  # the sign of the divisor
    "mul": np.multiply,
    "not_equal": np.not_equal,
    "pow": _integer_pow,
    "real_div": np.true_divide,
    "sub": np.subtract,
}


def _unary(function: Callable[[Array], Array]) -> Callable[..., Array]:
    def call(ctx: OpContext, *, x: Array) -> Array:
        return function(np.asarray(x))

    return call


def _binary(function: Callable[[Array, Array], Array]) -> Callable[..., Array]:
    def call(ctx: OpContext, *, x: Array, y: Array) -> Array:
        x, y = np.asarray(x), np.asarray(y)
        if x.shape != y.shape:
            ctx.reserve(math.prod(np.broadcast_shapes(x.shape, y.shape)))
        return function(x, y)

    return call


for _name, _function in UNARY.items():
    op(_name, versions=("ios15",))(_unary(_function))
for _name, _pair in BINARY.items():
    op(_name, versions=("ios15",))(_binary(_pair))


@op("clip", versions=("ios15", "ios17"))
def clip(ctx: OpContext, *, x: Array, alpha: Any, beta: Any) -> Array:
    """min(max(x, alpha), beta)."""
    return np.minimum(np.maximum(x, alpha), beta)


@op("threshold", versions=("ios15",))
def threshold(ctx: OpContext, *, x: Array, alpha: Any) -> Array:
    """max(x, alpha)."""
    return np.maximum(x, alpha)


@op("inverse", versions=("ios15", "ios17"))
def inverse(ctx: OpContext, *, x: Array, epsilon: Any = 1e-4) -> Array:
    """1 / (x + epsilon)."""
    return 1.0 / (x + epsilon)


@op("log", versions=("ios15", "ios17"))
def log(ctx: OpContext, *, x: Array, epsilon: Any = 1e-45) -> Array:
    """log(x + epsilon)."""
    return np.log(x + epsilon)


@op("rsqrt", versions=("ios15", "ios17"))
def rsqrt(ctx: OpContext, *, x: Array, epsilon: Any = 1e-12) -> Array:
    """1 / sqrt(x + epsilon)."""
    return 1.0 / np.sqrt(x + epsilon)


@op("cast", versions=("ios15", "ios17"))
def cast(ctx: OpContext, *, x: Array, dtype: str) -> Array:
    """Convert to ``dtype``: floats truncate towards zero, anything but zero is true.

    Floats beyond an integer type's range saturate; integers keep their low bits.
    """
    target: Any = HELD_AS[dtype]
    x = np.asarray(x)
    if x.dtype.kind == "f" and np.issubdtype(target, np.integer):
        bounds = np.iinfo(target)
        return np.clip(np.nan_to_num(x.astype(np.float64)), bounds.min, bounds.max).astype(target)
    return x.astype(target)


@op("select", versions=("ios15",))
def select(ctx: OpContext, *, cond: Any, a: Array, b: Array) -> Array:
    """a where cond, else b, with broadcasting."""
    return np.where(cond, a, b)


@op("identity", versions=("ios15",))
def identity(ctx: OpContext, *, x: Any) -> Any:
    """x itself."""
    return x
