"""A teacher with another tokenizer: bytes, groups, and loss against a naive walk over both token rows and torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from kd_toys import toy
from toy_tokenizer import tokenizer_folder

from mlxkd import compat
from mlxkd.data.batching import Batch, build
from mlxkd.data.example import Example
from mlxkd.losses.step import loss_and_gradients, loss_values
from mlxkd.losses.term import Term
from mlxkd.students.split import Split
from mlxkd.teachers.crossing import CrossTeacher, Reader
from mlxkd.teachers.local import LocalTeacher

TEXTS = ("the cat sat on the mat, and the dog barked", "naïve café: 東京 is large", "the weather in Paris is mild")
WORDS = ("the cat sat on the mat", "the weather in Paris")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("tokenizers")
    first = tokenizer_folder(folder / "student", None, eos="<|im_end|>", corpus=[TEXTS[0]])
    second = tokenizer_folder(
        folder / "teacher",
        None,
        eos="</s>",
        corpus=["at on mat barked Paris"],
        special=["</s>", "<s>"],
        bos_token="<s>",
    )
    return compat.load_tokenizer(first), compat.load_tokenizer(second)


def examples(tokenizer: Any, supervised_from: int = 1) -> list[Example]:
    found = []
    for text in TEXTS:
        tokens = np.array([*tokenizer.encode(text), tokenizer.eos_token_id], np.int32)
        weights = np.ones(len(tokens), np.float32)
        weights[:supervised_from] = 0
        found.append(Example(tokens, weights))
    return found


def rows_of(found: list[Example]) -> Batch:
    return build(found, range(len(found)), (len(found), max(map(len, found)) - 1))


def test_both_sides_spell_the_same_bytes(tokenizers) -> None:
    student, teacher = tokenizers
    reader = Reader(student, teacher)
    for example in examples(student):
        reading = reader.read(example.tokens)
        assert reading.student_ends[-1] == reading.ends[-1]
        assert reading.ids[-1] == teacher.eos_token_id and not len(reading.broken)
        text = student.decode(example.tokens[:-1].tolist())
        assert teacher.decode(reading.ids[:-1].tolist()) == text
        assert reading.ends[-2] == len(text.encode())


def test_half_a_character_is_marked_and_keeps_its_length(tokenizers) -> None:
    student, teacher = tokenizers
    tokens = np.array(student.encode("a東"), np.int32)
    reading = Reader(student, teacher).read(tokens[:-1])
    assert reading.broken.tolist() == list(range(1, int(reading.student_ends[-1])))
    assert reading.ends[-1] == reading.student_ends[-1]


def naive_groups(ours: list[int], theirs: list[int]) -> list[tuple[list[int], list[int]]]:
    """Walk both rows, the one that is behind first; a group closes where both stand at the same byte."""
    groups, i, j, a, b = [], 0, 0, list[int](), list[int]()
    while i < len(ours) and j < len(theirs):
        if ours[i] == theirs[j]:
            groups.append(([*a, i], [*b, j]))
            i, j, a, b = i + 1, j + 1, [], []
        elif ours[i] < theirs[j]:
            a.append(i)
            i += 1
        else:
            b.append(j)
            j += 1
    return groups


def merged(torch: Any, logits: Any, ids: list[int], group: list[int]) -> Any:
    probs = torch.softmax(logits, -1)
    earlier = [probs[t - 1, ids[t]] for t in group[:-1]]
    return probs[group[-1] - 1] * torch.prod(torch.stack([*earlier, torch.ones(())]))


def oracle(torch: Any, name: str, q: Any, p: Any, pairs: tuple[tuple[int, int], ...]) -> Any:
    def ranked(x: Any, y: Any) -> Any:
        x, y = (v.sort(descending=True).values for v in (x, y))
        width = max(len(x), len(y))
        return sum(
            (torch.nn.functional.pad(a, (0, width - len(a))) - torch.nn.functional.pad(b, (0, width - len(b)))).abs()
            for a, b in [(x, y)]
        ).sum()

    if name == "uld":
        return ranked(q, p)
    ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
    a, b = p[theirs].clamp_min(1e-8), q[ours].clamp_min(1e-8)
    rest_q = torch.tensor([i for i in range(len(q)) if i not in set(ours)])
    rest_p = torch.tensor([i for i in range(len(p)) if i not in set(theirs)])
    share = len(pairs) / len(p)
    return share * (a * (a.log() - b.log())).sum() + (1 - share) * ranked(q[rest_q], p[rest_p])


@pytest.mark.parametrize("name", ["gold", "uld"])
@pytest.mark.parametrize("supervised_from", [1, 4])
def test_loss_of_whole_rows(tokenizers, name: str, supervised_from: int) -> None:
    torch = pytest.importorskip("torch")
    student, teacher = tokenizers
    ours, _ = toy(1, vocab_size=len(student.get_vocab()), sharpness=2.0)
    theirs, _ = toy(2, vocab_size=len(teacher.get_vocab()) + 5, sharpness=2.0)  # with padding rows
    found = examples(student, supervised_from)
    batch = rows_of(found)
    said = CrossTeacher(theirs, teacher, student, len(student.get_vocab()), found).targets(batch)
    pairs = said.form.pairs
    reader = Reader(student, teacher)
    total = torch.zeros(())
    groups_found = 0
    for example in found:
        reading = reader.read(example.tokens)
        q = torch.tensor(np.array(ours(mx.array(example.tokens[None]))[0].astype(mx.float32)))
        p = torch.tensor(np.array(theirs(mx.array(reading.ids[None]))[0].astype(mx.float32)))
        p = p[:, : len(teacher.get_vocab())]
        start = int(reading.ids[0] == teacher.bos_token_id)  # its end is 0: it belongs to no group
        for left, right in naive_groups(reading.student_ends.tolist(), reading.ends[start:].tolist()):
            right = [t + start for t in right]
            if left[0] < supervised_from or right[0] < 1:
                continue
            a = merged(torch, q, example.tokens.tolist(), left)
            total = total + oracle(torch, name, a, merged(torch, p, reading.ids.tolist(), right), pairs)
            groups_found += 1
    sums, _ = loss_values(Split(ours), batch, said, [Term(name)], chunk_bytes=1)
    assert groups_found > 20 and sum(said.weights > 0) < said.count + 1
    assert sums[name].item() == pytest.approx(float(total), rel=2e-5)


def test_equal_tokenizers_reduce_to_the_plain_divergence(tokenizers) -> None:
    student, _ = tokenizers
    size = len(student.get_vocab())
    (ours, _), (theirs, _) = (toy(seed, 1.0, vocab_size=size) for seed in (1, 2))
    found = examples(student)
    batch = rows_of(found)
    crossed = CrossTeacher(theirs, student, student, size, found).targets(batch)
    plain = LocalTeacher(theirs, size).targets(batch)
    # Canonical tokens only: every group is one token, and duplicates of a byte string would stay unmatched.
    assert crossed.last.tolist() == list(range(crossed.count)) and len(crossed.form.pairs) == size
    a = loss_and_gradients(ours, Split(ours), batch, crossed, [Term("gold")])
    b = loss_and_gradients(ours, Split(ours), batch, plain, [Term("forward_kl")])
    assert a.sums["loss"].item() == pytest.approx(b.sums["loss"].item(), rel=1e-5)


@pytest.mark.slow  # importing TRL takes minutes on a small machine
def test_trl_walks_the_same_groups(tokenizers) -> None:
    gold = pytest.importorskip("trl.experimental.gold.gold_trainer")
    student, teacher = tokenizers
    reader = Reader(student, teacher)
    for example in examples(student):
        reading = reader.read(example.tokens)
        start = int(reading.ids[0] == teacher.bos_token_id)
        offsets = [
            [(0, end) for end in ends] for ends in (reading.student_ends.tolist(), reading.ends[start:].tolist())
        ]
        ours, theirs = gold.ULDLoss._align_by_byte_offsets(*offsets)
        expected = naive_groups(reading.student_ends.tolist(), reading.ends[start:].tolist())
        assert list(zip(ours, theirs, strict=True)) == expected


def test_a_sentencepiece_teacher_reads_a_byte_level_student(tokenizers, stories_model: Path) -> None:
    student, _ = tokenizers
    reader = Reader(student, compat.load_tokenizer(stories_model))
    for example in examples(student):
        reading = reader.read(example.tokens)
        assert reading.ends[-1] == reading.student_ends[-1] and reading.ids[0] == 1
    assert len(reader.pairs()) > 100
