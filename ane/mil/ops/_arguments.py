"""Reading the small inputs of operations: integer vectors, masks, axes."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlxkd.errors import UserError


class Undocumented(UserError):
    """A use of an operation whose result Core ML does not define; better refused than guessed."""


def integers(values: Any) -> tuple[int, ...]:
    """A vector or scalar of integers as Python ints."""
    return tuple(int(v) for v in np.atleast_1d(values))


def flags(values: Any, rank: int) -> tuple[bool, ...]:
    """A mask per axis; None means no axis."""
    if values is None:
        return (False,) * rank
    return tuple(bool(v) for v in np.atleast_1d(values))


def axes_of(axes: Any, rank: int) -> tuple[int, ...]:
    """Axes counted from the front; None means all of them."""
    if axes is None:
        return tuple(range(rank))
    return tuple(a % rank if rank else 0 for a in integers(axes))


def along(vector: Any, axis: int, rank: int) -> np.ndarray:
    """A vector shaped so that it broadcasts along ``axis`` of a tensor of ``rank``; scalars stay scalars."""
    vector = np.asarray(vector)
    if vector.ndim == 0 or vector.size == 1:
        return vector.reshape(())
    shape = [1] * rank
    shape[axis] = vector.size
    return vector.reshape(shape)
