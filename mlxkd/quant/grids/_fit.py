"""Affine ranges of small squared error: where learned scales and biases can start."""

from __future__ import annotations

import mlx.core as mx

SPANS = (1.0, 0.85, 0.7, 0.55, 0.4)  # starts: so much of the way between a group's extremes
ROUNDS = 12


def fit(groups: mx.array, scales: mx.array, biases: mx.array, top: int) -> tuple[mx.array, mx.array]:
    """Scales and biases float32 [...] of small squared error between scale * code + bias and the weights.

    Codes and ranges in turn, each the best for the other (Lloyd's algorithm, the codes evenly spaced), from several
    starts; no group ends worse than it came. A group of one value stays as it came.

    Args:
        groups: weights float32 [..., n].
        scales, biases: a first guess, float32 [...].
        top: the highest code.
    """
    middle = biases + scales * (top / 2)
    best = [_error(groups, scales, biases, top), scales, biases]
    for span in SPANS:
        s, b = scales * span, middle - scales * (span * top / 2)
        for _ in range(ROUNDS):
            s, b = _line(groups, _codes(groups, s, b, top), s, b)
        found = [_error(groups, s, b, top), s, b]
        better = found[0] < best[0]
        best = [mx.where(better, new, old) for new, old in zip(found, best, strict=True)]
        mx.eval(best)  # one start at a time in memory
    return best[1], best[2]


def _codes(groups: mx.array, scales: mx.array, biases: mx.array, top: int) -> mx.array:
    return mx.clip(mx.round((groups - biases[..., None]) / scales[..., None]), 0, top)


def _error(groups: mx.array, scales: mx.array, biases: mx.array, top: int) -> mx.array:
    decoded = _codes(groups, scales, biases, top) * scales[..., None] + biases[..., None]
    return mx.sum(mx.square(decoded - groups), axis=-1)


def _line(groups: mx.array, codes: mx.array, scales: mx.array, biases: mx.array) -> tuple[mx.array, mx.array]:
    """The line through (code, weight) of least squares; where all codes are one, the scale stays."""
    code, weight = mx.mean(codes, axis=-1, keepdims=True), mx.mean(groups, axis=-1, keepdims=True)
    spread = mx.sum(mx.square(codes - code), axis=-1)
    slope = mx.sum((codes - code) * (groups - weight), axis=-1) / mx.maximum(spread, 1e-12)
    usable = (spread > 0) & (slope != 0)
    slope = mx.where(usable, slope, scales)
    return slope, mx.where(usable, weight[..., 0] - slope * code[..., 0], biases)
