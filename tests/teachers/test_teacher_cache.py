"""The cached teacher: what it stores, that it resumes, and that it refuses to be mistaken for another."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from kd_toys import flat, toy

from mlxkd.data.batching import Batches
from mlxkd.data.example import Example
from mlxkd.errors import UserError
from mlxkd.losses.step import loss_and_gradients
from mlxkd.losses.term import Term
from mlxkd.students.split import Split
from mlxkd.teachers.cached import CachedTeacher
from mlxkd.teachers.local import LocalTeacher
from mlxkd.teachers.store import Manifest, Records, Store, largest_k, pack, unpack
from mlxkd.teachers.teach import teach

NAMES = {"identity": "teacher-a", "tokenizer": "tokens-a"}


def examples(count: int = 7, vocabulary: int = 37) -> list[Example]:
    random = np.random.default_rng(0)
    out = []
    for i in range(count):
        n = 6 + 2 * i
        weights = random.choice(np.float32([0, 1, 2]), n)
        weights[:2], weights[-1] = 0, 1
        out.append(Example(random.integers(0, vocabulary, n).astype(np.int32), weights))
    return out


@pytest.fixture
def teacher() -> LocalTeacher:
    return LocalTeacher(toy(2)[0])


def cosine(a, b) -> float:
    x, y = (np.concatenate([v.ravel() for v in flat(t).values()]) for t in (a, b))
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_cached_step_is_the_dense_step_when_all_ids_are_kept(teacher, tmp_path, temperature) -> None:
    """float16 log-probabilities are the only difference; batches are shuffled, the cache was not."""
    store = teach(teacher, examples(), tmp_path / "cache", k=36, temperatures=(1.0, temperature), **NAMES)
    batches = Batches(examples(), [(2, 12), (2, 24)], seed=5)
    cached = CachedTeacher(store.folder, batches.examples)
    student, _ = toy(1)
    split, terms = Split(student), [Term("forward_kl", 1.0, temperature)]
    for step in range(len(batches)):
        batch = batches.batch(step)
        dense = loss_and_gradients(student, split, batch, teacher.targets(batch), terms)
        sparse = loss_and_gradients(student, split, batch, cached.targets(batch), terms)
        assert sparse.sums["loss"].item() == pytest.approx(dense.sums["loss"].item(), rel=2e-3)
        assert cosine(sparse.gradients, dense.gradients) > 0.99999


def test_sampling_is_unbiased(teacher, tmp_path) -> None:
    """Many draws approach the dense gradient; the form is the store's, not the reader's."""
    data = examples(2)
    store = teach(teacher, data, tmp_path / "c", k=4000, form="sampled", **NAMES)
    student, _ = toy(1)
    batch = Batches(data, [(2, 12)]).batch(0)
    dense = loss_and_gradients(student, Split(student), batch, teacher.targets(batch), [Term("forward_kl")])
    targets = CachedTeacher(store.folder, Batches(data, [(2, 12)]).examples).targets(batch)
    drawn = loss_and_gradients(student, Split(student), batch, targets, [Term("forward_kl")])
    assert cosine(drawn.gradients, dense.gradients) > 0.999
    with pytest.raises(UserError, match="reverse_kl cannot be taken against sampled targets"):
        loss_and_gradients(student, Split(student), batch, targets, [Term("reverse_kl")])


@pytest.mark.parametrize("vocabulary, size", [(512, 98), (65536, 98), (151936, 97)])
def test_bytes_per_token(vocabulary, size) -> None:
    manifest = Manifest("t", "t", vocabulary, largest_k(vocabulary, 1), (1.0,))
    assert manifest.record_bytes == size
    random = np.random.default_rng(1)
    ids = random.integers(0, vocabulary, (5, manifest.k)).astype(np.int32)
    records = Records(ids, random.normal(size=ids.shape).astype(np.float16), np.zeros((5, 1), np.float16))
    data = pack(records, manifest)
    assert len(data) == 5 * manifest.record_bytes
    back = unpack(np.frombuffer(data, np.uint8).reshape(5, -1), manifest)
    assert np.array_equal(back.ids, ids) and np.array_equal(back.logprobs, records.logprobs)


def test_resumes_without_loss_or_duplicates(teacher, tmp_path) -> None:
    teach(teacher, examples()[:3], tmp_path / "c", **NAMES)
    (tmp_path / "c" / ".torn.shard.tmp").write_bytes(b"half")
    seen = []
    store = teach(teacher, examples(), tmp_path / "c", progress=lambda done, total: seen.append((done, total)), **NAMES)
    assert seen[-1] == (4, 4) and len(store) == 7
    assert store.positions == sum(e.supervised for e in examples())
    again = teach(teacher, examples(), tmp_path / "c", **NAMES)
    assert again.bytes == store.bytes
    fresh = teach(teacher, examples(), tmp_path / "d", **NAMES)
    for key in fresh._at:
        positions = np.flatnonzero(np.unpackbits(np.frombuffer(bytes.fromhex(fresh._at[key][2]["mask"]), np.uint8)))
        a, b = store.read(key, positions), fresh.read(key, positions)
        assert np.array_equal(a.ids[:, 0], b.ids[:, 0]) and np.allclose(a.logprobs, b.logprobs, atol=2e-2)


def test_readers_beside_a_writer(teacher, tmp_path) -> None:
    first = teach(teacher, examples()[:3], tmp_path / "c", **NAMES)
    teach(teacher, examples(), tmp_path / "c", **NAMES)
    assert len(first) == 3 and len(Store(tmp_path / "c")) == 7


def test_refusals(teacher, tmp_path) -> None:
    data, folder = examples(), tmp_path / "cache"
    with pytest.raises(UserError, match=r"no teacher cache here: manifest.json is missing"):
        CachedTeacher(folder, data)
    store = teach(teacher, data, folder, **NAMES)
    with pytest.raises(UserError, match="this cache belongs to another tokenizer"):
        CachedTeacher(folder, data, tokenizer="tokens-b")
    with pytest.raises(UserError, match="this cache is stale: it was made by another teacher"):
        CachedTeacher(folder, data, teacher="teacher-b")
    with pytest.raises(UserError, match="this cache was made with teacher teacher-a, now it is teacher-b"):
        teach(teacher, data, folder, identity="teacher-b", tokenizer="tokens-a")
    student, _ = toy(1)
    batches = Batches(data, [(2, 24)])
    batch = batches.batch(0)
    cached = CachedTeacher(folder, batches.examples)
    with pytest.raises(UserError, match="temperature 2 is not in the teacher cache, which holds 1"):
        loss_and_gradients(student, Split(student), batch, cached.targets(batch), [Term("forward_kl", 1.0, 2.0)])
    other = [Example(e.tokens[::-1].copy(), e.weights) for e in data]
    with pytest.raises(UserError, match="a text is not in the teacher cache"):
        CachedTeacher(folder, other).targets(batch)
    wider = [Example(e.tokens, np.r_[np.float32(0), np.ones(len(e) - 1, np.float32)]) for e in data]
    with pytest.raises(UserError, match="made with other loss masks"):
        CachedTeacher(folder, wider).targets(Batches(wider, [(2, 24)]).batch(0))
    shard = next(folder.glob("*.shard"))
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    damaged = CachedTeacher(folder, batches.examples)
    with pytest.raises(UserError, match="the checksum does not match"):
        for step in range(len(batches)):
            damaged.targets(batches.batch(step))
    shard.write_bytes(good[:-5])
    with pytest.raises(UserError, match="the shard is cut short or damaged"):
        Store(store.folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="manifest cannot be read"):
        Store(folder)


def test_the_teacher_forward_is_not_run_for_what_is_known(teacher, tmp_path) -> None:
    teach(teacher, examples(), tmp_path / "c", **NAMES)
    teacher.split.model.update({"model": {"norm": {"weight": mx.full((16,), float("nan"))}}})
    store = teach(teacher, examples(), tmp_path / "c", **NAMES)
    cached = CachedTeacher(store.folder, examples())
    assert np.isfinite(cached.targets(Batches(examples(), [(2, 24)]).batch(0)).logprobs).all()
