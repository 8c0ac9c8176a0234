"""Weighted k-means in one dimension, over the distinct float16 values of a tensor: exact counts, bounded work."""

from __future__ import annotations

import numpy as np

ITERATIONS = 60


def distinct_half_values(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted distinct float16 values of an array (float64) and how often each occurs: 63,488 at most."""
    found, counts = np.unique(values.astype(np.float16), return_counts=True)
    return found.astype(np.float64), counts.astype(np.float64)


def kmeans(values: np.ndarray, weights: np.ndarray, clusters: int) -> np.ndarray:
    """Sorted centroids float64 [clusters] of least weighted squared error, by Lloyd's algorithm.

    Args:
        values: distinct, ascending, float64 [n].
        weights: counts or importances, float64 [n].

    Runs from quantiles, from an even spread and from the two mixed, and keeps the best. With no more values
    than clusters every value is its own centroid and the last is repeated.
    """
    if len(values) <= clusters:
        return np.concatenate([values, np.full(clusters - len(values), values[-1])])
    mass, moment = np.cumsum(weights), np.cumsum(weights * values)
    quantiles = np.interp((np.arange(clusters) + 0.5) / clusters, mass / mass[-1], values)
    even = np.linspace(values[0], values[-1], clusters)
    runs = [_lloyd(values, mass, moment, start) for start in (quantiles, even, np.sort((quantiles + even) / 2))]
    return min(runs, key=lambda centroids: squared_error(values, weights, centroids))


def _lloyd(values: np.ndarray, mass: np.ndarray, moment: np.ndarray, start: np.ndarray) -> np.ndarray:
    centroids = start
    mass, moment = np.concatenate([[0.0], mass]), np.concatenate([[0.0], moment])
    for _ in range(ITERATIONS):
        # Sorted values make clusters intervals: their means are differences of prefix sums.
        cuts = np.searchsorted(values, (centroids[1:] + centroids[:-1]) / 2, side="right")
        edges = np.concatenate([[0], cuts, [len(values)]])
        counts = np.diff(mass[edges])
        moved = np.where(counts > 0, np.diff(moment[edges]) / np.maximum(counts, 1e-30), centroids)
        if np.array_equal(moved, centroids):
            break
        centroids = np.sort(moved)
    return centroids


def squared_error(values: np.ndarray, weights: np.ndarray, centroids: np.ndarray) -> float:
    """Weighted sum of squared distances to the nearest centroid."""
    cuts = np.searchsorted((centroids[1:] + centroids[:-1]) / 2, values, side="left")
    return float(np.sum(weights * (values - centroids[cuts]) ** 2))
