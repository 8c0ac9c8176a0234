"""The public face: load a package, look at it, run its functions.

The conventions are those of ``coremltools.models.MLModel``: inputs and outputs are dictionaries by name, a state
comes from ``make_state`` and is handed to ``predict``.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ane.mil import reader
from ane.mil.constants import ConstantPool
from ane.mil.executor import Executor, Observer
from ane.mil.inputs import prepare
from ane.mil.limits import Limits
from ane.mil.ops.registry import Mode
from ane.mil.ops.states import Slot
from ane.mil.plan import FunctionPlan, compile_function, unsupported
from ane.mil.program import Feature, FunctionSpec, ModelSpec
from ane.mil.program import Literal as Constant
from ane.mil.trace import Profile, Trace
from ane.mil.types import FLOATS, HELD_AS, StateType, TensorType
from mlxkd.errors import UserError, unknown

Unwritten = Literal["auto", "zero", "sentinel"]
# Finite in fp16, far from any activation, yet small enough that a mask of -1e4 or below still hides it.
SENTINEL = 125.0


def load(path: str | Path, *, limits: Limits | None = None) -> Package:
    """Read a saved .mlpackage; nothing is decoded or run yet.

    Raises:
        UserError: what is wrong with the package, and where.
    """
    limits = limits or Limits()
    return Package(reader.read(path, limits), limits)


class State:
    """The states of a model between predictions: arrays by name, shared by all functions that declare them."""

    def __init__(self, slots: dict[str, Slot]):
        self.slots = slots

    def read_state(self, name: str) -> np.ndarray:
        """A copy of the state ``name`` in its declared dtype (as ``MLState.read_state``)."""
        slot = self._slot(name)
        return slot.array.astype(HELD_AS[slot.type.dtype])

    def write_state(self, name: str, value: np.ndarray) -> None:
        """Replace the state ``name``; raises UserError on another shape."""
        slot = self._slot(name)
        array = np.array(value, dtype=HELD_AS[slot.type.dtype])
        if not slot.type.accepts(array.shape):
            raise UserError(f"state {name!r} is {slot.type}, the value has shape {list(array.shape)}")
        slot.array = array.astype(_held(slot.type))

    def copy(self) -> State:
        """An independent copy, for trying a continuation."""
        return State({name: Slot(s.name, s.type, s.array.copy()) for name, s in self.slots.items()})

    def _slot(self, name: str) -> Slot:
        if name not in self.slots:
            raise unknown("state", name, self.slots)
        return self.slots[name]


class Function:
    """One function of a package."""

    def __init__(self, spec: FunctionSpec, pool: ConstantPool, limits: Limits):
        self.spec, self.limits = spec, limits
        self._pool = pool

    @property
    def name(self) -> str:
        """The function's name."""
        return self.spec.name

    @property
    def inputs(self) -> dict[str, Feature]:
        """Inputs by name."""
        return self.spec.features

    @property
    def outputs(self) -> dict[str, Feature]:
        """Outputs by name."""
        return self.spec.results

    @property
    def states(self) -> dict[str, TensorType]:
        """Type of each state by name."""
        return {name: t.wrapped for name, t in self.spec.inputs if isinstance(t, StateType)}

    @functools.cached_property
    def plan(self) -> FunctionPlan:
        """The compiled function; raises UserError naming everything that cannot run."""
        return compile_function(self.spec)

    @functools.cached_property
    def _executor(self) -> Executor:
        return Executor(self.plan, self._pool, self.limits)

    def unsupported(self) -> tuple[str, ...]:
        """What keeps this function from running, one sentence each; empty when it runs."""
        return unsupported(self.spec)

    def operations(self) -> Counter[str]:
        """How often each operation occurs, constants left out."""
        return Counter(node.type for node in self.spec.block.walk() if node.type != "const")

    def make_state(self, unwritten: Unwritten = "auto") -> State:
        """Fresh states.

        Core ML starts them at zero, which hides an attention mask that lets through slots never written. "auto"
        therefore starts caches (states that ``slice_update`` alone fills) at a sentinel of 125, which a correct
        program cannot see, and all others at zero; "zero" and "sentinel" treat all alike.
        """
        slots = {}
        for name, declared in self.states.items():
            poisoned = unwritten == "sentinel" or (unwritten == "auto" and name in self.plan.caches)
            shape = tuple(d or 0 for d in declared.shape or ())
            fill = SENTINEL if poisoned and declared.dtype != "bool" else 0
            slots[name] = Slot(name, declared, np.full(shape, fill, _held(declared)))
        return State(slots)

    def predict(
        self, inputs: Mapping[str, Any], state: State | None = None, *, mode: Mode = "exact", seed: int = 0
    ) -> dict[str, Any]:
        """Run the function.

        Args:
            inputs: arrays by input name (images: PIL images or arrays [1, C, H, W]); cast to the declared dtypes.
            state: from ``make_state`` of any function of this package; updated in place.
            mode: "exact" accumulates and carries floats in fp32; "fp16" rounds after every operation.
            seed: start of the random generator for ``random_*`` operations without a seed of their own.

        Returns:
            Outputs by name in their declared dtypes.

        Raises:
            UserError: an input is missing, unknown or of another shape; or an operation cannot run.
        """
        return self._run(inputs, state, mode, seed, None)

    def trace(
        self,
        inputs: Mapping[str, Any],
        state: State | None = None,
        *,
        mode: Mode = "exact",
        seed: int = 0,
        keep: bool = True,
    ) -> Trace:
        """As ``predict``, noting every intermediate: shape, dtype, range, NaN, Inf, fp16 overflow.

        ``keep`` also keeps the values themselves.
        """
        trace = Trace(keep)
        trace.outputs = self._run(inputs, state, mode, seed, trace.observe)
        return trace

    def profile(self, batches: Iterable[Mapping[str, Any]], state: State | None = None) -> dict[str, float]:
        """Seconds spent in each kind of operation over several predictions, longest first."""
        profile = Profile()
        for inputs in batches:
            profile.start()
            self._run(inputs, state, "exact", 0, profile.observe)
        return dict(sorted(profile.seconds.items(), key=lambda item: -item[1]))

    def _run(
        self, inputs: Mapping[str, Any], state: State | None, mode: Mode, seed: int, observe: Observer | None
    ) -> dict[str, Any]:
        values: dict[str, Any] = prepare(self.spec, inputs, self.limits)
        values |= self._slots(state)
        results = self._executor.run(values, mode=mode, seed=seed, observe=observe)
        return {
            name: _given(value, declared)
            for name, value, declared in zip(self.spec.block.outputs, results, self.plan.output_types, strict=True)
        }

    def _slots(self, state: State | None) -> dict[str, Slot]:
        if not self.states:
            return {}
        if state is None:
            raise UserError(
                f"function {self.name!r} has states: {', '.join(self.states)}", hint="pass state=function.make_state()"
            )
        for name, declared in self.states.items():
            if name not in state.slots or state.slots[name].type != declared:
                raise UserError(f"the state given has no {name!r} of type {declared}")
        return {name: state.slots[name] for name in self.states}


