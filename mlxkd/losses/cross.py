"""Comparing distributions over different tokens of the same text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlxkd.losses.distribution import Distribution, softmax
from mlxkd.losses.forms import Divergence


def align(student_ends: np.ndarray, teacher_ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Group numbers of the tokens of one text under two tokenizers, by the borders that both have.

    Args:
        student_ends, teacher_ends: int [n], non-decreasing: where in the text each token ends (bytes or
            characters). Tokens that share an end (bytes of one character) stay together.

    Returns:
        Two int arrays; tokens with the same number cover the same stretch of text. Tokens behind the last common
        border get -1.
    """
    borders = np.intersect1d(student_ends, teacher_ends)
    groups = []
    for ends in (student_ends, teacher_ends):
        found = np.searchsorted(borders, ends, side="left")
        groups.append(np.where(found < len(borders), found, -1))
    return groups[0], groups[1]


class Merged(NamedTuple):
    """q [n, V]: the group's distribution at its last position (rows elsewhere are unused); scale [n, 1]: the
    probability of the group's earlier tokens."""

    q: mx.array
    scale: mx.array


@dataclass(frozen=True)
class Aligned:
    """The teacher's side of a chunk, and how the student's positions form groups within it.

    Args:
        p: [n, Vt] teacher's merged distribution at the last position of each group.
        last: int32 [n], the chunk's index of the last position of each position's group.
        labels: int32 [n], the student's tokens.
        pairs: int32 [2, M], ids (student, teacher) of tokens that both vocabularies have.
        ours_alone, theirs_alone: int32, ids without a partner.
    """

    p: mx.array
    last: mx.array
    labels: mx.array
    pairs: mx.array
    ours_alone: mx.array
    theirs_alone: mx.array

    @property
    def closes(self) -> mx.array:
        """bool [n]: whether the position is the last of its group."""
        return self.last == mx.arange(self.last.shape[0])

    def merge(self, student: Distribution) -> Merged:
        """The student's distribution of each group."""
        picked = mx.take_along_axis(student.log, self.labels[:, None], axis=-1)[:, 0]
        earlier = mx.zeros_like(picked).at[self.last].add(mx.where(self.closes, 0, picked))
        scale = mx.exp(earlier)[:, None]
        return Merged(student.p * scale, scale)

    def spread(
        self, student: Distribution, merged: Merged, values: mx.array, slope: mx.array
    ) -> tuple[mx.array, mx.array]:
        """From ``slope`` = dL/d(merged q) to the gradient with respect to every logit of the group."""
        closes = self.closes
        weighted = slope * merged.q
        total = mx.sum(weighted, axis=-1)
        at_last = mx.where(closes[:, None], weighted - student.p * total[:, None], 0)
        pull = mx.where(closes, 0, mx.where(closes, total, 0)[self.last])
        rows = mx.arange(self.labels.shape[0])
        earlier = (-student.p * pull[:, None]).at[rows, self.labels].add(pull)
        return mx.where(closes, values, 0), at_last + earlier


@dataclass(frozen=True)
class Cross:
    """The form of targets from a teacher with another tokenizer; it serves ``uld`` and ``gold`` only.

    Arrays: ``logits`` [n, Vt] of the teacher at the last token of each group, ``scale`` [n] the log-probability
    of the group's earlier teacher tokens, ``last`` and ``labels`` int32 [n]. The vocabularies' pairing is constant
    and lives here as tuples of ids, so that a compiled kernel may keep it.
    """

    pairs: tuple[tuple[int, int], ...]
    student_size: int
    losses: tuple[str, ...] = ("uld", "gold")

    def prepare(self, arrays: dict[str, mx.array], temperature: float) -> Aligned:
        p = softmax(arrays["logits"], temperature).p * mx.exp(arrays["scale"])[:, None]
        ours = [a for a, _ in self.pairs]
        theirs = [b for _, b in self.pairs]
        return Aligned(
            p,
            arrays["last"],
            arrays["labels"],
            mx.array(np.array([ours, theirs], dtype=np.int32).reshape(2, -1)),
            mx.array(np.setdiff1d(np.arange(self.student_size), ours).astype(np.int32)),
            mx.array(np.setdiff1d(np.arange(p.shape[-1]), theirs).astype(np.int32)),
        )

    def compare(self, divergence: Divergence, student: Distribution, teacher: Aligned) -> tuple[mx.array, mx.array]:
        return divergence(student, teacher)  # type: ignore[arg-type]


def ranked_difference(q: mx.array, p: mx.array) -> tuple[mx.array, mx.array]:
    """sum_i |q_(i) - p_(i)| over descending ranks, zero-padded, and its gradient with respect to ``q`` [n, V]."""
    order = mx.argsort(-q, axis=-1)
    ranked, other = mx.take_along_axis(q, order, axis=-1), -mx.sort(-p, axis=-1)
    width = max(q.shape[-1], p.shape[-1])
    gap = _padded(ranked, width) - _padded(other, width)
    slope = mx.put_along_axis(mx.zeros_like(q), order, mx.sign(gap[:, : q.shape[-1]]), axis=-1)
    return mx.sum(mx.abs(gap), axis=-1), slope


def _padded(x: mx.array, width: int) -> mx.array:
    return mx.pad(x, [(0, 0), (0, width - x.shape[-1])])
