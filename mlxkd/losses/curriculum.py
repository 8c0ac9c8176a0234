"""DistiLLM-2's alpha per text: texts where the student is far from the teacher get the gentler, more skewed loss.

First-order approximation of the paper (2503.07067, section 3.3): alpha = 1 - (1 - alpha0) * anchor / gap, where
gap is the mean of p(token) - q(token) over the text and anchor its running mean over texts, clipped to
[0.01, alpha0]. The authors' release keeps alpha fixed (``update_alpha=False``); here it moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LOWEST = 0.01
EPSILON = 1e-5


@dataclass
class Curriculum:
    """The running anchor; part of a checkpoint.

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
