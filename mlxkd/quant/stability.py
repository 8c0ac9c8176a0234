"""Is quantisation-aware training still sound? Figures on a fixed probe batch, and limits that act on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlxkd.errors import UserError, unknown
from mlxkd.quant.grids import grid
from mlxkd.quant.modules import master, ranges_of, spec_of
from mlxkd.quant.pack import Packed, pack
from mlxkd.quant.plan import attached
from mlxkd.quant.probe import Trace, cosine, relative_error, trace

Action = Literal["lower_rate", "roll_back", "stop"]
MEASURES = ("min_cosine", "max_relative_error", "max_entropy_change", "max_clipped", "flips_per_step", "non_finite")
SMALLER_IS_WORSE = ("min_cosine",)


@dataclass(frozen=True)
class Layer:
    """One transformer layer: cosine and relative error of its output, and its attention entropies in nats."""

    cosine: float
    relative_error: float
    entropy: float | None
    float_entropy: float | None


@dataclass(frozen=True)
class Stability:
    """One look at a student in training.

    Args:
        step: training step.
        layers: float against deployed, on the probe batch.
        clipped: quantised layer -> share of its weights beyond the ends of their grid.
        flips: quantised layer -> weights whose code changed since the last look, per step; None at the first.
        non_finite: parameters and probe logits that are NaN or infinite.
    """

    step: int
    layers: tuple[Layer, ...]
    clipped: dict[str, float]
    flips: dict[str, float] | None
    non_finite: int

    def figure(self, measure: str) -> float | None:
        """One of MEASURES as a number, worst layer; None where it was not taken."""
        changes = [
            abs(x.entropy - x.float_entropy)
            for x in self.layers
            if x.entropy is not None and x.float_entropy is not None
        ]
        found: dict[str, float | None] = {
            "min_cosine": _worst([layer.cosine for layer in self.layers], min),
            "max_relative_error": _worst([layer.relative_error for layer in self.layers], max),
            "max_entropy_change": _worst(changes, max) if changes else None,
            "max_clipped": _worst(list(self.clipped.values()), max),
            "flips_per_step": None if self.flips is None else sum(self.flips.values()),
            "non_finite": float(self.non_finite),
        }
        return found[measure]

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Stability:
        """What ``to_json`` gave."""
        return cls(**{**tree, "layers": tuple(Layer(**layer) for layer in tree["layers"])})

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "step": self.step,
            "layers": [vars(layer) for layer in self.layers],
            "clipped": self.clipped,
            "flips": self.flips,
            "non_finite": self.non_finite,
        }


def _worst(values: list[float], pick: Any) -> float | None:
    if any(math.isnan(v) for v in values):
        return math.nan  # min and max would pass over it
    return float(pick(values)) if values else None


class Probe:
    """Holds the float student's hidden states on fixed tokens, and looks at what becomes of them.

    Args:
        model: the float student before quantisation-aware training starts; or its trace, taken then.
        tokens: int [batch, positions], fixed for the run.
    """

    def __init__(self, model: nn.Module | Trace, tokens: mx.array):
        self.tokens = tokens
        self.reference: Trace = model if isinstance(model, Trace) else trace(model, tokens)
        self._codes: tuple[int, dict[str, mx.array]] | None = None

    def save(self, path: Path) -> None:
        """Keep the reference for a resumed run."""
        arrays = {f"hidden.{i}": value for i, value in enumerate(self.reference.hidden)}
        entropy = [math.nan if value is None else value for value in self.reference.entropy]
        mx.save_safetensors(str(path), arrays | {"entropy": mx.array(entropy), "logits": self.reference.logits})

    @classmethod
    def load(cls, path: Path, tokens: mx.array) -> Probe:
        """The probe that ``save`` kept.

        Raises:
            UserError: it is not there.
        """
        if not path.is_file():
            raise UserError("the float student's hidden states are gone", where=str(path), hint="run without --resume")
        kept: Any = mx.load(str(path))
        entropy = tuple(None if math.isnan(value) else float(value) for value in kept["entropy"].tolist())
        hidden = tuple(kept[f"hidden.{i}"] for i in range(len(entropy)))
        return cls(Trace(hidden, entropy, kept["logits"]), tokens)

    def state(self) -> dict[str, mx.array]:
        """The step of the last look and its codes by layer, for a checkpoint; empty before the first look."""
        if self._codes is None:
            return {}
        step, codes = self._codes
        return {"step": mx.array(step), **{f"codes.{path}": indices for path, indices in codes.items()}}

    def restore(self, arrays: dict[str, mx.array]) -> None:
        """Take back what ``state`` gave, so that the next look counts flips from the same codes."""
        codes = {key.removeprefix("codes."): value for key, value in arrays.items() if key.startswith("codes.")}
        self._codes = (int(arrays["step"]), codes) if codes else None

    def forget(self) -> None:
        """After a rollback: flips from codes that were rejected would say nothing."""
        self._codes = None

    def look(self, model: nn.Module, config: dict[str, Any], step: int, packed: Packed | None = None) -> Stability:
        """Compare the deployed form of ``model`` (packed here unless given) with the float reference."""
        packed = packed or pack(model, config)
        now = trace(packed.model, self.tokens)
        layers = tuple(
            Layer(cosine(a, b), relative_error(a, b), entropy, before)
            for a, b, entropy, before in zip(
                self.reference.hidden, now.hidden, now.entropy, self.reference.entropy, strict=True
            )
        )
        masters: Any = tree_flatten(model.trainable_parameters())
        broken = [mx.sum(~mx.isfinite(v)) for _, v in masters]
        broken.append(mx.sum(~mx.isfinite(now.logits)))
        return Stability(step, layers, clipped_shares(model), self._flips(packed, step), sum(int(b) for b in broken))

    def _flips(self, packed: Packed, step: int) -> dict[str, float] | None:
        codes = {path: grid(name).indices(packed.codes[path]) for path, name in packed.grids.items()}
        before, self._codes = self._codes, (step, codes)
        if before is None or set(before[1]) != set(codes):
            return None
        elapsed = max(1, step - before[0])
        return {path: int(mx.sum(codes[path] != before[1][path])) / elapsed for path in codes}


def clipped_shares(model: nn.Module) -> dict[str, float]:
    """Share of each layer's weights that lie beyond the ends of their grid (0 where ranges follow the weight)."""
    shares = {}
    for path, module in attached(model).items():
        found = spec_of(module)
        if found:
            name, spec = found
            ranges = ranges_of(module, name, spec)
            shares[path] = float(spec.grid.beyond(master(module), ranges, spec.dtype)) if ranges else 0.0
    return shares


