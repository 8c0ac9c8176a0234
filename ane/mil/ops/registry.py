"""Where an operation declares itself, and where the executor finds it.

An operation is one function::

    @op("softmax", versions=("ios15",))
    def softmax(ctx: OpContext, *, x, axis=-1):
        shifted = np.exp(x - x.max(axis=axis, keepdims=True))
        return shifted / shifted.sum(axis=axis, keepdims=True)

Keyword arguments carry the names that MIL gives its inputs and the defaults that MIL documents.
What arrives:

* fp16, fp32 and fp64 tensors: ``float32`` arrays (scalars: rank 0). Products accumulate in fp32 by that alone.
* integer and bool tensors: arrays of their own dtype; sub-byte integers in int8/uint8.
* a constant bool scalar: ``bool``; a constant string: ``str``; a list of strings: a tuple of ``str``.
* inputs named in ``variadic``: always a tuple, even of one.
* lists and states: the objects of ``control_flow.List`` and ``states.Slot``.

What is returned: one value, or a tuple with one value per output. The executor casts each to the declared
dtype, checks it against the declared shape, and rounds fp16 when the mode asks for it. Return a ``float16``
array where the program itself demands the rounding in every mode (``cast`` to fp16, say).
Arguments are shared: never write into them.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from ane.mil.limits import Limits
from ane.mil.types import ValueType
from mlxkd.errors import UserError, unknown

Mode = Literal["exact", "fp16"]
# Opsets in the order Apple released them: an op serves its version and every later one, until redefined.
OPSETS = ("ios13", "ios14", "ios15", "ios16", "ios17", "ios18", "ios26")


class Products(Protocol):
    """Heavy products, on whichever of NumPy and MLX is faster for the size. fp32 in, fp32 out."""

    def matmul(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """NumPy's ``x @ y``."""

    def einsum(self, equation: str, *values: np.ndarray) -> np.ndarray:
        """NumPy's ``einsum(equation, *values)``."""

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


def _no_blocks(index: int, values: tuple[Any, ...]) -> tuple[Any, ...]:
    raise UserError(f"the operation has no nested block {index}")


@dataclass
class OpContext:
    """What an operation may ask besides its inputs.

    Args:
        name: the operation's own name in the program, for messages.
        outputs: declared type of each output.
        mode: "exact" or "fp16"; ops seldom care, the executor does the rounding.
        xp: matmul, einsum and conv on the faster backend.
        rng: the random generator of this prediction; ``random(seed)`` gives the op its own.
        attributes: the op's attributes besides its name.
        run_block: runs nested block ``i`` with positional values for its inputs; returns its outputs.
        opset: opset of the enclosing function, e.g. "ios18".
        reserve: refuses (UserError) a number of elements beyond the memory bound. An op whose result's size comes
            from the values of its inputs (fill, tile, range_1d, random_*, ...) calls it before allocating.
        loop_steps: most iterations of a loop.
        own: the one input that nobody else will read, when there is such a one; ask ``writable``.
    """

    name: str
    outputs: tuple[ValueType, ...]
    xp: Products
    mode: Mode = "exact"
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    attributes: Mapping[str, Any] = field(default_factory=dict)
    run_block: Callable[[int, tuple[Any, ...]], tuple[Any, ...]] = _no_blocks
    opset: str = "ios18"
    reserve: Callable[[int], None] = Limits().check_elements
    loop_steps: int = Limits.loop_steps
    own: np.ndarray | None = None

    def random(self, seed: Any = None) -> np.random.Generator:
        """A fresh generator for a seed >= 0 (the same draws at every call), else the prediction's own."""
        if seed is None or int(seed) < 0:
            return self.rng
        return np.random.default_rng(int(seed))

    def writable(self, x: np.ndarray) -> np.ndarray:
        """``x`` to write into: itself where the op registered it as ``inplace`` and owns it alone, else a copy."""
        return x if x is self.own else x.copy()

    def fault(self, what: str) -> UserError:
        """An error that names this operation."""
        return UserError(what, where=f"operation {self.name!r}")


@dataclass(frozen=True)
class Operation:
    """A registered operation: the function, the opset it begins with, and how its inputs are bound."""

    name: str
    since: str
    call: Callable[..., Any]
    variadic: frozenset[str]
    inputs: frozenset[str]
    required: frozenset[str]
    inplace: str | None


_table: dict[str, dict[str, Operation]] = {}


def op(
    name: str, *, versions: tuple[str, ...], variadic: tuple[str, ...] = (), inplace: str | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the MIL operation ``name`` from each of ``versions`` on.

    ``inplace`` names an input that the function writes into through ``ctx.writable``.

    Raises:
        ValueError: an opset nobody knows, or the same op and version registered twice.
    """

    def register(call: Callable[..., Any]) -> Callable[..., Any]:
        parameters = list(inspect.signature(call).parameters.values())[1:]
        named = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        for version in versions:
            if version not in OPSETS:
                raise ValueError(f"{name}: unknown opset {version!r}")
            if version in _table.setdefault(name, {}):
                raise ValueError(f"{name} is registered twice for {version}")
            _table[name][version] = Operation(
                name,
                version,
                call,
                frozenset(variadic),
                frozenset(p.name for p in named),
                frozenset(p.name for p in named if p.default is p.empty),
                inplace,
            )
        return call

    return register


@functools.cache
def load_all() -> None:
    """Import every module of this package, so that each registers its operations."""
    package = __name__.rpartition(".")[0]
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")


def known() -> dict[str, tuple[str, ...]]:
    """Every registered operation with the opsets it is defined for, sorted by name."""
    load_all()
    return {name: tuple(sorted(_table[name], key=OPSETS.index)) for name in sorted(_table)}


def find(name: str, opset: str) -> Operation:
    """The definition of ``name`` that a program of ``opset`` means: the newest not later than it.

    ``name`` may carry its version as compiled models print it ("ios17.conv").

    Raises:
        UserError: no such operation, or it begins in a later opset.
    """
    load_all()
    prefix, _, plain = name.rpartition(".")
    wanted = prefix if prefix in OPSETS else opset
    if wanted not in OPSETS:
        raise unknown("opset", wanted, OPSETS)
    if plain not in _table:
        raise unknown("operation", plain, _table)
    served = [v for v in OPSETS[: OPSETS.index(wanted) + 1] if v in _table[plain]]
    if not served:
        raise UserError(
            f"operation {plain!r} does not exist in {wanted}",
            hint=f"it is defined from {min(_table[plain], key=OPSETS.index)} on",
        )
    return _table[plain][served[-1]]
