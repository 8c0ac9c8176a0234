"""Ranks, dtypes and shapes."""

from __future__ import annotations

from ane.residency.program import Op
from ane.residency.table import Scene, rule

APPLE = "apple/coreai-models neural_engine_rules.md"
STUDY = "Apple-Neural-Engine-Microarchitecture-Study-M6 (M4, macOS 27)"
WHOLE_NUMBERS = ("int32", "int64", "uint32")
INDEX_TAKERS = ("gather", "gather_nd", "gather_along_axis", "slice_update", "slice_by_index", "slice_by_size")


@rule("R1", "FAIL", "high", f"{APPLE}:7; coremltools 9 refuses it for inputs", "reshape to rank 5 or less")
def rank(op: Op, scene: Scene) -> str | None:
    """A tensor has more than five axes."""
    most = max((len(t.shape or ()) for t in op.tensors), default=0)
    return f"a tensor of rank {most}" if most > 5 else None


@rule("R2", "CPU", "high", f"{APPLE}:8", "convert with compute_precision FLOAT16")
def single_precision(op: Op, scene: Scene) -> str | None:
    """It computes in fp32."""
    return "it computes in fp32" if any(t.dtype in ("fp32", "fp64") for t in op.tensors) else None


@rule(
    "R3", "CPU", "high", f"{STUDY}; ane-guide part 5", "keep whole numbers on the host; feed fp16 masks and positions"
)
def whole_numbers(op: Op, scene: Scene) -> str | None:
    """It computes with int32 (arithmetic, casts, argmax); indices of gathers and slices have their own rules."""
    if any(t.dtype in WHOLE_NUMBERS for t in op.results):
        return f"its result is {next(t.dtype for t in op.results if t.dtype in WHOLE_NUMBERS)}"
    moving = [o for o in op.operands if not o.constant and o.tensor and o.tensor.dtype in WHOLE_NUMBERS]
    return f"it takes {moving[0].tensor.dtype}" if moving and op.type not in INDEX_TAKERS else None  # type: ignore[union-attr]


@rule("R4", "CPU", "medium", f"{STUDY}; ANEMLL notes on MIL", "look the embedding up on the host and feed it as fp16")
def dynamic_gather(op: Op, scene: Scene) -> str | None:
    """It gathers with indices known only at run time (uint16 indices may stay)."""
    indices = op.operand("indices")
    if not op.type.startswith("gather") or indices is None or indices.constant or indices.tensor is None:
        return None
    return (
        None if indices.tensor.dtype == "uint16" else f"its {indices.tensor.dtype} indices are known only at run time"
    )


@rule("R5", "CPU", "high", f"{APPLE}:9; coremltools issues 835, 1764, 1909, 2370, 2600", "one function per fixed shape")
def open_shape(op: Op, scene: Scene) -> str | None:
    """A dimension is known only at run time (ranged inputs make such)."""
    open_ones = [t for t in op.tensors if t.shape is None or None in t.shape]
    return f"the shape {open_ones[0]} is known only at run time" if open_ones else None


@rule("R36", "SLOW", "medium", "coremltools issues 1764, 1909, 2022, 2370", "one function per shape", whole=True)
def enumerated_shapes(op: None, scene: Scene) -> str | None:
    """An input has several enumerated shapes; all but the default often leave the Neural Engine."""
    names = [name for name, feature in scene.function.inputs.items() if len(feature.shapes) > 1]
    return f"enumerated shapes of {', '.join(names)}: only the default one is likely to stay" if names else None
