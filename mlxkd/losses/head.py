"""The chunked head: the only place where [tokens, vocabulary] exists, one chunk at a time.

Each chunk is evaluated from the host before the next begins, which is what frees its memory; inside one
compiled graph the saving would be lost.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlxkd.losses.chunk import Chunk, Plan, chunk_loss
from mlxkd.losses.forms import Targets
from mlxkd.quant.modules import QATEmbedding, QATLinear, fake_weight, ranges_of, spec_of
from mlxkd.students.split import Head
from mlxkd.trees import leaves

CHUNK_BYTES = 256 * 2**20
CHUNK_ARRAYS = 8  # arrays of [rows, vocabulary] float32 that live at once within a chunk
CHUNK_ROWS = (16, 1024)  # fewer starve the matrix product, more leave the processor's caches


class Products(Protocol):
    """The head's forward product and its transposes, for one step."""

    def variables(self) -> list[mx.array]:
        """What gradients are kept for; empty when the head is frozen. Traced where the model is traced."""
        ...

    def project(self, hidden: mx.array) -> mx.array:
        """[n, D] to raw outputs [n, V]."""
        ...

    def back(self, hidden: mx.array, slope: mx.array) -> tuple[mx.array, list[mx.array]]:
        """Gradients to the hidden states and to each variable, from the gradient [n, V] to the raw outputs."""
        ...


def products(head: Head, vocabulary: int) -> Products:
    """The products of a head over its first ``vocabulary`` rows: plain matrices where possible."""
    found = spec_of(head.module)
    if found and found[1].kernel:
        return _Kernel(head.module, vocabulary)
    if type(head.module) in (nn.Linear, nn.Embedding, QATLinear, QATEmbedding):
        return _Matrix(head.module, vocabulary)
    return _Module(head, vocabulary)


class _Matrix:
    """A head that is one matrix and perhaps a bias; one trained on a grid is decoded once per step."""

    def __init__(self, module: nn.Module, vocabulary: int):
        self.module, self.vocabulary = module, vocabulary
        self.trained = bool(leaves(module.trainable_parameters()))  # the weight, or learned ranges of a frozen one
        self.weight, *rest = (p[:vocabulary] for p in self._parameters())
        self.bias = rest[0] if rest else None
        mx.eval(self.weight)

    def _parameters(self) -> list[mx.array]:
        return [fake_weight(self.module), *([self.module["bias"]] if "bias" in self.module else [])]

    def variables(self) -> list[mx.array]:
        return [p[: self.vocabulary] for p in self._parameters()] if self.trained else []

    def project(self, hidden: mx.array) -> mx.array:
        raw = hidden @ self.weight.T
        return raw if self.bias is None else raw + self.bias

    def back(self, hidden: mx.array, slope: mx.array) -> tuple[mx.array, list[mx.array]]:
        slope = slope.astype(hidden.dtype)
        down = self._down(slope)
        if not self.trained:
            return down, []
        bias = [] if self.bias is None else [slope.sum(axis=0)]
        return down, [slope.T @ hidden, *bias]

    def _down(self, slope: mx.array) -> mx.array:
        return slope @ self.weight


class _Kernel(_Matrix):
    """A head trained on a grid through its deployed kernel; quantised once per step."""

    def __init__(self, module: nn.Module, vocabulary: int):
        super().__init__(module, vocabulary)
        target, spec = spec_of(module) or ("", None)
        assert spec is not None
        self.grid, self.pad = spec.grid, int(module["weight"].shape[0]) - vocabulary
        self.codes = spec.grid.codes_for(module["weight"], ranges_of(module, target, spec), spec.dtype)
        mx.eval(self.codes)

    def project(self, hidden: mx.array) -> mx.array:
        raw = self._product(hidden, transpose=True)[:, : self.vocabulary]
        return raw if self.bias is None else raw + self.bias

    def _down(self, slope: mx.array) -> mx.array:
        return self._product(mx.pad(slope, [(0, 0), (0, self.pad)]), transpose=False)

    def _product(self, x: mx.array, *, transpose: bool) -> mx.array:
        product = self.grid.linear(x, self.codes, transpose=transpose)
        assert product is not None
        return product


