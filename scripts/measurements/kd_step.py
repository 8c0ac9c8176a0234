"""One training step with a cached teacher against mlx-lm's own full fine-tune step.

Peer: mlx-lm's ``default_loss`` in the compiled step of its trainer, plain AdamW. Ours: targets read from the cache,
chunked forward KL, the same AdamW. Same random student (width 256, 4 layers, vocabulary 8,192), same batches of
4 x 256 with every position supervised, alternating in one process.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlxkd import compat, runtime
from mlxkd.data.batching import Batches
from mlxkd.data.example import Example
from mlxkd.losses.step import loss_and_gradients
from mlxkd.losses.term import Term
from mlxkd.metric import Metric, from_samples
from mlxkd.students.split import Split
from mlxkd.teachers.cached import CachedTeacher
from mlxkd.teachers.local import LocalTeacher
from mlxkd.teachers.teach import teach

CONFIG = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 8192, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": True,
}  # fmt: skip
SHAPE = (4, 256)


def measure(quick: bool) -> dict[str, Metric]:
    """ratio_over_mlx_lm, and both times."""
    mx.random.seed(0)
    random = np.random.default_rng(0)
    weights = np.r_[np.float32(0), np.ones(SHAPE[1], np.float32)]
    examples = [Example(random.integers(0, 8192, SHAPE[1] + 1).astype(np.int32), weights) for _ in range(16)]
    batches = Batches(examples, [SHAPE])
    times: dict[str, list[float]] = {"ours": [], "mlx_lm": []}
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "cache"
        teach(LocalTeacher(compat.build_model(CONFIG)), batches.examples, store, identity="random", tokenizer="random")
        ours = _ours(CachedTeacher(store, batches.examples), batches)
        peer = _peer(batches)
        for step in range(5 if quick else 17):
            for name, side in (("mlx_lm", peer), ("ours", ours)):
                start = time.perf_counter()
                side(step)
                times[name].append(time.perf_counter() - start)
    device = runtime.device_name()
    ratio = [a / b for a, b in zip(times["ours"][1:], times["mlx_lm"][1:], strict=True)]
    seconds = {
        f"seconds_{name}": from_samples(values[1:], "s", method="measured", device=device)
        for name, values in times.items()
    }
    return {"ratio_over_mlx_lm": from_samples(ratio, "ratio", method="measured", device=device), **seconds}


def _ours(cached: CachedTeacher, batches: Batches) -> Callable[[int], None]:
    student, optimizer = compat.build_model(CONFIG), optim.AdamW(1e-4)
    split, terms = Split(student), [Term("forward_kl")]

    def step(number: int) -> None:
        batch = batches.batch(number)
        found = loss_and_gradients(student, split, batch, cached.targets(batch), terms, float(batch.weights.sum()))
        optimizer.update(student, found.gradients)
        mx.eval(student.parameters(), optimizer.state)

    return step


def _peer(batches: Batches) -> Callable[[int], None]:
    with runtime.open_file_limit_kept():
        from mlx_lm.tuner.trainer import default_loss
    student, optimizer = compat.build_model(CONFIG), optim.AdamW(1e-4)
    student.train()
    state = [student.state, optimizer.state, mx.random.state]
    gradient = nn.value_and_grad(student, default_loss)

    @functools.partial(mx.compile, inputs=state, outputs=state)
    def update(tokens: mx.array, lengths: mx.array) -> mx.array:
        (loss, _), gradients = gradient(student, tokens, lengths)
        optimizer.update(student, gradients)
        return loss

    def step(number: int) -> None:
        batch = batches.batch(number)
        tokens = mx.array(np.concatenate([batch.inputs, batch.labels[:, -1:]], axis=1))
        mx.eval(update(tokens, mx.array([[0, SHAPE[1]]] * SHAPE[0])), state)

    return step
