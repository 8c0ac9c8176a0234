"""The loss of one chunk: from raw head outputs to summed terms and the gradient with respect to those outputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlxkd.losses.distribution import softmax
from mlxkd.losses.forms import Divergence, Form
from mlxkd.losses.term import Term


@dataclass(frozen=True)
class Plan:
    """All that is constant about a chunk: hashable, so that a compiled kernel can be kept for it.

    Args:
        terms: the summands.
        forms: (teacher name, form of its targets).
        scale, softcap: of the student's head; logits = cap * tanh(scale * raw / cap).
    """

    terms: tuple[Term, ...]
    forms: tuple[tuple[str, Form], ...]
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Chunk:
    """The data of n positions.

    Args:
        labels: int32 [n].
        weights: float32 [n].
        teachers: arrays of each teacher's targets, by its name; "weights" [n] scales the loss weights.
        live: moving scalars, by term key.
        inputs: further per-position arrays [n, ...] that terms ask for by name.
    """

    labels: mx.array
    weights: mx.array
    teachers: dict[str, dict[str, mx.array]]
    live: dict[str, dict[str, mx.array]]
    inputs: dict[str, mx.array] = field(default_factory=dict)


def chunk_loss(plan: Plan, raw: mx.array, chunk: Chunk) -> tuple[list[mx.array], mx.array]:
    """Weighted sums of each term (unscaled by the term's weight) and the gradient [n, V] of the total.

    Args:
        plan: what to compute.
        raw: [n, V] head products before scale and cap.
        chunk: the rest.
    """
    capped = raw.astype(mx.float32) * plan.scale if plan.scale != 1 else raw.astype(mx.float32)
    if plan.softcap is not None:
        capped = plan.softcap * mx.tanh(capped / plan.softcap)
    students = {t: softmax(capped, t) for t in {term.temperature for term in plan.terms}}
    forms, said = dict(plan.forms), dict[tuple[str, float], Any]()
    sums, gradient = [], mx.zeros(())
    for term in plan.terms:
        student, given = students[term.temperature], chunk.inputs | chunk.live.get(term.key, {})
        weights = chunk.weights
        if term.needs_teacher:
            at, form = (term.teacher, term.temperature), forms[term.teacher]
            if at not in said:
                said[at] = form.prepare(chunk.teachers[term.teacher], term.temperature)
            weights = weights * chunk.teachers[term.teacher].get("weights", mx.ones(()))
            values, slope = form.compare(_divergence(term, given), student, said[at])
        else:
            values, slope = term.module.loss(student, chunk.labels, term.options, given)
        sums.append(mx.sum(values * weights) * term.factor)
        gradient = gradient + slope * (weights * (term.weight * term.factor / term.temperature))[:, None]
    if plan.softcap is not None:
        gradient = gradient * (1 - mx.square(capped / plan.softcap))
    return sums, gradient * plan.scale if plan.scale != 1 else gradient


def _divergence(term: Term, given: dict[str, mx.array]) -> Divergence:
    return lambda student, teacher: term.module.loss(student, teacher, term.options, given)
