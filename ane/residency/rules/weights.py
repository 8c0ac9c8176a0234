"""Formats of compressed weights."""

from __future__ import annotations

from ane.mil.program import Literal, Node
from ane.mil.types import TensorType
from ane.residency.program import Op, Operand, bare, const_literal, is_constexpr
from ane.residency.table import Scene, rule

SOURCES_17 = (
    "apple/coreai-models issue 279 (cosine 0.367 against 0.999 on the GPU); swift-chat issue 31; ExecuTorch readme "
    "('ANE requires channelwise'); ane-guide expects streaming from A15 on"
)


def _weight(op: Op) -> Operand | None:
    """The compressed operand of an operation, if it has one."""
    return next((o for o in op.operands if o.producer is not None and is_constexpr(o.producer)), None)


def _shape(made: Node, name: str) -> tuple[int, ...]:
    """Shape of a constant argument of a decompression."""
    for binding in made.inputs.get(name, ()):
        literal = binding if isinstance(binding, Literal) else None
        if literal is not None and isinstance(literal.type, TensorType):
            return tuple(d or 1 for d in literal.type.shape or ())
    stated = made.attributes.get(name)
    if stated is not None and isinstance(stated.type, TensorType):
        return tuple(d or 1 for d in stated.type.shape or ())
    return ()


def _joint(op: Op, operand: Operand) -> bool:
    """Whether the scales of the weight multiply a palette or a sparse tensor instead of plain integers."""
    made = operand.producer
    return made is not None and any(isinstance(b, str) for arguments in made.inputs.values() for b in arguments) and (
        const_literal(made) is None
    )  # fmt: skip


def _output_axis(op: Op, rank: int) -> int:
    """Axis of the weight that runs over the outputs."""
    if op.type != "matmul":
        return 0
    flip = op.value("transpose_y")
    return rank - 2 if flip is not None and bool(flip) else rank - 1


def _blocks_inside(op: Op, name: str, trailing: int) -> int:
    """Most scale or palette groups along an axis that is not the output axis; 1 when there are none."""
    operand = _weight(op)
    if operand is None or operand.producer is None:
        return 1
    shape = _shape(operand.producer, name)
    dims = shape[: len(shape) - trailing] if trailing else shape
    output = _output_axis(op, len(dims))
    return max((d for axis, d in enumerate(dims) if axis != output), default=1)


@rule("R17", "BAD", "high", SOURCES_17, "use a palette or int8 per channel: `mlxkd quantize --grid ane-lut4`")
def block_scales(op: Op, scene: Scene) -> str | None:
    """Weights carry several scales along their input axis (MLX's own format)."""
    operand = _weight(op)
    if operand is None or "blockwise_shift_scale" not in bare(operand.producer):  # type: ignore[arg-type]
        return None
    blocks = _blocks_inside(op, "scale", 0)
    return (
        f"{blocks} scales per output along the input axis: wrong numbers, or it does not load" if blocks > 1 else None
    )


@rule("R18", "NE", "high", "CoreML-LLM; ANEMLL; apple/coreai-models neural_engine_rules.md:245-253", "")
def streamed(op: Op, scene: Scene) -> str | None:
    """Palettes per tensor or per group of channels, and int8 per channel, are read compressed."""
    operand = _weight(op)
    if operand is None or operand.producer is None:
        return None
    palette = "lut_to_dense" in bare(operand.producer) and _blocks_inside(op, "lut", 2) == 1
    scaled = "affine" in bare(operand.producer) or "blockwise_shift_scale" in bare(operand.producer)
    channel = scaled and _blocks_inside(op, "scale", 0) == 1
    return "its weights are read compressed" if palette or channel else None


@rule("R19", "CPU", "low", "anemll-forge VECTOR_LUT_README (M6)", "use scalar palettes")
def vector_palette(op: Op, scene: Scene) -> str | None:
    """A vector palette beyond 16 values per entry or 256 values in all."""
    operand = _weight(op)
    shape = _shape(operand.producer, "lut") if operand and operand.producer else ()
    if operand is None or "lut_to_dense" not in bare(operand.producer) or not shape or shape[-1] == 1:  # type: ignore[arg-type]
        return None
    entries, length = shape[-2], shape[-1]
    large = length > 16 or entries * length > 256
    return f"a palette of {entries} entries of {length} values" if large else None


@rule(
    "R20",
    "NOTE",
    "medium",
    "ane-guide part 3",
    "4-bit palettes save bandwidth everywhere: `mlxkd quantize --grid ane-lut4`",
)
def folded_int8(op: Op, scene: Scene) -> str | None:
    """On the M1, int8 weights are unpacked at load time: smaller on disk, no faster."""
    operand = _weight(op)
    if operand is None or scene.chip.order > 1 or "lut" in bare(operand.producer):  # type: ignore[arg-type]
        return None
    return "int8 weights save no bandwidth on the first generation"


@rule("R35", "CPU", "low", "CoreML-LLM (residency 92.9 to 86.7 %)", "use a palette of fp16 values")
def joint_compression(op: Op, scene: Scene) -> str | None:
    """A palette of int8 values with scales on top, or sparse weights joined with either."""
    operand = _weight(op)
    if operand is None or operand.producer is None:
        return None
    joined = _joint(op, operand)
    return "two compressions on one weight" if joined else None


@rule("R38", "CPU", "low", "palettes are documented per tensor and per group of output channels only",
      "group palettes by output channel")  # fmt: skip
def block_palette(op: Op, scene: Scene) -> str | None:
    """Several palettes along the input axis."""
    operand = _weight(op)
    if operand is None or "lut_to_dense" not in bare(operand.producer):  # type: ignore[arg-type]
        return None
    blocks = _blocks_inside(op, "lut", 2)
    return f"{blocks} palettes along the input axis" if blocks > 1 else None
