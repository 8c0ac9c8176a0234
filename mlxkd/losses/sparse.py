"""Comparisons with a teacher of whom only a few ids per position are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from mlxkd.losses.distribution import LOG_ZERO, TINY, Distribution, softmax
from mlxkd.losses.forms import Divergence


class Known(NamedTuple):
    """ids [n, K] and the teacher's distribution over them, with the tail as a last bucket or without."""

    ids: mx.array
    teacher: Distribution


@dataclass(frozen=True)
class Bucket:
    """Top ids and everything else as one bucket: no teacher mass is lost, and none is invented.

    Arrays: ``ids`` int32 [n, K]; ``logprobs`` [n, K], log-probabilities at temperature 1 up to a constant per row;
    ``tail`` [n, T], log of the mass beyond the ids at each of ``temperatures``. A tail cannot be re-tempered, so
    each training temperature has its own; it fixes the log-sum-exp of that temperature.

    The ids of a row are distinct. Any divergence serves: it is taken between the two (K + 1)-vectors, and the
    bucket's gradient is shared among the ids in it in proportion to the student's probabilities.
    """

    temperatures: tuple[float, ...]

    def prepare(self, arrays: dict[str, mx.array], temperature: float) -> Known:
        tail = arrays["tail"][:, self.temperatures.index(temperature)].astype(mx.float32)[:, None]
        known = softmax(arrays["logprobs"], temperature)
        rest = mx.exp(tail)
        log = known.log + mx.log1p(-mx.minimum(rest, 1 - 1e-6))
        teacher = Distribution(
            mx.concatenate([log, mx.maximum(tail, LOG_ZERO)], axis=-1),
            mx.concatenate([known.p * (1 - rest), rest], axis=-1),
        )
        return Known(arrays["ids"].astype(mx.int32), teacher)

    def compare(self, divergence: Divergence, student: Distribution, teacher: Known) -> tuple[mx.array, mx.array]:
        ids, size = teacher.ids, teacher.ids.shape[-1]
        # The tail is summed from its members: 1 - sum(known) would lose all digits of a small tail.
        others = mx.put_along_axis(student.p, ids, mx.array(0.0), axis=-1)
        rest = mx.maximum(mx.sum(others, axis=-1, keepdims=True), TINY)
        q = mx.concatenate([mx.take_along_axis(student.p, ids, axis=-1), rest], axis=-1)
        log = mx.concatenate([mx.take_along_axis(student.log, ids, axis=-1), mx.log(rest)], axis=-1)
        values, slope = divergence(Distribution(log, q), teacher.teacher)
        shared = others * (slope[:, size:] / rest)
        return values, mx.put_along_axis(shared, ids, slope[:, :size], axis=-1)


@dataclass(frozen=True)
class Sampled:
    """Ids drawn from the teacher, weighted so that the gradient is unbiased (RS-KD, 2503.16870); forward KL only.

    Arrays: ``ids`` [n, K], repetitions allowed; ``logprobs`` [n, K], logarithms of importance weights. The value
    is sum w (log w - log q) over the draws.
    """

    losses: tuple[str, ...] = ("forward_kl",)

    def prepare(self, arrays: dict[str, mx.array], temperature: float) -> Known:
        return Known(arrays["ids"].astype(mx.int32), softmax(arrays["logprobs"]))

    def compare(self, divergence: Divergence, student: Distribution, teacher: Known) -> tuple[mx.array, mx.array]:
        ids, draws = teacher
        values = mx.sum(draws.p * (draws.log - mx.take_along_axis(student.log, ids, axis=-1)), axis=-1)
        rows = mx.arange(ids.shape[0])[:, None]
        return values, student.p.at[rows, ids].subtract(draws.p)


@dataclass(frozen=True)
class Renormalised:
    """Both distributions renormalised over the known ids, as mlx-lm's DWQ does; blind to mass in the tail."""

    def prepare(self, arrays: dict[str, mx.array], temperature: float) -> Known:
        return Known(arrays["ids"].astype(mx.int32), softmax(arrays["logprobs"], temperature))

    def compare(self, divergence: Divergence, student: Distribution, teacher: Known) -> tuple[mx.array, mx.array]:
        values, slope = divergence(softmax(mx.take_along_axis(student.log, teacher.ids, axis=-1)), teacher.teacher)
        return values, mx.put_along_axis(mx.zeros_like(student.p), teacher.ids, slope, axis=-1)