class _Module:
    """Any other head (quantised, adapted, trained on a grid): its own forward and automatic differentiation."""

    def __init__(self, head: Head, vocabulary: int):
        self.head, self.vocabulary = head, vocabulary
        self.values = self.variables()

    def variables(self) -> list[mx.array]:
        return [value for _, value in leaves(self.head.module.trainable_parameters())]

    def project(self, hidden: mx.array) -> mx.array:
        return self._forward(hidden, *self.values)

    def back(self, hidden: mx.array, slope: mx.array) -> tuple[mx.array, list[mx.array]]:
        raw_type = hidden.dtype
        _, (down, *rest) = mx.vjp(self._forward, [hidden, *self.values], [slope.astype(raw_type)])
        return down, rest

    def _forward(self, hidden: mx.array, *values: mx.array) -> mx.array:
        with _bound(self.head.module, values):
            return self.head.raw(hidden)[:, : self.vocabulary].astype(hidden.dtype)


@contextlib.contextmanager
def _bound(module: nn.Module, values: tuple[mx.array, ...]) -> Iterator[None]:
    """Put other arrays in the place of the module's trainable parameters for the length of the block."""
    before = leaves(module.trainable_parameters())
    module.update(tree_unflatten([(name, value) for (name, _), value in zip(before, values, strict=True)]))
    try:
        yield
    finally:
        module.update(tree_unflatten(before))


@dataclass(frozen=True)
class HeadGradients:
    """Sums over all positions.

    Args:
        sums: each term's weighted sum, float32 scalars in the order of the plan.
        hidden: [N, D] gradient to the hidden states, or None when only values were asked for.
        variables: gradients of ``Products.variables``.
    """

    sums: list[mx.array]
    hidden: mx.array | None
    variables: list[mx.array]


def chunk_rows(count: int, vocabulary: int, budget: int = CHUNK_BYTES) -> int:
    """Positions per chunk under a budget in bytes."""
    low, high = CHUNK_ROWS
    return max(1, min(count, max(low, min(high, budget // (4 * vocabulary * CHUNK_ARRAYS)))))


def run(
    plan: Plan,
    head: Products,
    hidden: mx.array,
    data: Chunk,
    targets: dict[str, Targets],
    rows: int,
    *,
    gradients: bool = True,
) -> HeadGradients:
    """Loss and gradients of N positions, ``rows`` at a time.

    Args:
        plan: what to compute.
        head: the student's products.
        hidden: [N, D] untraced hidden states.
        data: labels and weights of all N positions, live scalars; ``teachers`` is filled from ``targets``.
        targets: by teacher name, those that the plan's forms name.
        rows: positions per chunk.
        gradients: False computes the values only.
    """
    sums = [mx.zeros(()) for _ in plan.terms]
    downs: list[mx.array] = []
    totals: list[mx.array] = []
    for start, stop in _cuts(hidden.shape[0], rows, targets):
        part = slice(start, stop)
        arrays = {name: said.chunk(start, stop) for name, said in targets.items()}
        inputs = {name: value[part] for name, value in data.inputs.items()}
        chunk = Chunk(data.labels[part], data.weights[part], arrays, data.live, inputs)
        values, slope = chunk_loss(plan, head.project(hidden[part]), chunk)
        sums = [total + value for total, value in zip(sums, values, strict=True)]
        if gradients:
            down, steps = head.back(hidden[part], slope)
            downs.append(down)
            steps = [step.astype(mx.float32) for step in steps]
            totals = [a + b for a, b in zip(totals, steps, strict=True)] if totals else steps
        mx.eval(sums, downs[-1:], totals)
    return HeadGradients(sums, mx.concatenate(downs) if gradients else None, totals)


def _cuts(count: int, rows: int, targets: dict[str, Targets]) -> Iterator[tuple[int, int]]:
    """Borders of the chunks; targets that join positions into groups say where a cut is allowed."""
    allowed = [borders for said in targets.values() if (borders := getattr(said, "borders", None)) is not None]
    start = 0
    while start < count:
        stop = min(start + rows, count)
        for borders in allowed:
            before = borders[(borders > start) & (borders <= stop)]
            stop = int(before[-1]) if before.size else int(borders[borders > start][0])
        yield start, stop
        start = stop
