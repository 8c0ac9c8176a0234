"""A teacher in this process: any mlx-lm model, quantised or not."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxkd.data.batching import Batch
from mlxkd.students.split import Split
from mlxkd.teachers.targets import DenseTargets


class LocalTeacher:
    """A loaded model that answers with hidden states and its head.

    Args:
        model: loaded with ``mlxkd.compat.load_model`` (``lazy=True`` keeps weights on disk until first used).
            It is frozen and put in evaluation mode; it shares nothing with a student of the same family.
        vocabulary: token ids that both tokenizers share; None for every row of the head.
        streams: for the rows of a batch, see ``Split``.
    """

    def __init__(self, model: nn.Module, vocabulary: int | None = None, *, streams: Sequence[mx.Stream] | None = None):
        model.freeze()
        model.eval()
        self.split = Split(model, streams=streams)
        self.vocabulary = vocabulary or self.split.head.rows

    def targets(self, batch: Batch, positions: np.ndarray | None = None) -> DenseTargets:
        """What the teacher says at flat ``positions`` (int64 [N]) of the batch; its supervised ones by default."""
        return self.targets_and_states(batch, (), positions)[0]

    def targets_and_states(
        self, batch: Batch, layers: Sequence[int], positions: np.ndarray | None = None
    ) -> tuple[DenseTargets, list[mx.array]]:
        """Targets, and hidden states [N, Dt] of ``layers`` (-1: those that enter the head), from one forward pass."""
        at = mx.array(batch.supervised if positions is None else positions)
        final, found = self.split.states(mx.array(batch.inputs), layers)
        hidden, *states = [x.reshape(-1, x.shape[-1])[at] for x in (final, *found)]
        mx.eval(hidden, states)
        return DenseTargets(hidden, self.split.head, self.vocabulary), states
