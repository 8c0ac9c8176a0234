"""The quantised part of a run: which grids a step trains for, the float copy that may teach, the limits that act."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxkd import quant
from mlxkd.data.batching import Batch
from mlxkd.errors import UserError
from mlxkd.losses.forms import Targets
from mlxkd.losses.term import Term
from mlxkd.quant import phases
from mlxkd.quant.plan import DEFAULT_TARGET, Plan
from mlxkd.quant.stability import Decision, Guard, Limit, Probe, Stability
from mlxkd.recipe_sections import Quantisation
from mlxkd.runtime import row_streams
from mlxkd.teachers.local import LocalTeacher
from mlxkd.trees import leaves

SELF = "self"


@dataclass
class QuantisedPhase:
    """What happens from step ``begin`` on.

    Args:
        options: the recipe's.
        plans: target -> plan; the default target ships as the student, others beside it.
        steps: of the whole run.
        folder: for the float copy and the probe, which a resumed run needs.
        config: the float student's config.json.
        probe: int [B, S] tokens for the stability probe.
    """

    options: Quantisation
    plans: Mapping[str, Plan]
    steps: int
    folder: Path
    config: dict[str, Any]
    probe: mx.array
    guard: Guard | None = None
    _watch: Probe | None = None
    _copy: LocalTeacher | None = None
    _phase: phases.Phase | None = None
    _schedule: tuple[phases.Phase, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        wanted, others = self.options, [name for name in self.plans if name != DEFAULT_TARGET]
        targets = [*others, DEFAULT_TARGET] if wanted.order == "progressive" else [DEFAULT_TARGET]
        if self.plans and self.begin < self.steps:
            self._schedule = phases.phases(
                self.steps, share=wanted.fraction, targets=targets, ranges_first=wanted.ranges_first
            )
        if wanted.rounding == "annealed":
            for plan in self.plans.values():
                phases.check_annealing(plan)
        if wanted.stability and self.plans:
            limits = [Limit(x.measure, x.value, x.action) for x in wanted.stability.limits]
            self.guard = Guard(limits, wanted.stability.factor, wanted.stability.patience)

    @property
    def begin(self) -> int:
        """The first step that trains on a grid."""
        return self.steps - round(self.options.fraction * self.steps)

    @property
    def targets(self) -> list[str]:
        """Targets of which each ships a student; in a progressive run only the last grid."""
        return [DEFAULT_TARGET] if self.options.order == "progressive" else list(self.plans)

    def applies(self, step: int) -> bool:
        """Whether a step trains on a grid."""
        return self.trains and step >= self.begin

    @property
    def trains(self) -> bool:
        """Whether any step of the run trains on a grid."""
        return bool(self._schedule)

    def round_off(self, model: nn.Module) -> None:
        """Put a student that never trained on its grids there now, in place: its weights are rounded once."""
        if self.plans and not self.trains:
            self._attach(model)

    @property
    def terms(self) -> list[Term]:
        """What the float copy adds to the loss."""
        weight = self.options.self_teacher
        return [Term("forward_kl", weight, teacher=SELF)] if weight else []

    def start(self, model: nn.Module) -> None:
        """Keep what the float student is, then put it on its grids."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.guard:
            self._watch = Probe(model, self.probe)
            self._watch.save(self.folder / "probe.safetensors")
        if self.options.self_teacher:
            weights = dict(leaves(model.parameters()))
            mx.save_safetensors(str(self.folder / "float.safetensors"), weights)
            self._listen(quant.clone(model))
        self._attach(model)

    def resume(self, model: nn.Module, step: int) -> None:
        """The structure of a model that has done ``step`` steps; its arrays come from the checkpoint."""
        if self.guard:
            self._watch = Probe.load(self.folder / "probe.safetensors", self.probe)
        if self.options.self_teacher:
            copy = quant.clone(model)
            copy.load_weights(str(self.folder / "float.safetensors"))
            self._listen(copy)
        self._attach(model)
        self.enter(model, step - 1)

    def _listen(self, copy: nn.Module) -> None:
        self._copy = LocalTeacher(copy, streams=row_streams())

    def _attach(self, model: nn.Module) -> None:
        wanted = self.options
        for target, plan in self.plans.items():
            quant.attach(
                model,
                plan,
                target=target,
                learned_ranges=wanted.learned_ranges,
                fitted_ranges=wanted.fitted_ranges,
                tau=wanted.palette_temperature,
                activations=wanted.activations,
            )
        quant.activate(model, DEFAULT_TARGET)

    def enter(self, model: nn.Module, step: int) -> bool:
        """Choose what a step trains, in place; True where other parameters train than in the step before."""
        phase = phases.phase_at(self._schedule, step)
        changed = phase != self._phase
        if changed:
            phases.enter(model, phase)
            self._phase = phase
        quant.activate(model, phase.target)  # a validation in between has looked at others
        if len(self.targets) > 1:
            by = "layer" if self.options.order == "layer" else "step"
            phases.interleave(model, self.targets, step, by=by)  # type: ignore[arg-type]
        if self.options.rounding == "annealed":
            phases.anneal(model, mx.array(phases.sharpness_at(self._progress(phase, step))))
        return changed

    def _progress(self, phase: phases.Phase, step: int) -> float:
        """Share of a phase that is done before a step."""
        end = min((other.start for other in self._schedule if other.start > phase.start), default=self.steps)
        return (step - phase.start) / (end - phase.start)

    def settle(self, model: nn.Module) -> None:
        """Move differentiable palettes after an update."""
        if self.options.palette_temperature is not None:
            phases.settle(model)

    def said(self, batch: Batch) -> dict[str, Targets]:
        """What the float copy says about a batch; nothing where it does not teach."""
        return {SELF: self._copy.targets(batch)} if self._copy else {}

    def remember(self, trained: nn.Module, step: int, optimizer_state: Any) -> None:
        """A rollback from here on leads to this state, which is taken for sound."""
        if self.guard and self._watch:
            self.guard.remember(step, trained, optimizer_state)

    def regrown(self, trained: nn.Module, step: int, optimizer_state: Any) -> None:
        """A sound state of an earlier phase has other parameters: nothing can go back to it, only to this one."""
        if self.guard and self.guard.has_good_state:
            self.guard.remember(step, trained, optimizer_state)

    def state(self) -> dict[str, mx.array]:
        """What a checkpoint keeps of the stability probe."""
        return self._watch.state() if self._watch else {}

    def restore(self, interventions: int, rate_factor: float, arrays: dict[str, mx.array]) -> None:
        """Take back what the limits have done and what the probe has seen."""
        if self.guard and self._watch:
            self.guard.interventions, self.guard.rate_factor = interventions, rate_factor
            self._watch.restore(arrays)

    def judge(
        self, student: nn.Module, trained: nn.Module, step: int, optimizer_state: Any
    ) -> tuple[Stability, Decision] | None:
        """Look at the deployed student and apply the limits; None where the recipe sets none.

        Args:
            trained: the student, or the module that holds it and its projectors; a rollback restores all of it.

        Raises:
            UserError: the limits stop the run; says why.
        """
        if self._watch is None or self.guard is None:
            return None
        seen = self._watch.look(student, self.config, step)
        decision = self.guard.check(seen, trained, optimizer_state)
        if decision.action == "roll_back":
            self._watch.forget()
        if decision.action == "stop":
            raise UserError(
                f"quantised training is not stable: {'; '.join(decision.reasons)}",
                where="quantisation.stability",
                hint="lower optimizer.learning_rate, or loosen the limits",
            )
        return seen, decision
