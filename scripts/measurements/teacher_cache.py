"""Size, fidelity and cost of the cached teacher.

Bytes per token and gradient cosine: the real 260K-parameter model as teacher over its own kind of text, a pruned
student (layers 0, 2, 4) while forward KL trains it; the cosine is between all gradients of forward KL from the cache
and from the dense teacher, worst of several batches. It needs the real inputs (MLXKD_TEST_DATA or ../shared/data).
Step ratio: cached forward KL over plain cross-entropy, same student (random weights, width 256, 4 layers,
vocabulary 8,192), same batches of 4 x 256, alternating, reading the cache from disk included.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

from mlxkd import compat, runtime
from mlxkd.data.batching import Batches
from mlxkd.data.example import Example
from mlxkd.losses.step import loss_and_gradients
from mlxkd.losses.term import Term
from mlxkd.metric import Metric, from_samples
from mlxkd.students import prune
from mlxkd.students.split import Split
from mlxkd.teachers.cached import CachedTeacher
from mlxkd.teachers.identity import teacher_identity, tokenizer_hash
from mlxkd.teachers.local import LocalTeacher
from mlxkd.teachers.teach import teach

SPEED = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 8192, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": True,
}  # fmt: skip


def inputs() -> Path:
    """Folder of the real inputs."""
    return Path(os.environ.get("MLXKD_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


def story_examples(tokenizer: object, length: int, share: tuple[float, float]) -> list[Example]:
    """Pieces of ``length`` tokens from a share (start, end) of the story text, every token supervised."""
    text = (inputs() / "tinystories" / "stories.txt").read_text()
    part = text[int(share[0] * len(text)) : int(share[1] * len(text))]
    tokens = np.array(tokenizer.encode(part), dtype=np.int32)  # type: ignore[attr-defined]
    pieces = [tokens[i : i + length + 1] for i in range(0, len(tokens) - length, length)]
    return [Example(p, np.r_[np.float32(0), np.ones(len(p) - 1, np.float32)], source="stories") for p in pieces]


def measure(quick: bool) -> dict[str, Metric]:
    """bytes_per_token, gradient_cosine, step_ratio."""
    with tempfile.TemporaryDirectory() as folder:
        return _fidelity(Path(folder) / "real", quick) | _speed(Path(folder) / "speed", quick)


def _fidelity(folder: Path, quick: bool) -> dict[str, Metric]:
    device, source = runtime.device_name(), inputs() / "stories260K"
    if not source.is_dir():
        missing = Metric(None, "bytes", "measured", device, note="the real inputs are absent: set MLXKD_TEST_DATA")
        return {"bytes_per_token": missing, "gradient_cosine": missing}
    model, tokenizer, config = compat.load(source)
    student, _ = prune.depth(model, config, [0, 2, 4])
    teacher, split = LocalTeacher(model), Split(student)
    batches = Batches(story_examples(tokenizer, 128, (0, 0.1 if quick else 0.4)), [(8, 128)])
    names = {"identity": teacher_identity(source), "tokenizer": tokenizer_hash(tokenizer)}
    store = teach(teacher, batches.examples, folder, **names)
    cached = CachedTeacher(folder, batches.examples)
    optimizer = optim.AdamW(1e-3)
    cosines = []
    for step in range(len(batches) if quick else 30):
        batch = batches.batch(step)
        dense = loss_and_gradients(student, split, batch, teacher.targets(batch), [Term("forward_kl")], 1024.0)
        sparse = loss_and_gradients(student, split, batch, cached.targets(batch), [Term("forward_kl")], 1024.0)
        cosines.append(_cosine(dense.gradients, sparse.gradients))
        optimizer.update(student, dense.gradients)
        mx.eval(student.parameters())
    per_token = store.bytes / store.positions
    note = f"{store.manifest.k} ids of {store.manifest.vocabulary}, headers and masks included; real 260K model"
    worst = Metric(min(cosines), "cosine", "measured", device, n=len(cosines), note="worst batch while KD trains")
    return {"bytes_per_token": Metric(per_token, "bytes", "measured", device, note=note), "gradient_cosine": worst}


def _cosine(a: object, b: object) -> float:
    x, y = (np.concatenate([np.array(v).ravel().astype(np.float64) for _, v in tree_flatten(t)]) for t in (a, b))
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def _speed(folder: Path, quick: bool) -> dict[str, Metric]:
    mx.random.seed(0)
    student, teacher = compat.build_model(SPEED), LocalTeacher(compat.build_model(SPEED))
    random = np.random.default_rng(0)
    examples = [
        Example(random.integers(0, 8192, 257).astype(np.int32), np.r_[np.float32(0), np.ones(256, np.float32)])
        for _ in range(16)
    ]
    batches = Batches(examples, [(4, 256)])
    teach(teacher, batches.examples, folder, identity="random", tokenizer="random")
    cached, split = CachedTeacher(folder, batches.examples), Split(student)
    sides = {"ce": [Term("cross_entropy")], "kd": [Term("forward_kl")]}
    times: dict[str, list[float]] = {"ce": [], "kd": []}
    spent: dict[str, list[float]] = {"ce": [], "kd": []}
    for step in range(4 if quick else 16):
        batch = batches.batch(step)
        for name, terms in sides.items():
            start, used = time.perf_counter(), time.process_time()
            targets = cached.targets(batch) if name == "kd" else None
            mx.eval(loss_and_gradients(student, split, batch, targets, terms, 1024.0).gradients)
            times[name].append(time.perf_counter() - start)
            spent[name].append(time.process_time() - used)
    device = runtime.device_name()
    ratio, by_processor = (
        [kd / ce for kd, ce in zip(found["kd"][1:], found["ce"][1:], strict=True)] for found in (times, spent)
    )
    note = (
        f"random 4-layer student, vocabulary 8192, 4x256; fastest {min(times['kd']):.3f} over {min(times['ce']):.3f} s"
    )
    return {
        "step_ratio": from_samples(ratio, "ratio", method="measured", device=device, note=note),
        "step_ratio_processor": from_samples(
            by_processor,
            "ratio",
            method="measured",
            device=device,
            note="processor time, which other load disturbs less",
        ),
    }
