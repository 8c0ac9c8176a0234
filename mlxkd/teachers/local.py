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
        self,
        batch: Batch,
        layers: Sequence[int],
        positions: np.ndarray | None = None,
        states_at: np.ndarray | None = None,
    ) -> tuple[DenseTargets, list[mx.array]]:
        """Targets, and hidden states [N, Dt] of ``layers`` (-1: those that enter the head), from one forward pass.

        Both are taken at flat positions of the batch: targets at ``positions``, by default the supervised ones, states
        at ``states_at``, by default where the targets are.
        """
        positions = batch.supervised if positions is None else positions
        final, found = self.split.states(mx.array(batch.inputs), layers)
        hidden = _rows(final, positions)
        states = [_rows(x, positions if states_at is None else states_at) for x in found]
        mx.eval(hidden, states)
        return DenseTargets(hidden, self.split.head, self.vocabulary), states


def _rows(states: mx.array, positions: np.ndarray) -> mx.array:
    """[N, D] at flat ``positions`` of [B, S, D]."""
    return states.reshape(-1, states.shape[-1])[mx.array(positions)]
