"""Mixed precision for a size budget: which layers suffer most from fewer bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxkd.errors import UserError
from mlxkd.quant.grids import FLOAT, grid
from mlxkd.quant.modules import master_shape
from mlxkd.quant.pack import clone
from mlxkd.quant.plan import Plan, activate, attach, attached, quantisable

CANDIDATES = ("mlx-affine2-g64", "mlx-affine3-g64", "mlx-affine4-g64", "mlx-affine6-g64", "mlx-affine8-g64")
FLOAT_BITS = 16

OnLayer = Callable[[int, int], None]  # layers measured and in all, counted once for each batch


@dataclass(frozen=True)
class Choice:
    """One layer on one grid: divergence from the float model in nats per token, and what it stores."""

    layer: str
    grid: str
    divergence: float
    bits_per_weight: float
    weights: int


@dataclass(frozen=True)
class Proposal:
    """A plan within the budget.

    Args:
        plan: layer -> grid, for `attach`.
        bits_per_weight: over the quantisable layers, float ones at 16 bits.
        divergence: sum of the chosen layers' own divergences, an estimate of the whole model's.
        choices: everything that was measured.
    """

    plan: Plan
    bits_per_weight: float
    divergence: float
    choices: tuple[Choice, ...]

    def rules(self) -> list[tuple[str, str]]:
        """The plan as recipe rules."""
        return list(self.plan.items())


def sensitivities(
    model: nn.Module,
    batches: Sequence[mx.array],
    candidates: Sequence[str] = CANDIDATES,
    on_layer: OnLayer | None = None,
) -> tuple[Choice, ...]:
    """KL(float, model with one layer rounded), for each layer and each candidate that fits it.

    Args:
        model: a float model; a clone is measured.
        batches: int [batch, positions] tokens.
        on_layer: told after each layer of each batch; a batch runs once for each layer and candidate.

    Raises:
        ValueError: no batches.
    """
    twin, targets = clone(model), list(candidates)
    layers = quantisable(twin)
    for name in targets:
        plan = {path: name for path, m in layers.items() if grid(name).fault(master_shape(m)) is None}
        if plan:
            attach(twin, plan, target=name, execution="dense")
    activate(twin, None)
    twin.eval()
    measured = attached(twin)
    lost = {(path, name): 0.0 for path, module in measured.items() for name in module.qat.specs}
    for i, (tokens, share) in enumerate(
        _shares(batches)
    ):  # outermost, so that one batch's logits are held and not the whole text's
        reference = _logs(twin, tokens)
        for j, (path, module) in enumerate(measured.items(), start=1):
            for name in module.qat.specs:
                module.qat.active = name
                lost[path, name] += share * _divergence(reference, _logs(twin, tokens))
            module.qat.active = None
            if on_layer:
                on_layer(i * len(measured) + j, len(batches) * len(measured))
    shapes = {path: master_shape(module) for path, module in measured.items()}
    choices = [
        Choice(path, name, found, grid(name).bits_per_weight(shapes[path]), _size(measured[path]))
        for (path, name), found in lost.items()
    ]
    rest = [Choice(path, FLOAT, 0.0, FLOAT_BITS, _size(module)) for path, module in layers.items()]
    return (*choices, *rest)


def _size(module: nn.Module) -> int:
    size = 1
    for extent in master_shape(module):
        size *= extent
    return size


def _logs(model: Any, tokens: mx.array) -> mx.array:
    logs = nn.log_softmax(model(tokens).astype(mx.float32), axis=-1)
    mx.eval(logs)
    return logs


def divergence(model: nn.Module, other: nn.Module, batches: Sequence[mx.array]) -> float:
    """KL(model, other) in nats per token, the mean over all tokens of batches int [batch, positions].

    Raises:
        ValueError: no batches.
    """
    return sum(share * _divergence(_logs(model, tokens), _logs(other, tokens)) for tokens, share in _shares(batches))


def _shares(batches: Sequence[mx.array]) -> list[tuple[mx.array, float]]:
    """Batches with their shares of all tokens."""
    if not batches:
        raise ValueError("no batches to measure on")
    total = sum(tokens.size for tokens in batches)
    return [(tokens, tokens.size / total) for tokens in batches]


def _divergence(p: mx.array, q: mx.array) -> float:
    return float(mx.mean(mx.sum(mx.exp(p) * (p - q), axis=-1)))


def propose(
    model: nn.Module,
    batches: Sequence[mx.array],
    budget: float,
    candidates: Sequence[str] = CANDIDATES,
    on_layer: OnLayer | None = None,
) -> Proposal:
    """The plan of least estimated divergence within ``budget`` bits per weight.

    Raises:
        UserError: the smallest candidates already exceed the budget; said before anything is measured.
    """
    layers = quantisable(model).values()
    _afford(sum(_least(module, candidates) for module in layers), sum(map(_size, layers)), budget)
    return within_budget(sensitivities(model, batches, candidates, on_layer), budget)


def _least(module: nn.Module, candidates: Sequence[str]) -> float:
    """Bits of a layer on the smallest candidate that fits it."""
    shape = master_shape(module)
    fitting = [grid(name) for name in candidates if grid(name).fault(shape) is None]
    return _size(module) * min((g.bits_per_weight(shape) for g in fitting), default=FLOAT_BITS)


def _afford(spent: float, total: int, budget: float) -> None:
    if not _fits(spent, total, budget):
        raise UserError(
            f"a budget of {budget:g} bits per weight is below the smallest plan's {spent / total:.3g}",
            hint="raise the budget or allow grids of fewer bits or smaller groups",
        )


def _fits(spent: float, total: int, budget: float) -> bool:
    return spent <= budget * total * (1 + 1e-9)


def within_budget(choices: Sequence[Choice], budget: float) -> Proposal:
    """Spend bits where a bit saves most: start from the smallest grids, take the best step that still fits.

    Only steps on each layer's lower convex hull are considered, so a poor middle grid cannot block a good one.

    Raises:
        UserError: the smallest grids already exceed the budget.
    """
    ladders = {
        layer: _hull([c for c in choices if c.layer == layer]) for layer in dict.fromkeys(c.layer for c in choices)
    }
    level = dict.fromkeys(ladders, 0)
    total = sum(ladder[0].weights for ladder in ladders.values())
    spent = sum(ladder[0].bits_per_weight * ladder[0].weights for ladder in ladders.values())
    _afford(spent, total, budget)
    steps = sorted(
        ((a.divergence - b.divergence) / _cost(a, b), layer, i)
        for layer, ladder in ladders.items()
        for i, (a, b) in enumerate(pairwise(ladder), start=1)
    )
    for _, layer, i in reversed(steps):
        ladder = ladders[layer]
        cost = _cost(ladder[i - 1], ladder[i])
        if level[layer] == i - 1 and _fits(spent + cost, total, budget):
            level[layer], spent = i, spent + cost
    chosen = [ladders[layer][i] for layer, i in level.items()]
    return Proposal(
        {choice.layer: choice.grid for choice in chosen},
        spent / total,
        sum(choice.divergence for choice in chosen),
        tuple(choices),
    )


def _cost(a: Choice, b: Choice) -> float:
    return (b.bits_per_weight - a.bits_per_weight) * b.weights


def _hull(choices: list[Choice]) -> list[Choice]:
    """Choices of one layer by size, each step down in divergence, slopes falling."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.bits_per_weight, c.divergence)):
        if hull and choice.divergence >= hull[-1].divergence:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(a: Choice, b: Choice) -> float:
    return (a.divergence - b.divergence) / _cost(a, b)
