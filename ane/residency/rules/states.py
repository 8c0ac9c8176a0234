"""Core ML states and the key-value cache in them."""

from __future__ import annotations

from ane.residency.program import Op, bare
from ane.residency.table import Scene, rule

LAYOUTS = "CoreML-LLM MLSTATE_PATTERN.md:17-30 (one source)"


@rule("R13", "FAIL", "high", "ANEMLL notes on MIL ('Cannot support standalone slice_update')",
      "write the slice to the state and attend to the state read after it")  # fmt: skip
def lone_update(op: Op, scene: Scene) -> str | None:
    """A slice_update whose result is used other than by writing it to a state."""
    if op.type != "slice_update":
        return None
    writers = ("write_state", "coreml_update_state")
    others = [bare(reader) for reader in op.readers if bare(reader) not in writers]
    if op.leaves or not op.readers:
        others.append("an output")
    return f"its result goes to {', '.join(sorted(set(others)))}, not only to a state" if others else None


@rule("R14", "FAIL", "high", LAYOUTS, "pack keys and values of all layers into one or two states", whole=True)
def many_states(op: None, scene: Scene) -> str | None:
    """Three or more states in one function."""
    count = len(scene.function.states)
    return f"{count} states; predict fails (0x1d) beyond two" if count >= 3 else None


@rule("R15", "CPU", "medium", "coremltools issue 2631", "pad the last axis of the state to a multiple of 32")
def state_extent(op: Op, scene: Scene) -> str | None:
    """It reads or writes a state whose last axis is not a multiple of 32."""
    if op.type not in ("read_state", "write_state", "coreml_update_state"):
        return None
    tensors = [o.tensor for o in op.operands if o.tensor] + list(op.results)
    odd = [t for t in tensors if t.shape and (t.shape[-1] or 0) % 32]
    return f"the state {odd[0]} does not end in a multiple of 32" if odd else None


@rule(
    "R16",
    "NOTE",
    "low",
    "Anemll issue 27 and coremltools issue 2553 against shipped 64-row builds",
    "write 32 rows a time",
)
def long_update(op: Op, scene: Scene) -> str | None:
    """A slice_update of more than 32 rows at once."""
    update = op.operand("update")
    shape = update.tensor.shape if update and update.tensor else None
    if op.type != "slice_update" or not shape or len(shape) < 2:
        return None
    rows = shape[-2] or 0
    return f"{rows} rows at once; some builds fail beyond 32" if rows > 32 else None


@rule("R32", "SLOW", "medium", "CoreML-LLM (context 2048 to 1024: 2.56 times faster)", "export a shorter context",
      whole=True)  # fmt: skip
def long_state(op: None, scene: Scene) -> str | None:
    """A state longer than 2048 positions: every step reads all of it."""
    longest = max((max(f.shape[-2:], default=0) for f in scene.function.states.values()), default=0)
    return f"a state of {longest} positions is read by every step" if longest > 2048 else None


@rule("R33", "NOTE", "medium", "anemll-forge (0.69 GB of weights: +1.05 to +2.09 GB)", "load only the functions in use",
      whole=True)  # fmt: skip
def many_functions(op: None, scene: Scene) -> str | None:
    """Each loaded function of a package wires its own copy of the weights."""
    count = scene.function.functions_in_package
    return f"{count} functions share this package; each loaded one wires its own copy" if count > 1 else None


@rule("R34", "NOTE", "medium", "coremltools issue 2716 (M5 Max)", "test a few hundred steps on the target machine",
      whole=True)  # fmt: skip
def palettes_and_states(op: None, scene: Scene) -> str | None:
    """Stateful programs with palettes crashed after 100 to 200 steps on an M5 Max."""
    from ane.residency.rules.weights import _weight

    stateful = bool(scene.function.states) and scene.chip.order >= 5
    palettes = any((w := _weight(o)) and w.producer and "lut" in bare(w.producer) for o in scene.function.ops)
    return "palettes with states crashed after 100 to 200 steps there" if stateful and palettes else None
