"""How well a model predicts held-out text, and how close it stays to its teacher."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxkd.data.batching import Batch
from mlxkd.metric import Metric
from mlxkd.runtime import row_streams
from mlxkd.students.split import Split

# Logits exist for this many positions at a time.
CHUNK = 512


def log_probabilities(split: Split, hidden: mx.array) -> mx.array:
    """Log-probabilities [N, V] float32 of hidden states [N, D]."""
    logits = split.head(hidden)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def supervised_hidden(split: Split, batch: Batch) -> mx.array:
    """Hidden states [N, D] at the positions whose label carries loss."""
    hidden = split.hidden(mx.array(batch.inputs))
    return hidden.reshape(-1, hidden.shape[-1])[mx.array(batch.supervised)]


def agreement(model: nn.Module, teacher: nn.Module | None, batches: Sequence[Batch], device: str) -> dict[str, Metric]:
    """Figures over the supervised positions of ``batches``.

    Args:
        model: float or packed; it runs on whatever kernels its layers have.
        teacher: compared with; None leaves KL and agreement out.

    Returns:
        ``nll`` (nats/token, weighted by the loss weights), and with a teacher ``kl`` (KL(teacher || model),
        nats/token) and ``top1`` (share of positions whose most likely token is the teacher's).
    """
    streams = row_streams()
    student = Split(model, streams=streams)
    reference = Split(teacher, streams=streams) if teacher is not None else None
    sums = np.zeros(4)  # weighted nll, weight, kl, same top token
    count = 0
    for batch in batches:
        labels = mx.array(batch.labels.reshape(-1)[batch.supervised])
        weights = mx.array(batch.weights.reshape(-1)[batch.supervised])
        own = supervised_hidden(student, batch)
        theirs = supervised_hidden(reference, batch) if reference else None
        for start in range(0, len(labels), CHUNK):
            part = slice(start, start + CHUNK)
            q = log_probabilities(student, own[part])
            nll = -mx.take_along_axis(q, labels[part, None], axis=-1)[:, 0]
            found = [(nll * weights[part]).sum(), weights[part].sum()]
            if reference and theirs is not None:
                p = log_probabilities(reference, theirs[part])
                # The vocabulary axis first: a full fp32 sum loses digits on the CPU backend.
                found += [(mx.exp(p) * (p - q)).sum(axis=-1).sum(), (p.argmax(-1) == q.argmax(-1)).sum()]
            sums[: len(found)] += [float(value) for value in found]
        count += len(labels)
    metrics = {"nll": Metric(sums[0] / sums[1], "nats/token", "measured", device, n=count)}
    if reference:
        metrics["kl"] = Metric(sums[2] / count, "nats/token", "measured", device, n=count)
        metrics["top1"] = Metric(sums[3] / count, "share", "measured", device, n=count)
    return metrics
