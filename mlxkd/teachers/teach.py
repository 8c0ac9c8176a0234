"""Let a teacher speak once about all the data, and keep what it said."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxkd.data.batching import Batch
from mlxkd.data.example import Example
from mlxkd.errors import UserError
from mlxkd.losses.distribution import LOG_ZERO
from mlxkd.losses.head import chunk_rows
from mlxkd.teachers.local import LocalTeacher
from mlxkd.teachers.store import Manifest, Records, Store, key_of, largest_k
from mlxkd.teachers.targets import DenseTargets

LOWEST_HALF = -60000.0  # stands for log 0 in float16
TEXTS_PER_SHARD = 256


def teach(
    teacher: LocalTeacher,
    examples: Sequence[Example],
    out: Path,
    *,
    identity: str,
    tokenizer: str,
    temperatures: Sequence[float] = (1.0,),
    k: int | None = None,
    form: str = "bucket",
    positions_per_batch: int = 4096,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Store:
    """Store sparse targets for every supervised position; what is there already is not computed again.

    Args:
        teacher: the loaded teacher.
        examples: those that training will use (``Batches.examples``: cut and truncated as training cuts them).
        out: the store's folder.
        identity: ``identity.teacher_identity`` of the teacher's folder.
        tokenizer: ``identity.tokenizer_hash`` of its tokenizer.
        temperatures: those to train at.
        k: ids per position; the most that fit 98 bytes by default.
        form: "bucket" or "sampled".
        positions_per_batch: padded positions per teacher forward.
        seed: of the draws of "sampled".
        progress: called with (texts done, texts in all).

    Raises:
        UserError: a store of something else in ``out``, a temperature out of range, an interrupted disk.
    """
    temperatures = tuple(sorted(set(temperatures)))
    if not temperatures or temperatures[0] <= 0 or (form == "sampled" and len(temperatures) > 1):
        raise UserError(f"temperatures must be positive (one only for sampled), not {temperatures}", where="teach")
    k = k or largest_k(teacher.vocabulary, len(temperatures))
    store = Store.create(out, Manifest(identity, tokenizer, teacher.vocabulary, k, temperatures, form))
    missing = {key_of(e.tokens): e for e in examples if key_of(e.tokens) not in store}
    todo = sorted(missing.items(), key=lambda item: len(item[1]))
    key, texts, done = mx.random.key(seed), list[tuple[str, np.ndarray, Records]](), 0
    for group in _groups(todo, positions_per_batch):
        key, now = mx.random.split(key)
        texts += _spoken(teacher, group, store.manifest, now)
        if len(texts) >= TEXTS_PER_SHARD:
            store.append(texts)
            texts = []
        done += len(group)
        if progress:
            progress(done, len(todo))
    store.append(texts)
    return store


def _groups(todo: list[tuple[str, Example]], positions: int) -> Iterator[list[tuple[str, Example]]]:
    """Texts of similar length, as many as fit the padded positions."""
    group: list[tuple[str, Example]] = []
    for item in todo:
        if group and (len(group) + 1) * len(item[1]) > positions:
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def _spoken(
    teacher: LocalTeacher, group: list[tuple[str, Example]], manifest: Manifest, key: mx.array
) -> list[tuple[str, np.ndarray, Records]]:
    batch = _batch([example for _, example in group])
    targets = teacher.targets(batch)
    rows = chunk_rows(targets.count, targets.vocabulary)
    starts = range(0, targets.count, rows)
    keys = mx.random.split(key, len(starts))
    parts = [_chunk(targets, start, rows, manifest, keys[i]) for i, start in enumerate(starts)]
    ids, logprobs, tails = (np.concatenate([part[i] for part in parts]) for i in range(3))
    owner = batch.supervised // batch.shape[1]
    spoken = []
    for row, (name, example) in enumerate(group):
        mine = owner == row
        mask = batch.weights[row, : len(example) - 1] > 0
        spoken.append((name, mask, Records(ids[mine], logprobs[mine], tails[mine])))
    return spoken


def _batch(examples: list[Example]) -> Batch:
    shape = (len(examples), max(len(example) for example in examples) - 1)
    inputs, labels = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    weights = np.zeros(shape, np.float32)
    for row, example in enumerate(examples):
        n = len(example) - 1
        inputs[row, :n], labels[row, :n], weights[row, :n] = (
            example.tokens[:-1],
            example.tokens[1:],
            example.weights[1:],
        )
    return Batch(inputs, labels, weights, tuple(range(len(examples))), shape)


def _chunk(
    targets: DenseTargets, start: int, rows: int, manifest: Manifest, key: mx.array
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    logits = targets.chunk(start, min(start + rows, targets.count))["logits"].astype(mx.float32)
    if manifest.form == "sampled":
        temperature = manifest.temperatures[0]
        ids = mx.random.categorical(logits / temperature, num_samples=manifest.k, key=key)
        logprobs = mx.full(ids.shape, -math.log(manifest.k))
        tails = mx.full((ids.shape[0], 1), LOWEST_HALF)
    else:
        ids = mx.argpartition(-logits, manifest.k - 1, axis=-1)[:, : manifest.k]
        ids = mx.take_along_axis(ids, mx.argsort(-mx.take_along_axis(logits, ids, axis=-1), axis=-1), axis=-1)
        logprobs = mx.take_along_axis(logits, ids, axis=-1) - mx.logsumexp(logits, axis=-1, keepdims=True)
        tails = mx.stack([_tail(logits / t, ids) for t in manifest.temperatures], axis=-1)
    return np.array(ids), _half(logprobs), _half(tails)


def _half(x: mx.array) -> np.ndarray:
    return np.array(mx.maximum(x, LOWEST_HALF).astype(mx.float16))


def _tail(logits: mx.array, ids: mx.array) -> mx.array:
    """Log of the probability beyond ``ids``, summed from its members."""
    others = mx.put_along_axis(logits, ids, mx.array(LOG_ZERO), axis=-1)
    return mx.logsumexp(others, axis=-1) - mx.logsumexp(logits, axis=-1)
