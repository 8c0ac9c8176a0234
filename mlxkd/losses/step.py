"""One training step's loss and gradients: backbone, chunked head, and back, with one backbone forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxkd.data.batching import Batch
from mlxkd.errors import UserError
from mlxkd.losses.chunk import Chunk, Plan
from mlxkd.losses.cross import Cross
from mlxkd.losses.forms import Targets
from mlxkd.losses.head import CHUNK_BYTES, HeadGradients, chunk_rows, products, run
from mlxkd.losses.hidden import HiddenMatch
from mlxkd.losses.term import Term, checked
from mlxkd.students.split import Split

Speakers = Targets | Mapping[str, Targets] | None


class Step(NamedTuple):
    """What one batch gave.

    Args:
        sums: weighted sum of each term over the supervised positions, by ``Term.key``, and "loss", their sum
            under the terms' weights; float32 scalars, evaluated.
        gradients: like ``model.trainable_parameters()``; of "loss" divided by the normaliser. Lazy.
        weight: sum of the loss weights; divide sums by its total over all micro-batches and ranks.
    """

    sums: dict[str, mx.array]
    gradients: Any
    weight: float


def loss_and_gradients(
    model: nn.Module,
    split: Split,
    batch: Batch,
    targets: Speakers,
    terms: Sequence[Term],
    normaliser: float = 1.0,
    *,
    progress: float = 0.0,
    inputs: Mapping[str, np.ndarray] | None = None,
    hidden_match: tuple[HiddenMatch, Sequence[mx.array]] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Step:
    """Gradients of the SUM of the loss over the batch's supervised positions, divided by ``normaliser``.

    Args:
        model: the student; gradients are for its trainable parameters.
        split: of the same model.
        batch: labels are shifted already.
        targets: one teacher's targets for ``batch.supervised``, or several by name; None without a teacher.
        terms: the loss.
        normaliser: the global weight sum when it is known beforehand, else 1.
        progress: share of the training done, for losses that move with it.
        inputs: per-position arrays [N, ...] that terms name in their ``INPUTS``, for ``batch.supervised``.
        hidden_match: what hidden states to match, with the teacher's states [N, Dt] of each pair of layers at
            ``HiddenMatch.where`` (``LocalTeacher.targets_and_states``). ``model`` may be a module that holds student
            and projectors.
        chunk_bytes: memory that the vocabulary-wide arrays may take.

    Raises:
        UserError: no supervised position, targets that are absent or do not fit the batch.
    """
    work = _Work(split, batch, targets, checked(terms), progress, inputs or {}, chunk_bytes)
    found: list[HeadGradients] = []
    matched: list[mx.array] = []

    def surrogate(tokens: mx.array) -> mx.array:
        # Its gradient is the loss's: the head's share is computed chunk by chunk on untraced copies.
        states, extra = _student_states(split, tokens, hidden_match)
        hidden = work.gather(states)
        mx.eval(hidden)
        result = work.run(_untraced(hidden))
        assert result.hidden is not None
        found.append(result)
        total = mx.sum(hidden * (result.hidden / normaliser).astype(hidden.dtype))
        for variable, gradient in zip(work.head.variables(), result.variables, strict=True):
            total = total + mx.sum(variable * (gradient / normaliser).astype(variable.dtype))
        if hidden_match:
            match, theirs = hidden_match
            matched.append(match.loss(match.gather(extra, batch), theirs, match.weights(batch)))
            total = total + matched[0] * (match.weight / normaliser)
        return total

    _, gradients = nn.value_and_grad(model, surrogate)(mx.array(batch.inputs))
    sums = work.sums(found[0])
    if hidden_match:
        sums[hidden_match[0].key] = mx.stop_gradient(matched[0])
        sums["loss"] = sums["loss"] + sums[hidden_match[0].key] * hidden_match[0].weight
    return Step(sums, gradients, float(work.weights.sum()))


def _student_states(
    split: Split, tokens: mx.array, match: tuple[HiddenMatch, Sequence[mx.array]] | None
) -> tuple[mx.array, list[mx.array]]:
    if match is None:
        return split.hidden(tokens), []
    return split.states(tokens, [ours for ours, _ in match[0].layers])


def loss_values(
    split: Split,
    batch: Batch,
    targets: Speakers,
    terms: Sequence[Term],
    *,
    progress: float = 0.0,
    inputs: Mapping[str, np.ndarray] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[dict[str, mx.array], float]:
    """The sums and the count of ``loss_and_gradients`` without gradients, for validation."""
    work = _Work(split, batch, targets, checked(terms), progress, inputs or {}, chunk_bytes)
    hidden = work.gather(split.hidden(mx.array(batch.inputs)))
    mx.eval(hidden)
    return work.sums(work.run(hidden, gradients=False)), float(work.weights.sum())


class _Work:
    """One batch, checked and laid out for the chunked head."""

    def __init__(
        self,
        split: Split,
        batch: Batch,
        targets: Speakers,
        terms: tuple[Term, ...],
        progress: float,
        inputs: Mapping[str, np.ndarray],
        chunk_bytes: int,
    ):
        at = batch.supervised
        self.targets = speakers(targets, terms, len(at))
        self.vocabulary = _vocabulary(split.head.rows, self.targets)
        self.labels, self.weights = batch.labels.reshape(-1)[at], batch.weights.reshape(-1)[at]
        _check_labels(self.labels, self.vocabulary)
        _check_shift(batch, self.labels)
        self.index = mx.array(at)
        self.rows = chunk_rows(len(at), self.vocabulary, chunk_bytes)
        self.head = products(split.head, self.vocabulary)
        forms = tuple((name, said.form) for name, said in self.targets.items())
        self.plan = Plan(terms, forms, split.head.scale, split.head.softcap)
        live = {t.key: _live(t, progress) for t in terms if hasattr(t.module, "live")}
        extra = _inputs(inputs, terms, len(at))
        self.data = Chunk(mx.array(self.labels), mx.array(self.weights), {}, live, extra)

    def gather(self, states: mx.array) -> mx.array:
        return states.reshape(-1, states.shape[-1])[self.index]

    def run(self, hidden: mx.array, *, gradients: bool = True) -> HeadGradients:
        return run(self.plan, self.head, hidden, self.data, self.targets, self.rows, gradients=gradients)

    def sums(self, result: HeadGradients) -> dict[str, mx.array]:
        sums = {term.key: value for term, value in zip(self.plan.terms, result.sums, strict=True)}
        sums["loss"] = mx.sum(mx.stack([sums[t.key] * t.weight for t in self.plan.terms]))
        return sums


def _untraced(hidden: mx.array) -> mx.array:
    """A copy outside the trace: arrays made from a traced one would stay alive until the backward pass."""
    return mx.array(np.array(hidden.astype(mx.float32))).astype(hidden.dtype)


def _live(term: Term, progress: float) -> dict[str, mx.array]:
    return {name: mx.array(value) for name, value in term.module.live(term.options, progress).items()}


def _inputs(given: Mapping[str, np.ndarray], terms: tuple[Term, ...], count: int) -> dict[str, mx.array]:
    """The per-position inputs, complete and of the right length."""
    for term in terms:
        more = term.module.further_inputs(term.options) if hasattr(term.module, "further_inputs") else ()
        for name in (*getattr(term.module, "INPUTS", ()), *more):
            if name not in given:
                raise UserError(
                    f"the term {term.key!r} needs {name!r} for every position, and it is absent", where="loss"
                )
    for name, value in given.items():
        if len(value) != count:
            raise UserError(f"{name!r} covers {len(value)} positions, the batch supervises {count}", where="loss")
    return {name: mx.array(value) for name, value in given.items()}


def speakers(targets: Speakers, terms: Sequence[Term], count: int) -> dict[str, Targets]:
    """The targets that the terms read, by teacher name, checked against a batch of ``count`` supervised positions.

    Raises:
        UserError: targets that are absent, of another batch, or cannot serve a term or its temperature.
    """
    if count == 0:
        raise UserError("the batch has no supervised position: every loss weight is 0", where="batch")
    given = {} if targets is None else dict(targets) if isinstance(targets, Mapping) else {"teacher": targets}
    used: dict[str, Targets] = {}
    for term in terms:
        if not term.needs_teacher:
            continue
        if term.teacher not in given:
            raise UserError(f"the term {term.key!r} needs a teacher, and no targets were given", where="loss")
        said = used[term.teacher] = given[term.teacher]
        allowed = getattr(said.form, "losses", None)
        if allowed and term.name not in allowed:
            raise UserError(
                f"{term.name} cannot be taken against {type(said.form).__name__.lower()} targets",
                where="loss",
                hint=f"these targets serve {', '.join(allowed)} only",
            )
        if term.module.NEEDS == "aligned" and not isinstance(said.form, Cross):
            raise UserError(
                f"{term.name} compares different tokenizers, and this teacher shares the student's",
                where="loss",
                hint="use forward_kl or jsd",
            )
        if said.count != count:
            raise UserError(
                f"the teacher speaks about {said.count} positions, the batch supervises {count}",
                where=f"targets.{term.teacher}",
                hint="ask the teacher about the same batch",
            )
    for name, said in used.items():
        said.check(sorted({t.temperature for t in terms if t.needs_teacher and t.teacher == name}))
    return used


def _vocabulary(rows: int, targets: dict[str, Targets]) -> int:
    """Token ids that student and teachers share."""
    sizes = {said.vocabulary for said in targets.values() if not isinstance(said.form, Cross)}
    if len(sizes) > 1:
        raise UserError(f"teachers with different vocabularies: {sorted(sizes)}", where="targets")
    vocabulary = sizes.pop() if sizes else rows
    if vocabulary > rows:
        raise UserError(
            f"vocabulary mismatch: the teacher has {vocabulary} token ids, the student {rows}",
            where="targets",
            hint="share a tokenizer, or use the uld or gold loss",
        )
    return vocabulary


def _check_labels(labels: np.ndarray, vocabulary: int) -> None:
    if labels.max(initial=0) >= vocabulary or labels.min(initial=0) < 0:
        bad = int(labels.max()) if labels.max() >= vocabulary else int(labels.min())
        raise UserError(f"label {bad} lies outside the shared vocabulary of {vocabulary} ids", where="batch")


ENOUGH = 8  # positions; fewer may repeat their own token by chance


def _check_shift(batch: Batch, labels: np.ndarray) -> None:
    """Labels that repeat the input of their own position teach copying, with a loss that falls beautifully."""
    at, inputs = batch.supervised, batch.inputs.reshape(-1)
    follows = np.roll(batch.inputs, -1, axis=1).reshape(-1)
    # A text of one token over and over repeats itself too, but then its labels are also what follows.
    if len(at) >= ENOUGH and np.array_equal(labels, inputs[at]) and np.mean(labels == follows[at]) < 0.5:
        raise UserError(
            "the labels are not shifted: each is the input of its own position",
            where="batch.labels",
            hint="labels[:, s] is the token after inputs[:, s]; `mlxkd.data.batching.build` shifts them",
        )
