"""Layouts and numbers that run there, but slowly or wrongly."""

from __future__ import annotations

import numpy as np

from ane.residency.program import Op, const_literal
from ane.residency.rules.types import APPLE
from ane.residency.table import Scene, rule

GUIDE = "sbryngelson/ane-guide part 5"


@rule("R22", "SLOW", "high", f"{APPLE}:23-31", "put an axis of at least 32 values last", whole=True)
def last_axis(op: None, scene: Scene) -> str | None:
    """An input or output ends in an axis of one, which is padded 32-fold."""
    features = {**scene.function.inputs, **scene.function.results}
    narrow = [n for n, f in features.items() if f.kind == "array" and len(f.shape) == 4 and f.shape[-1] == 1]
    return f"{', '.join(narrow)}: the last axis of one is padded to 32" if narrow else None


@rule("R23", "SLOW", "medium", f"{APPLE}:45,92", "write it as a 1x1 convolution on (B, C, 1, S)")
def plain_linear(op: Op, scene: Scene) -> str | None:
    """A linear layer, or a product with a constant matrix, instead of a 1x1 convolution."""
    y = op.operand("y")
    product = op.type == "matmul" and y is not None and y.constant
    return "a product with constant weights that is not a convolution" if op.type == "linear" or product else None


@rule("R27", "BAD", "low", f"{APPLE}:357-372 uses -40000; others -10000", "mask with -10000 instead")
def infinite_mask(op: Op, scene: Scene) -> str | None:
    """A constant holds minus infinity, which turns into NaN after a subtraction."""
    for operand in op.operands:
        literal = operand.literal or const_literal(operand.producer)
        dtype = operand.tensor.dtype if operand.tensor else ""
        if literal is None or not dtype.startswith("fp") or literal.stored_bytes > 1 << 22:
            continue
        if bool(np.isneginf(np.asarray(literal.decode(), dtype=np.float32)).any()):
            return "a constant holds minus infinity"
    return None


@rule(
    "R28",
    "NOTE",
    "medium",
    f"{GUIDE}; swift-transformers issue 95",
    "check the largest activation of the layer in fp16",
)
def wide_sum(op: Op, scene: Scene) -> str | None:
    """A product over 5632 inputs or more loses about 3 % in fp16 and may pass 65504."""
    weight = op.operand("weight")
    shape = weight.tensor.shape if weight and weight.tensor else None
    terms = (shape[1] or 0) if shape and len(shape) > 1 and op.type in ("conv", "linear") else 0
    return f"fp16 sums over {terms} inputs lose about 3 %" if terms >= 5632 else None


@rule("R29", "NOTE", "medium", f"{GUIDE} (M1, M2)", "slice along channels instead of the width")
def offset_slice(op: Op, scene: Scene) -> str | None:
    """On M1 and M2, a slice of the last axis that does not start at 0 turns values beyond 4094 into infinity."""
    if op.type != "slice_by_index" or scene.chip.name not in ("m1", "m2", "a14", "a15"):
        return None
    begin, mask = op.value("begin"), op.value("begin_mask")
    x = op.operand("x")
    if begin is None or begin.size == 0 or x is None or x.tensor is None or begin.size != len(x.tensor.shape or ()):
        return None
    masked = mask is not None and mask.size == begin.size and bool(mask.reshape(-1)[-1])
    start = int(begin.reshape(-1)[-1])
    return f"it starts at {start} of the width: values beyond 4094 become infinite" if start and not masked else None
