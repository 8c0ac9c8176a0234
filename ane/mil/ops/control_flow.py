"""Branches, loops and lists of tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ane.mil.ops.registry import OpContext, op
from ane.mil.types import FLOATS, HELD_AS


@dataclass(frozen=True)
class List:
    """A list of tensors of one shape; slots not yet written are None. Writing makes a new list."""

    items: tuple[np.ndarray | None, ...]
    dtype: str
    shape: tuple[int, ...] | None = None
    growing: bool = True

    def blank(self) -> np.ndarray:
        """What an unwritten slot reads as: zeros."""
        held = np.float32 if self.dtype in FLOATS else HELD_AS[self.dtype]
        return np.zeros(self.shape or (), held)

    def read(self, index: int) -> np.ndarray:
        """The item at ``index`` (negative from the end); raises IndexError outside the list."""
        item = self.items[index]
        return self.blank() if item is None else item

    def write(self, index: int, value: np.ndarray) -> List:
        """A list with ``value`` at ``index``, grown to hold it when growing is allowed."""
        items = list(self.items)
        if index >= len(items) and self.growing:
            items += [None] * (index + 1 - len(items))
        items[index] = value
        return List(tuple(items), self.dtype, value.shape if self.shape is None else self.shape, self.growing)


@op("cond", versions=("ios15",))
def cond(ctx: OpContext, *, pred: Any) -> tuple[Any, ...]:
    """Run the first block when ``pred`` holds, else the second."""
    return ctx.run_block(0 if bool(pred) else 1, ())


@op("while_loop", versions=("ios15",), variadic=("loop_vars",))
def while_loop(ctx: OpContext, *, loop_vars: tuple[Any, ...]) -> tuple[Any, ...]:
    """Run the second block on its own results while the first says so."""
    steps = 0
    while bool(ctx.run_block(0, loop_vars)[0]):
        if steps >= ctx.loop_steps:
            raise ctx.fault(f"the loop did not end within {ctx.loop_steps} steps")
        loop_vars = ctx.run_block(1, loop_vars)
        steps += 1
    return loop_vars


@op("make_list", versions=("ios15",), variadic=("elem_shape",))
def make_list(
    ctx: OpContext,
    *,
    elem_shape: tuple[Any, ...],
    init_length: Any = 1,
    dynamic_length: bool = True,
    dtype: str = "fp32",
) -> List:
    """A list of ``init_length`` unwritten slots; a named dimension in ``elem_shape`` is known only when written."""
    length = int(init_length)
    ctx.reserve(length)
    flat = [d for part in elem_shape for d in ([part] if isinstance(part, str) else np.ravel(part).tolist())]
    shape = None if any(isinstance(d, str) for d in flat) else tuple(int(d) for d in flat)
    return List((None,) * length, dtype, shape, bool(dynamic_length))


@op("list_length", versions=("ios15",))
def list_length(ctx: OpContext, *, ls: List) -> np.ndarray:
    """Number of slots."""
    return np.array(len(ls.items), np.int32)


@op("list_read", versions=("ios15",))
def list_read(ctx: OpContext, *, ls: List, index: Any) -> np.ndarray:
    """The item at ``index``."""
    return ls.read(int(index))


@op("list_write", versions=("ios15",))
def list_write(ctx: OpContext, *, ls: List, index: Any, value: np.ndarray) -> List:
    """The list with ``value`` at ``index``."""
    ctx.reserve(int(index))
    return ls.write(int(index), value)


@op("list_gather", versions=("ios15",))
def list_gather(ctx: OpContext, *, ls: List, indices: np.ndarray) -> np.ndarray:
    """The items at ``indices``, stacked along a new first axis."""
    if not indices.size:
        return np.zeros((0, *(ls.shape or ())), ls.blank().dtype)
    return np.stack([ls.read(int(i)) for i in indices])


@op("list_scatter", versions=("ios15",))
def list_scatter(ctx: OpContext, *, ls: List, indices: np.ndarray, value: np.ndarray) -> List:
    """The list with ``value[k]`` at ``indices[k]``."""
    if len(indices) != len(value):
        raise ctx.fault(f"{len(indices)} indices for {len(value)} values")
    for index, item in zip(indices, value, strict=True):
        ctx.reserve(int(index))
        ls = ls.write(int(index), item)
    return ls
