"""Run a compiled function.

Precision modes. In ``exact`` a float tensor is an fp32 array from beginning to end, whatever the program declares,
so every product accumulates in fp32 and nothing is rounded but weights, inputs, outputs and explicit casts. In
``fp16`` every result declared fp16 is rounded to fp16 after its operation, overflowing to infinity as a device does.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ane.mil.backend import products
from ane.mil.constants import ConstantPool
from ane.mil.limits import Limits
from ane.mil.ops.registry import Mode, OpContext
from ane.mil.ops.states import Slot
from ane.mil.plan import BlockPlan, Derived, FunctionPlan, Operand, Step
from ane.mil.types import FLOATS, HELD_AS, TensorType, ValueType
from mlxkd.errors import UserError

Observer = Callable[[Step, tuple[Any, ...]], None]
# What NumPy and MLX raise on operands that do not fit; anything else is a fault of ours and propagates.
OPERAND_ERRORS = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, MemoryError, RuntimeError)


class Executor:
    """Runs one function; keeps what does not change between predictions."""

    def __init__(self, plan: FunctionPlan, pool: ConstantPool, limits: Limits):
        self.plan, self.pool, self.limits = plan, pool, limits
        self.xp = products()
        self._bound: dict[Step, Bound] = {}

    def run(
        self, inputs: dict[str, Any], *, mode: Mode = "exact", seed: int = 0, observe: Observer | None = None
    ) -> tuple[Any, ...]:
        """Values of the outputs for checked inputs (arrays and state slots by name)."""
        call = Prediction(self, mode, np.random.default_rng(seed), observe)
        names = [name for name, _ in self.plan.spec.inputs]
        with np.errstate(all="ignore"):
            return call.block(self.plan.body, tuple(inputs[name] for name in names))

    def bound(self, step: Step) -> Bound:
        """The step with its constants in place, prepared at its first run."""
        found = self._bound.get(step)
        if found is None:
            found = self._bound[step] = Bound(step, self)
        return found

    def constant(self, operand: Operand) -> tuple[Any, bool]:
        """A constant's value, and whether it stays in memory."""
        assert not isinstance(operand, int)
        return self.pool.get(operand, self.evaluate)

    def evaluate(self, derived: Derived) -> tuple[Any, ...]:
        """Work out a ``constexpr_*`` operation."""
        step = derived.step
        arguments = {name: self.constant(operands[0])[0] for name, operands in step.arguments.items()}
        context = OpContext(step.name, tuple(t for _, t in step.outputs), self.xp, opset=self.plan.spec.opset)
        context.reserve = self.limits.check_elements
        with np.errstate(all="ignore"):
            return call(step, context, arguments)


class Bound:
    """A step's constants, decoded where they stay in memory, and the registers to fill in."""

    def __init__(self, step: Step, executor: Executor):
        variadic = step.operation.variadic
        self.fixed: dict[str, Any] = {}
        self.single: list[tuple[str, int]] = []
        self.mixed: list[tuple[str, tuple[Operand, ...], bool]] = []
        for name, operands in step.arguments.items():
            many = name in variadic or len(operands) > 1
            if not many and isinstance(operands[0], int):
                self.single.append((name, operands[0]))
                continue
            values = [executor.constant(o) for o in operands if not isinstance(o, int)]
            if len(values) == len(operands) and all(stays for _, stays in values):
                self.fixed[name] = tuple(v for v, _ in values) if many else values[0][0]
            else:
                self.mixed.append((name, operands, many))
        self.finish = tuple(_finisher(step, i, t) for i, (_, t) in enumerate(step.outputs))
        self.context = OpContext(
            step.name,
            tuple(t for _, t in step.outputs),
            executor.xp,
            attributes={name: literal.decode() for name, literal in step.attributes.items()},
            opset=executor.plan.spec.opset,
            reserve=executor.limits.check_elements,
            loop_steps=executor.limits.loop_steps,
        )


