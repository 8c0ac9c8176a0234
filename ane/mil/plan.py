"""Turn a function into steps over numbered registers: names resolved, operations found, lifetimes known.

Everything that can be wrong with a program is found here, before anything runs.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from ane.mil.ops import registry
from ane.mil.program import Binding, Block, FunctionSpec, Literal, Node
from ane.mil.types import StateType, ValueType
from mlxkd.errors import UserError

CONSTEXPR = "constexpr_"
STATE_OPERATIONS = ("read_state", "write_state", "coreml_update_state")


@dataclass(frozen=True, eq=False)
class Derived:
    """Output ``index`` of a ``constexpr_*`` operation: a constant worked out from other constants."""

    step: Step
    index: int
    type: ValueType
    key: Hashable


Constant = Literal | Derived
# A register number, or a constant.
Operand = int | Constant


@dataclass(eq=False)
class Step:
    """One operation ready to run.

    Args:
        arguments: input name -> operands; several for a variadic input.
        results: registers of the outputs, in order.
        frees: registers whose last use this is.
        inplace: register of the input the op may write into, when this is its last use.
        updates: register of the state that the in-place result is about to replace.
    """

    operation: registry.Operation
    name: str
    arguments: dict[str, tuple[Operand, ...]]
    results: tuple[int, ...]
    outputs: tuple[tuple[str, ValueType], ...]
    blocks: tuple[BlockPlan, ...]
    attributes: dict[str, Literal]
    frees: tuple[int, ...] = ()
    inplace: int | None = None
    updates: int | None = None

    def reads(self) -> Iterable[int]:
        """Registers read by the step itself and by its nested blocks."""
        for operands in self.arguments.values():
            yield from (o for o in operands if isinstance(o, int))
        for block in self.blocks:
            yield from block.outer


@dataclass(eq=False)
class BlockPlan:
    """Steps of a block; ``outputs`` may be constants; ``outer`` are the registers it reads from around it."""

    inputs: tuple[int, ...]
    outputs: tuple[Operand, ...]
    steps: list[Step]
    outer: frozenset[int] = frozenset()


@dataclass
class FunctionPlan:
    """A function ready to run: how many registers it needs and where inputs and outputs are."""

    spec: FunctionSpec
    body: BlockPlan
    registers: int
    output_types: tuple[ValueType, ...] = ()
    caches: frozenset[str] = frozenset()


@dataclass
class Compiler:
    """Compiles one function; ``names`` maps each visible name to its operand, innermost scope last."""

    spec: FunctionSpec
    registers: int = 0
    scopes: list[dict[str, Operand]] = field(default_factory=list)
    types: dict[str, ValueType] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def compile(self) -> FunctionPlan:
        """The plan; raises UserError naming every operation that cannot run."""
        spec = self.spec
        block = Block(spec.inputs, spec.block.outputs, spec.block.nodes)
        if spec.block.inputs:
            raise self._fault("the function's own block has inputs")
        body = self.block(block)
        if self.faults:
            listed = sorted(set(self.faults))
            raise self._fault("; ".join(listed[:20]), hint="see docs/mil-conformance.md for what is supported")
        _mark_updates(body)
        types = tuple(self.types[name] for name in spec.block.outputs)
        return FunctionPlan(spec, body, self.registers, types, _caches(body, spec))

    def _fault(self, what: str, hint: str | None = None) -> UserError:
        return UserError(what, where=f"function {self.spec.name!r}", hint=hint)

    def block(self, block: Block) -> BlockPlan:
        """Compile a block in a scope of its own."""
        scope: dict[str, Operand] = {}
        self.scopes.append(scope)
        first = self.registers
        inputs = tuple(self.define(name, declared) for name, declared in block.inputs)
        steps = [step for node in block.nodes for step in self.node(node)]
        outputs = tuple(self.find(name, "block output") for name in block.outputs)
        self.scopes.pop()
        _set_frees(steps, set(range(first, self.registers)), {o for o in outputs if isinstance(o, int)})
        read = {r for step in steps for r in step.reads()} | {o for o in outputs if isinstance(o, int)}
        return BlockPlan(inputs, outputs, steps, frozenset(r for r in read if r < first))

    def define(self, name: str, declared: ValueType, operand: Operand | None = None) -> int:
        """Give ``name`` a value in this scope: ``operand``, or a new register (whose number is returned)."""
        if name in self.scopes[-1]:
            raise self._fault(f"{name!r} is defined twice")
        self.types[name] = declared
        if operand is not None:
            self.scopes[-1][name] = operand
            return -1
        self.scopes[-1][name] = self.registers
        self.registers += 1
        return self.registers - 1

    def find(self, name: str, reader: str) -> Operand:
        """What ``name`` stands for, innermost scope first."""
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        raise self._fault(f"{reader} reads {name!r}, which nothing before it defines")

    def node(self, node: Node) -> list[Step]:
        """A step, or none for a constant."""
        if node.type == "const":
            self.constant(node)
            return []
        try:
            operation = registry.find(node.type, self.spec.opset)
        except UserError as error:
            self.faults.append(error.what)
            for name, declared in node.outputs:
                self.define(name, declared)
            return []
        folded = operation.name.startswith(CONSTEXPR)
        step = self.step(node, operation, folded)
        if not folded:
            return [step]
        key = (operation.name, operation.since, tuple((p, tuple(map(_key, o))) for p, o in step.arguments.items()))
        for index, (name, declared) in enumerate(node.outputs):
            self.define(name, declared, Derived(step, index, declared, (*key, str(declared), index)))
        return []

    def constant(self, node: Node) -> None:
        """Bind a ``const`` to its literal."""
        if len(node.outputs) != 1 or "val" not in node.attributes:
            raise self._fault(f"constant {node.name!r} has no value")
        name, declared = node.outputs[0]
        value = node.attributes["val"]
        if value.type != declared:
            raise self._fault(f"constant {name!r} is declared {declared} and holds {value.type}")
        self.define(name, declared, value)

    def step(self, node: Node, operation: registry.Operation, folded: bool) -> Step:
        """Bind a node's inputs and outputs."""
        arguments = {name: self.operands(bindings, node) for name, bindings in node.inputs.items()}
        if folded:
            # Before iOS18 the inputs of a constexpr are attributes.
            arguments |= {name: (value,) for name, value in node.attributes.items()}
        self.check(node, operation, arguments, folded)
        blocks = tuple(self.block(b) for b in node.blocks)
        results = () if folded else tuple(self.define(name, declared) for name, declared in node.outputs)
        return Step(operation, node.name, arguments, results, node.outputs, blocks, node.attributes)

    def operands(self, bindings: tuple[Binding, ...], node: Node) -> tuple[Operand, ...]:
        """Resolve what one input is bound to."""
        return tuple(self.find(b, f"{node.type} {node.name!r}") if isinstance(b, str) else b for b in bindings)

    def check(
        self, node: Node, operation: registry.Operation, arguments: dict[str, tuple[Operand, ...]], folded: bool
    ) -> None:
        """Note inputs that the operation does not have, misses, or must know before running."""
        label = f"operation {node.type!r} ({node.name!r})"
        for name in sorted(arguments.keys() - operation.inputs):
            self.faults.append(f"{label} has no input {name!r}")
        for name in sorted(operation.required - arguments.keys()):
            self.faults.append(f"{label} lacks its input {name!r}")
        for name, operands in arguments.items():
            if not operands and name not in operation.variadic:
                self.faults.append(f"{label}: input {name!r} is bound to nothing")
            if folded and any(isinstance(o, int) for o in operands):
                self.faults.append(f"{label}: input {name!r} is not a constant")
        if operation.name in ("cond", "while_loop") and len(node.blocks) != 2:
            self.faults.append(f"{label} has {len(node.blocks)} blocks instead of 2")


