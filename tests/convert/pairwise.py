"""Few rows in which every two values of different factors meet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Pair = tuple[tuple[str, int], tuple[str, int]]


def rows(factors: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Rows, one value per factor, that together hold every pair of values; the same rows every time.

    Greedy: a row starts from a pair that no row holds yet, and each further factor takes the value that completes
    most such pairs (Cohen et al., The AETG system, IEEE TSE 23(7), 1997, with one candidate).
    """
    waiting = dict.fromkeys(all_pairs(factors))
    while waiting:
        chosen = dict(next(iter(waiting)))
        for name, values in factors.items():
            if name not in chosen:
                gains = [sum(pair in waiting for pair in _with(chosen, name, i, factors)) for i in range(len(values))]
                chosen[name] = gains.index(max(gains))
        for pair in combinations([(name, chosen[name]) for name in factors], 2):
            waiting.pop(pair, None)
        yield {name: factors[name][i] for name, i in chosen.items()}


def all_pairs(factors: Mapping[str, Sequence[Any]]) -> Iterator[Pair]:
    """Every pair of values of different factors, values by their index."""
    for first, second in combinations(factors, 2):
        for i, j in product(range(len(factors[first])), range(len(factors[second]))):
            yield (first, i), (second, j)


def _with(chosen: Mapping[str, int], name: str, value: int, factors: Mapping[str, Sequence[Any]]) -> Iterator[Pair]:
    """The pairs that a value makes with those already chosen."""
    order = list(factors)
    for other, index in chosen.items():
        pair = ((other, index), (name, value))
        yield pair if order.index(other) < order.index(name) else (pair[1], pair[0])