class Prediction:
    """One run: its registers, mode and random generator."""

    def __init__(self, executor: Executor, mode: Mode, rng: np.random.Generator, observe: Observer | None):
        self.executor, self.mode, self.rng, self.observe = executor, mode, rng, observe
        self.registers: list[Any] = [None] * executor.plan.registers
        seconds = executor.limits.seconds
        self.deadline = time.monotonic() + seconds if seconds is not None else None

    def block(self, block: BlockPlan, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """Run a block on positional values; returns its outputs."""
        if len(values) != len(block.inputs):
            raise UserError(f"a block with {len(block.inputs)} inputs is given {len(values)}")
        registers = self.registers
        for register, value in zip(block.inputs, values, strict=True):
            registers[register] = value
        for step in block.steps:
            self.step(step)
        return tuple(registers[o] if isinstance(o, int) else self.executor.constant(o)[0] for o in block.outputs)

    def step(self, step: Step) -> None:
        """Run one operation and free what nobody reads after it."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise UserError(f"the prediction took longer than {self.executor.limits.seconds} s", where=step.name)
        bound = self.executor.bound(step)
        registers = self.registers
        arguments = dict(bound.fixed)
        for name, register in bound.single:
            arguments[name] = registers[register]
        for name, operands, many in bound.mixed:
            values = tuple(registers[o] if isinstance(o, int) else self.executor.constant(o)[0] for o in operands)
            arguments[name] = values if many else values[0]
        context = bound.context
        context.mode, context.rng = self.mode, self.rng
        if step.blocks:
            context.run_block = lambda index, values: self.block(step.blocks[index], values)
        results = (
            self.call_inplace(step, context, arguments) if step.inplace is not None else call(step, context, arguments)
        )
        results = self.finish(bound, step, results)
        for register, value in zip(step.results, results, strict=True):
            registers[register] = value
        if self.observe is not None:
            self.observe(step, results)
        for register in step.frees:
            registers[register] = None

    def call_inplace(self, step: Step, context: OpContext, arguments: dict[str, Any]) -> tuple[Any, ...]:
        """Call with permission to overwrite one input, when this call holds the only references to it."""
        name = step.operation.inplace or ""
        array = arguments[name]
        slot = self.registers[step.updates] if step.updates is not None else None
        held = isinstance(slot, Slot) and slot.array is array
        # References: this variable, the arguments, the register, getrefcount's own, and the slot's. A view
        # anywhere else would be one more.
        alone = isinstance(array, np.ndarray) and sys.getrefcount(array) == 4 + held
        context.own = array if alone and array.base is None and array.flags.writeable else None
        try:
            return call(step, context, arguments)
        finally:
            context.own = None

    def finish(self, bound: Bound, step: Step, results: tuple[Any, ...]) -> tuple[Any, ...]:
        """Cast results to what is declared and check them."""
        if len(results) != len(bound.finish):
            raise UserError(
                f"{step.operation.name} returned {len(results)} values, the program declares {len(bound.finish)}",
                where=f"operation {step.name!r}",
            )
        rounding = self.mode == "fp16"
        return tuple(finish(value, rounding) for finish, value in zip(bound.finish, results, strict=True))


def call(step: Step, context: OpContext, arguments: dict[str, Any]) -> tuple[Any, ...]:
    """Call the operation; its complaints become a UserError that names it."""
    try:
        results = step.operation.call(context, **arguments)
    except OPERAND_ERRORS as error:
        what = f"{step.operation.name} cannot run: {type(error).__name__}: {error}"
        raise UserError(what, where=f"operation {step.name!r}") from error
    return results if isinstance(results, tuple) else (results,)


def _finisher(step: Step, index: int, declared: ValueType) -> Callable[[Any, bool], Any]:
    """A function that casts output ``index`` to its declared dtype and checks its shape."""
    if not isinstance(declared, TensorType) or declared.dtype == "string":
        return lambda value, rounding: value
    held: Any = np.float32 if declared.dtype in FLOATS else HELD_AS[declared.dtype]
    half = declared.dtype == "fp16"
    accepts = declared.accepts
    shape = declared.shape

    def finish(value: Any, rounding: bool) -> np.ndarray:
        array = np.asarray(value)
        if rounding and half:
            array = array.astype(np.float16)
        if array.dtype != held:
            array = array.astype(held)
        if array.shape != shape and not accepts(array.shape):
            raise UserError(
                f"{step.operation.name} returned shape {list(array.shape)} where {declared} is declared",
                where=f"operation {step.name!r} output {index}",
            )
        return array

    return finish