def _held(declared: TensorType) -> Any:
    return np.float32 if declared.dtype in FLOATS else HELD_AS[declared.dtype]


def _given(value: Any, declared: Any) -> Any:
    """An output as it leaves: an array of its own in the declared dtype."""
    if not isinstance(declared, TensorType) or declared.dtype == "string":
        return value
    with np.errstate(over="ignore"):
        return np.array(value, dtype=HELD_AS[declared.dtype])


class Package:
    """A package that was read: its functions, metadata and weights."""

    def __init__(self, spec: ModelSpec, limits: Limits):
        self.spec = spec
        pool = ConstantPool(limits)
        self.functions = {name: Function(f, pool, limits) for name, f in spec.functions.items()}

    @property
    def default(self) -> str:
        """Name of the function that runs when none is named."""
        return self.spec.default

    @property
    def metadata(self) -> dict[str, str]:
        """Author, licence, version, description and user-defined entries."""
        return self.spec.metadata

    def function(self, name: str | None = None) -> Function:
        """The function called ``name``, or the default one; raises UserError for an unknown name."""
        name = name or self.default
        if name not in self.functions:
            raise unknown("function", name, self.functions, where=self.spec.path)
        return self.functions[name]

    def predict(self, inputs: Mapping[str, Any], state: State | None = None, **options: Any) -> dict[str, Any]:
        """``function().predict``: run the default function."""
        return self.function().predict(inputs, state, **options)

    def make_state(self, unwritten: Unwritten = "auto") -> State:
        """``function().make_state``."""
        return self.function().make_state(unwritten)

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of distinct stored constants by storage type, largest first."""
        sizes: Counter[str] = Counter()
        for literal in self._constants().values():
            if isinstance(literal.type, TensorType):
                sizes[literal.type.dtype] += literal.stored_bytes
        return dict(sizes.most_common())

    def _constants(self) -> dict[Any, Constant]:
        found: dict[Any, Constant] = {}
        for function in self.spec.functions.values():
            for node in function.block.walk():
                bound = (b for bindings in node.inputs.values() for b in bindings if isinstance(b, Constant))
                found.update((c.key, c) for c in (*node.attributes.values(), *bound))
        return found
