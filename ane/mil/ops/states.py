"""States: tensors that outlive a prediction."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ane.mil.ops.registry import OpContext, op
from ane.mil.types import TensorType


@dataclass
class Slot:
    """One state's storage. ``array`` is replaced, never written into, except by an update that owns it alone."""

    name: str
    type: TensorType
    array: np.ndarray


@op("read_state", versions=("ios18",))
def read_state(ctx: OpContext, *, input: Slot) -> np.ndarray:
    """The state's present value."""
    return input.array


@op("write_state", versions=("ios18",))
def write_state(ctx: OpContext, *, input: Slot, data: np.ndarray) -> tuple[()]:
    """Replace the state's value."""
    _store(ctx, input, data)
    return ()


@op("coreml_update_state", versions=("ios18",))
def coreml_update_state(ctx: OpContext, *, state: Slot, value: np.ndarray) -> np.ndarray:
    """Replace the state's value and return it; saved packages spell it ``write_state`` and ``read_state``."""
    _store(ctx, state, value)
    return value


def _store(ctx: OpContext, slot: Slot, value: np.ndarray) -> None:
    if not slot.type.accepts(value.shape):
        raise ctx.fault(f"state {slot.name!r} is {slot.type}, the value written has shape {list(value.shape)}")
    slot.array = value