def _key(operand: Operand) -> Hashable:
    return operand if isinstance(operand, int) else operand.key


def _set_frees(steps: list[Step], own: set[int], kept: set[int]) -> None:
    """Mark, from the end, the last step that reads each of the block's ``own`` registers."""
    seen = set(kept)
    for step in reversed(steps):
        read = set(step.reads())
        unread = {r for r in step.results if r not in seen}
        step.frees = tuple((read & own) - seen | unread)
        seen |= read
        candidate = step.arguments.get(step.operation.inplace or "", ())
        if len(candidate) == 1 and candidate[0] in step.frees:
            step.inplace = candidate[0] if isinstance(candidate[0], int) else None


def _mark_updates(body: BlockPlan) -> None:
    """Find in-place steps whose result goes straight back to the state it was read from.

    Between such a step and the write nobody may read the state, so that it can give its array away.
    """
    source: dict[int, int] = {}
    for position, step in enumerate(body.steps):
        state = _state_of(step)
        if state is not None and step.operation.name == "read_state":
            source[step.results[0]] = state
        if step.inplace in source:
            follower = next((s for s in body.steps[position + 1 :] if _state_of(s) == source[step.inplace]), None)
            if follower and _written(follower) == step.results:
                step.updates = source[step.inplace]


def _state_of(step: Step) -> int | None:
    """Register of the state that a step reads or writes."""
    for name in ("input", "state") if step.operation.name in STATE_OPERATIONS else ():
        operands = step.arguments.get(name, ())
        if operands and isinstance(operands[0], int):
            return operands[0]
    return None


def _written(step: Step) -> tuple[Operand, ...]:
    return step.arguments.get("data") or step.arguments.get("value") or ()


def _caches(body: BlockPlan, spec: FunctionSpec) -> frozenset[str]:
    """States that are only ever filled in by ``slice_update`` before they are read: caches.

    Their unwritten slots may hold anything without changing a correct program's result.
    """
    names = {
        r: name for r, (name, declared) in zip(body.inputs, spec.inputs, strict=True) if isinstance(declared, StateType)
    }
    nested = {r for step in body.steps for block in step.blocks for r in block.outer}
    caches = set(names) - nested
    written: set[int] = set()
    for step in body.steps:
        state = _state_of(step)
        if state is None:
            continue
        if step.operation.name != "read_state":
            written.add(state)
        elif state not in written and not _only_updated(step.results[0], body):
            caches.discard(state)
    return frozenset(names[r] for r in caches & written)


def _only_updated(register: int, body: BlockPlan) -> bool:
    readers = [s for s in body.steps if register in s.reads()]
    return register not in body.outputs and all(
        s.operation.name == "slice_update" and s.arguments.get("x") == (register,) for s in readers
    )


def compile_function(spec: FunctionSpec) -> FunctionPlan:
    """Compile ``spec``; raises UserError naming every unknown operation, version, input and name."""
    return Compiler(spec).compile()


def unsupported(spec: FunctionSpec) -> tuple[str, ...]:
    """What keeps a function's operations from running, one sentence each."""
    found: set[str] = set()
    for node in spec.block.walk():
        if node.type != "const":
            try:
                registry.find(node.type, spec.opset)
            except UserError as error:
                found.add(error.what)
    return tuple(sorted(found))