@dataclass(frozen=True)
class Limit:
    """A threshold that acts: past ``value`` the run lowers its rate, rolls back, or stops."""

    measure: str
    value: float
    action: Action

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise unknown("stability measure", self.measure, MEASURES)
        if self.action not in get_args(Action):
            raise unknown("action", self.action, get_args(Action))

    def broken_by(self, figure: float) -> bool:
        """Whether the figure is past the limit; NaN always is."""
        past = figure < self.value if self.measure in SMALLER_IS_WORSE else figure > self.value
        return math.isnan(figure) or past


DEFAULT_LIMITS = (
    Limit("non_finite", 0, "roll_back"),
    Limit("min_cosine", 0.3, "roll_back"),
    Limit("max_clipped", 0.5, "lower_rate"),
)


@dataclass(frozen=True)
class Decision:
    """What to do after a look, and why, in words for the log; ``action`` None goes on."""

    action: Action | None
    rate_factor: float
    reasons: tuple[str, ...]


@dataclass
class Guard:
    """Applies limits, remembers the last good state, and gives up after too many interventions.

    Args:
        limits: thresholds.
        factor: how much an intervention lowers the learning rate, for good.
        patience: interventions before the run stops.
    """

    limits: Sequence[Limit] = DEFAULT_LIMITS
    factor: float = 0.5
    patience: int = 3
    rate_factor: float = 1.0
    interventions: int = 0
    _good: tuple[int, Any, Any] | None = None

    def check(self, seen: Stability, model: nn.Module, optimizer_state: Any = None) -> Decision:
        """Judge one look; carry out a rollback of the model in place. Restore the optimiser from `good_state`."""
        broken = []
        for limit in self.limits:
            figure = seen.figure(limit.measure)
            if figure is not None and limit.broken_by(figure):
                broken.append((limit, f"step {seen.step}: {limit.measure} {figure:.4g} is past {limit.value:g}"))
        if not broken:
            self.remember(seen.step, model, optimizer_state)
            return Decision(None, self.rate_factor, ())
        actions: list[Action] = ["lower_rate", "roll_back", "stop"]
        action = max((limit.action for limit, _ in broken), key=actions.index)
        self.interventions += 1
        if self.interventions > self.patience or (action == "roll_back" and self._good is None):
            action = "stop"
        reasons = tuple(f"{words}: {action.replace('_', ' ')}" for _, words in broken)
        if action != "stop":
            self.rate_factor *= self.factor
        if action == "roll_back" and self._good is not None:
            model.update(self._good[1])
            reasons += (f"weights and optimiser are those of step {self._good[0]} again",)
        return Decision(action, self.rate_factor, reasons)

    def remember(self, step: int, model: nn.Module, optimizer_state: Any) -> None:
        """Keep a sound state to roll back to: optimisers write their moments in place, so the containers are copied."""
        self._good = (step, model.parameters(), tree_map(lambda leaf: leaf, optimizer_state))

    @property
    def has_good_state(self) -> bool:
        """Whether there is a state to roll back to."""
        return self._good is not None

    @property
    def good_state(self) -> tuple[int, Any, Any]:
        """(step, parameters, optimiser state) of the last sound look.

        Raises:
            UserError: there has been none.
        """
        if self._good is None:
            raise UserError("quantisation-aware training was never stable", hint="lower the rate or widen the grid")
        return self._good
