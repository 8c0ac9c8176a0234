"""Extents of tensors, kernels and programs."""

from __future__ import annotations

from ane.residency.program import Op, cost, stored_bytes
from ane.residency.rules.types import STUDY
from ane.residency.table import Scene, rule

GUIDE = "sbryngelson/ane-guide"
LOOSE_OPS = ("reshape", "expand_dims", "squeeze")


@rule("R6", "FAIL", "high", f"{GUIDE} appendix a:45-48, part 1/04:201-242", "split the long axis")
def extent(op: Op, scene: Scene) -> str | None:
    """Width or height beyond the chip's limit, or any axis beyond 65536."""
    limit = scene.chip.max_width
    for tensor in op.tensors:
        dims = [d or 0 for d in tensor.shape or ()]
        if len(dims) >= 2 and max(dims[-2:]) > limit:
            return f"an axis of {max(dims[-2:])}; width and height end at {limit} on {scene.chip.name}"
        if max(dims, default=0) > 65536:
            return f"an axis of {max(dims)}; no axis is longer than 65536"
    return None


@rule("R7", "CPU", "medium", STUDY, "split the product along its inner axis")
def inner_extent(op: Op, scene: Scene) -> str | None:
    """A matrix product sums over more than 32768 terms."""
    if op.type not in ("matmul", "linear"):
        return None
    x = op.operand("x")
    shape = x.tensor.shape if x and x.tensor else None
    inner = (shape[-1] or 0) if shape else 0
    return f"it sums over {inner} terms; 32768 is the most" if inner > 32768 else None


@rule("R8", "CPU", "medium", f"{STUDY}; {GUIDE} gives 29 to 32 for its large format", "use a smaller kernel")
def kernel(op: Op, scene: Scene) -> str | None:
    """A convolution kernel is wider than 15, higher than 31, or square beyond 16."""
    weight = op.operand("weight")
    shape = weight.tensor.shape if weight and weight.tensor else None
    if not op.type.startswith("conv") or not shape or len(shape) != 4:
        return None
    high, wide = shape[-2] or 1, shape[-1] or 1
    large = wide > 15 or high > 31 or (wide == high and wide > 16)
    return f"a kernel of {high} x {wide}" if large else None


@rule("R21", "FAIL", "high", "CoreML-LLM DECODE_STATE_LAYOUTS.md:46-58; ANEMLL docs/convert.md:11-12",
      "export in more chunks: `mlxkd export --chunks N`", whole=True)  # fmt: skip
def chunk_bytes(op: None, scene: Scene) -> str | None:
    """The weights of one chunk exceed about 1 GB; the chunk silently leaves the Neural Engine."""
    gigabytes = scene.function.weight_bytes / 1e9
    return f"{gigabytes:.2f} GB of weights in one package; about 1 GB is safe" if gigabytes > 1.0 else None


@rule(
    "R24",
    "SLOW",
    "low",
    "ANEMLL and coreml-llm-cli against CoreML-LLM (they disagree)",
    "split the head: `mlxkd export --head-width 16384`",
)
def head_width(op: Op, scene: Scene) -> str | None:
    """A product has more than 16384 outputs on M3 or older."""
    weight = op.operand("weight")
    shape = weight.tensor.shape if weight and weight.tensor else None
    if op.type not in ("conv", "linear") or not shape or scene.chip.max_width > 16384:
        return None
    return f"{shape[0]} outputs; 16384 is the safe most on {scene.chip.name}" if (shape[0] or 0) > 16384 else None


@rule("R25", "CPU", "medium", f"{GUIDE}; {STUDY}", "return the logits and choose on the host")
def argmax_axis(op: Op, scene: Scene) -> str | None:
    """An argmax over more than 2048 values on the first generation."""
    x = op.operand("x")
    shape = x.tensor.shape if x and x.tensor else None
    if op.type not in ("reduce_argmax", "reduce_argmin") or not shape or scene.chip.order > 1:
        return None
    axis = op.value("axis")
    length = shape[int(axis) if axis is not None else -1] or 0
    return f"over {length} values; 2048 is the most on {scene.chip.name}" if length > 2048 else None


@rule("R26", "NOTE", "medium", f"{STUDY}: 440 of 482 placements explained; vx-lang/Vx issue 436",
      "nothing to mend: such a program is fast anywhere", whole=True)  # fmt: skip
def too_small(op: None, scene: Scene) -> str | None:
    """A program whose work is worth less than the launches (0.125 ms each) stays on the CPU as a whole."""
    work = sum(cost(o) for o in scene.function.ops) * 1e3
    return f"about {work:.3f} ms of work: less than two launches (0.25 ms)" if work < 0.25 else None


@rule("R31", "SLOW", "low", "silicon-ledger (one report)", "pad the layer by one row")
def round_weight(op: Op, scene: Scene) -> str | None:
    """On the M3, weights of an exact multiple of 1 MiB load at less than half the rate."""
    weight = op.operand("weight")
    size = stored_bytes(weight) if weight is not None and weight.constant else 0
    exact = size > 0 and size % (1 << 20) == 0 and scene.chip.name == "m3"
    return f"{size >> 20} MiB of weights exactly" if exact else None
