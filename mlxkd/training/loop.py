"""The training loop: batches in, updates out. It reads no files but its own checkpoints and draws no bars."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from mlxkd import quant
from mlxkd.data.batching import Batch, Batches
from mlxkd.errors import UserError
from mlxkd.losses.curriculum import Curriculum, gaps
from mlxkd.losses.forms import Targets
from mlxkd.losses.hidden import HiddenMatch, WithProjectors
from mlxkd.losses.latency.collect import LatencyInputs
from mlxkd.losses.step import Speakers, loss_and_gradients
from mlxkd.losses.term import Term
from mlxkd.quant.plan import DEFAULT_TARGET
from mlxkd.recipe import Recipe
from mlxkd.runtime import row_streams
from mlxkd.students.split import Split
from mlxkd.teachers.local import LocalTeacher
from mlxkd.training import state
from mlxkd.training.callbacks import Callback, Values
from mlxkd.training.feed import WrittenText, on_student
from mlxkd.training.quantised import QuantisedPhase
from mlxkd.training.schedule import adamw, cosine, grown, set_rate


class Teacher(Protocol):
    """Whoever can say something about a batch."""

    def targets(self, batch: Batch) -> Speakers:
        """What is known about its supervised positions."""
        ...


class Interrupted(Exception):
    """The person stopped the run; the checkpoint at ``folder`` continues it."""

    def __init__(self, folder: Path, step: int):
        self.folder, self.step = folder, step
        super().__init__(f"stopped after step {step}")


@dataclass
class Trainer:
    """One run of updates.

    Args:
        recipe: steps, rates, quantisation.
        student: trained in place; fp32 masters.
        batches: where step ``n`` finds its batches: data, or data and the student's own text.
        terms: the loss.
        teacher: asked for targets when a term needs them; None for plain cross-entropy.
        quantised: what happens in the quantised phase.
        folder: for the checkpoints "last" and "best".
        data: hash of the training examples.
        validate: called with the student; returns figures, "loss" among them.
        tokenizer: mlx-lm's wrapper; only the latency losses ask for it.
        match: hidden states to match, with projectors that train beside the student.
    """

    recipe: Recipe
    student: nn.Module
    batches: Batches | WrittenText
    terms: Sequence[Term]
    teacher: Teacher | None
    quantised: QuantisedPhase
    folder: Path
    data: str
    validate: Callable[[nn.Module], Values]
    callbacks: Sequence[Callback] = ()
    tokenizer: Any = None
    match: HiddenMatch | None = None
    curriculum: Curriculum | None = field(init=False)
    trained: nn.Module = field(init=False)
    position: state.Position = field(init=False)
    optimizer: optim.MultiOptimizer = field(init=False)

    def __post_init__(self) -> None:
        self.split = Split(self.student, streams=row_streams())
        self.latency = LatencyInputs(self.terms, self.split, self.tokenizer)
        contrastive = next((term for term in self.terms if term.name == "contrastive"), None)
        adaptive = contrastive is not None and contrastive.options.adaptive
        self.curriculum = Curriculum(contrastive.options.alpha) if contrastive and adaptive else None
        self.optimizer = adamw(self.recipe.optimizer)
        self.trained = WithProjectors(self.student, self.match.projectors) if self.match else self.student
        self.optimizer.init(self.trained.trainable_parameters())
        self.rate = cosine(self.recipe.optimizer, self.recipe.training.steps)
        self.position = state.Position(0, self.recipe.identity(), self.data)

    def resume(self) -> None:
        """Continue from the last checkpoint; the loss curve goes on as if nothing had happened."""
        found = state.peek(self.folder / "last")
        state.check_same(found, self.recipe.identity(), self.data, self.folder / "last")
        if self.quantised.applies(found.step - 1):
            self.quantised.resume(self.student, found.step)
        self.position = state.restore(self.folder / "last", self.trained, self.optimizer)
        self.quantised.remember(self.trained, found.step, self.optimizer.state)
        seen = state.load_extra(self.folder / "last", "probe")
        self.quantised.restore(found.interventions, found.rate_factor, seen)
        if isinstance(self.batches, WrittenText):
            self.batches.restore(state.load_extra(self.folder / "last", "text"))
        if self.curriculum:
            self.curriculum.restore(state.load_extra(self.folder / "last", "curriculum"))

    def run(self) -> None:
        """Train to the end.

        Raises:
            Interrupted: Ctrl-C; the state is saved.
            UserError: the loss is not finite.
        """
        training = self.recipe.training
        try:
            for step in range(self.position.step, training.steps):
                values = self.update(step)
                for callback in self.callbacks:
                    callback.on_step(step + 1, values)
                last = step + 1 == training.steps
                if last or (step + 1) % training.evaluate_every == 0:
                    self._validate(step + 1)
                if last or (step + 1) % training.save_every == 0:
                    self.save("last")
        except KeyboardInterrupt:
            self.save("last")
            raise Interrupted(self.folder / "last", self.position.step) from None

    def restore_best(self) -> None:
        """Put the weights of the lowest validation loss into the student.

        Raises:
            UserError: no validation that counts had a finite loss.
        """
        if self.position.best is None:
            raise UserError(
                "no validation of this run had a finite loss, so there are no best weights",
                where=self.recipe.name,
                hint="lower optimizer.learning_rate",
            )
        best = state.peek(self.folder / "best").step
        if self.quantised.applies(best - 1):
            self.quantised.enter(self.student, best - 1)  # codes that rested then are parameters of that phase
            quant.activate(self.student, DEFAULT_TARGET)
        state.restore(self.folder / "best", self.trained)

    def update(self, step: int) -> Values:
        """One update; returns its figures."""
        started = time.perf_counter()
        if self.quantised.applies(step):
            self._enter(step)
        gradients, sums, weight, places = self._accumulate(step)
        gradients = tree_map(lambda g: g / weight, gradients)
        gradients, norm = optim.clip_grad_norm(gradients, self.recipe.optimizer.clip)
        rate = self.rate(step) * self.position.rate_factor
        set_rate(self.optimizer, rate, self.recipe.quantisation.range_rate)
        self.optimizer.update(self.trained, gradients)
        self.quantised.settle(self.student)
        mx.eval(self.trained.parameters(), self.optimizer.state, norm)
        total = sums.pop("loss") / weight
        if not math.isfinite(total) or not math.isfinite(norm.item()):
            raise UserError(
                f"the loss is {total} at step {step + 1}",
                where=self.recipe.name,
                hint="lower optimizer.learning_rate; the last checkpoint is intact",
            )
        self.position = replace(self.position, step=step + 1, tokens=self.position.tokens + weight)
        return {
            "loss": total,
            **{f"loss/{name}": value / weight for name, value in sums.items()},
            "rate": rate,
            "norm": norm.item(),
            "quantised": bool(quant.attached(self.student)),
            "tokens": self.position.tokens,
            "tokens_per_s": places / (time.perf_counter() - started),
            "peak_bytes": mx.get_peak_memory(),
        }

    def _enter(self, step: int) -> None:
        """Put the student on its grids at the first step of the phase; from then on choose what each step trains."""
        if not quant.attached(self.student):
            self.quantised.start(self.student)
        if self.quantised.enter(self.student, step):
            parameters = self.trained.trainable_parameters()
            self.optimizer = grown(self.optimizer, self.recipe.optimizer, parameters)
            self.quantised.regrown(self.trained, step, self.optimizer.state)

    def _accumulate(self, step: int) -> tuple[Any, dict[str, float], float, int]:
        """Gradients, sums, weight and positions of all batches of a step.

        Dividing once at the end makes k batches equal to one big one.
        """
        k = self.recipe.training.accumulate
        terms = [*self.terms, *(self.quantised.terms if self.quantised.applies(step) else ())]
        gradients: Any = None
        sums: dict[str, float] = {}
        weight, places = 0.0, 0
        for number in range(step * k, (step + 1) * k):
            batch = self.batches.batch(number)
            targets, matched = self._ask(batch)
            if own := self.quantised.said(batch):
                targets = own | _by_name(targets)
            inputs = self.latency(batch, self.batches.examples)
            if isinstance(self.batches, WrittenText):
                inputs |= {"on_student": on_student(batch, self.batches.examples)}
            if self.curriculum:
                inputs |= {"contrastive_alpha": self._alphas(batch, _by_name(targets))}
            progress = step / self.recipe.training.steps
            found = loss_and_gradients(
                self.trained,
                self.split,
                batch,
                targets,
                terms,
                progress=progress,
                inputs=inputs,
                hidden_match=matched,
            )
            gradients = found.gradients if gradients is None else tree_map(mx.add, gradients, found.gradients)
            mx.eval(gradients)
            sums = {name: sums.get(name, 0.0) + float(np.asarray(value)) for name, value in found.sums.items()}
            weight += found.weight
            places += math.prod(batch.shape)
        return gradients, sums, weight, places

    def _ask(self, batch: Batch) -> tuple[Speakers, tuple[HiddenMatch, Sequence[mx.array]] | None]:
        """What the teacher says about a batch, and its hidden states where they are matched."""
        if self.teacher is None:
            return None, None
        if self.match is None:
            return self.teacher.targets(batch), None
        assert isinstance(self.teacher, LocalTeacher)  # the recipe refuses to match against a cache
        layers, at = [theirs for _, theirs in self.match.layers], self.match.where(batch)
        targets, states = self.teacher.targets_and_states(batch, layers, states_at=at)
        return targets, (self.match, states)

    def _alphas(self, batch: Batch, said: Mapping[str, Targets]) -> np.ndarray:
        """Alpha of the text of each supervised position; one more forward pass of the student."""
        assert self.curriculum is not None
        term = next(term for term in self.terms if term.name == "contrastive")
        rows, of_position = np.unique(batch.supervised // batch.shape[1], return_inverse=True)
        return self.curriculum.update(gaps(self.split, batch, said[term.teacher])[rows])[of_position]

    def _validate(self, step: int) -> None:
        on_grid = bool(quant.attached(self.student))
        values: Values = {}
        for target in self.quantised.targets if on_grid else [DEFAULT_TARGET]:
            if on_grid:
                quant.activate(self.student, target)
            suffix = "" if target == DEFAULT_TARGET else f"@{target}"
            values |= {f"{name}{suffix}": value for name, value in self.validate(self.student).items()}
        if on_grid:
            quant.activate(self.student, DEFAULT_TARGET)
            values |= self._judge(step)
        for callback in self.callbacks:
            callback.on_validation(step, values)
        # A float student's loss says nothing about the quantised one: only the phase that ships competes.
        if self.quantised.applies(step - 1) or not self.quantised.trains:
            self._compete(values)

    def _compete(self, values: Values) -> None:
        """Keep the weights as the best ones if their validation loss is the lowest so far."""
        loss = values["loss"]
        if values.get("rolled_back"):
            # That loss belongs to weights that are gone. Those that came back have competed, unless a resumed run
            # brought them along unvalidated.
            if self.position.best is not None:
                return
            loss = self.validate(self.student)["loss"]
        if math.isfinite(loss) and (self.position.best is None or loss < self.position.best):
            self.position = replace(self.position, best=loss)
            self.save("best")

    def _judge(self, step: int) -> Values:
        """Apply the stability limits; a rollback takes weights and moments of the last sound validation."""
        found = self.quantised.judge(self.student, self.trained, step, self.optimizer.state)
        if found is None:
            return {}
        seen, decision = found
        guard, rolled_back = self.quantised.guard, decision.action == "roll_back"
        assert guard is not None
        if rolled_back:
            self.optimizer.state = tree_map(lambda leaf: leaf, guard.good_state[2])
        self.position = replace(self.position, rate_factor=decision.rate_factor, interventions=guard.interventions)
        return {"stability": seen.to_json(), "reasons": list(decision.reasons), "rolled_back": rolled_back}

    def save(self, name: str) -> None:
        """Write the checkpoint of that name."""
        text = self.batches.state() if isinstance(self.batches, WrittenText) else {}
        anchor = self.curriculum.state() if self.curriculum else {}
        parts = {"text": text, "probe": self.quantised.state(), "curriculum": anchor}
        extra = {f"{part}.{key}": value for part, arrays in parts.items() for key, value in arrays.items()}
        state.save(self.folder / name, self.position, self.trained, self.optimizer, extra)


def _by_name(targets: Speakers) -> dict[str, Targets]:
    """Targets by teacher name."""
    if targets is None:
        return {}
    return dict(targets) if isinstance(targets, Mapping) else {"teacher": targets}
