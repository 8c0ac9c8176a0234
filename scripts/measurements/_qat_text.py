"""The rows that the quantisation-aware training measurements train on; the same for every method.

The stories are few, so the float model can write another end for a row; it gives the targets for any text.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxkd import compat

OFFSETS = 3  # windows start at that many offsets, so that no token always stands first
BEGINNING = 4  # a continued row keeps the first of that many parts
BATCH = 512  # rows that the float model writes at a time


def rows_at(stream: np.ndarray, starts: np.ndarray, width: int) -> np.ndarray:
    """Rows [..., width + 1] of a stream."""
    return stream[starts[..., None] + np.arange(width + 1)]


def order(count: int, steps: int, rows: int, seed: int) -> np.ndarray:
    """Which of ``count`` windows each step takes, int [steps, rows]: whole passes in a shuffled order."""
    draws, passes = np.random.default_rng(seed), -(-steps * rows // count)
    drawn = np.concatenate([draws.permutation(count) for _ in range(passes)])
    return drawn[: steps * rows].reshape(steps, rows)


def training_rows(
    stream: np.ndarray, teacher: nn.Module, *, steps: int, rows: int, width: int, seed: int, continued: float
) -> np.ndarray:
    """The rows of a run, int32 [steps, rows, width + 1].

    Args:
        stream: tokens of the text, int32 [n].
        teacher: the float model.
        steps, rows, width: updates, rows in each, tokens that a row gives to the model.
        seed: of the order and of what is written.
        continued: share of each step's rows that the float model continues from their beginning, each time anew.
    """
    starts = np.concatenate([np.arange(i * width // OFFSETS, len(stream) - width - 1, width) for i in range(OFFSETS)])
    found = rows_at(stream, starts[order(len(starts), steps, rows, seed)], width)
    count = round(continued * rows)
    if count:
        mx.random.seed(seed)
        chosen = found[:, rows - count :].reshape(-1, width + 1)
        parts = [chosen[i : i + BATCH] for i in range(0, len(chosen), BATCH)]
        written = np.concatenate([_continued(teacher, part[:, : width // BEGINNING], width + 1) for part in parts])
        found[:, rows - count :] = written.reshape(steps, count, width + 1)
    return found


def _continued(teacher: nn.Module, beginning: np.ndarray, length: int) -> np.ndarray:
    """Rows int32 [n, length] that begin so, the rest sampled from the float model (LLM-QAT, arXiv 2305.17888)."""
    cache = compat.new_cache(teacher)
    written = [mx.array(beginning)]
    for _ in range(length - beginning.shape[1]):
        written.append(mx.random.categorical(teacher(written[-1], cache=cache)[:, -1])[:, None].astype(mx.int32))
        mx.eval(written[-1])
    return np.array(mx.concatenate(written, axis=1))
