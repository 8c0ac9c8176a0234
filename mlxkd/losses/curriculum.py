"""DistiLLM-2's alpha per text: texts where the student is far from the teacher get the gentler, more skewed loss.

First-order approximation of the paper (2503.07067, section 3.3): alpha = 1 - (1 - alpha0) * anchor / gap, where
gap is the mean of p(token) - q(token) over the text and anchor its running mean over texts, clipped to
[0.01, alpha0]. The authors' release keeps alpha fixed (``update_alpha=False``); here it moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxkd.data.batching import Batch
from mlxkd.losses.distribution import softmax
from mlxkd.losses.forms import Targets
from mlxkd.losses.head import chunk_rows
from mlxkd.students.split import Split

LOWEST = 0.01
EPSILON = 1e-5


@dataclass
class Curriculum:
    """The running anchor over texts; part of a checkpoint.

    Args:
        alpha0: largest alpha.
        momentum: of the running mean of gaps.
        anchor: the mean so far, or None before the first text.
    """

    alpha0: float = 0.1
    momentum: float = 0.9
    anchor: float | None = None

    def update(self, gaps: Sequence[float] | np.ndarray) -> np.ndarray:
        """Alphas (float32) of texts with these gaps; moves the anchor towards their mean first."""
        values = np.maximum(np.asarray(gaps, dtype=np.float64), 0.0)
        mean = float(values.mean())
        self.anchor = mean if self.anchor is None else self.momentum * self.anchor + (1 - self.momentum) * mean
        alphas = 1 - (1 - self.alpha0) * self.anchor / (values + EPSILON)
        return np.clip(alphas, LOWEST, self.alpha0).astype(np.float32)

    def state(self) -> dict[str, mx.array]:
        """The anchor's float64, as two words: what a checkpoint keeps."""
        return {} if self.anchor is None else {"anchor": mx.array(np.array([self.anchor]).view(np.uint32))}

    def restore(self, arrays: dict[str, mx.array]) -> None:
        """Take back what ``state`` gave."""
        self.anchor = float(np.array(arrays["anchor"]).view(np.float64)[0]) if "anchor" in arrays else None


def gaps(split: Split, batch: Batch, targets: Targets) -> np.ndarray:
    """float64 [B]: the mean of p(label) - q(label) over the supervised positions of each row; 0 in a row without any.

    Args:
        split: of the student as it is.
        batch: texts by row.
        targets: of a live teacher.
    """
    at, length = batch.supervised, batch.shape[1]
    states = split.hidden(mx.array(batch.inputs))
    hidden = states.reshape(-1, states.shape[-1])[mx.array(at)]
    labels, found = mx.array(batch.labels.reshape(-1)[at])[:, None], []
    rows = chunk_rows(len(at), targets.vocabulary)
    for start in range(0, len(at), rows):
        stop = min(start + rows, len(at))
        q = split.head(hidden[start:stop])[:, : targets.vocabulary]
        p, q = (softmax(z).p for z in (targets.chunk(start, stop)["logits"], q))
        here = labels[start:stop]
        found.append(np.array(mx.take_along_axis(p, here, axis=-1) - mx.take_along_axis(q, here, axis=-1))[:, 0])
    texts = at // length
    sums = np.bincount(texts, np.concatenate(found), batch.shape[0])
    return np.asarray(sums / np.maximum(np.bincount(texts, minlength=batch.shape[0]), 1))
