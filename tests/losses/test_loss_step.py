"""The chunked step against MLX's own automatic differentiation of the naive, unchunked form."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from kd_toys import assert_trees_close, ragged_batch, toy
from mlx.utils import tree_flatten, tree_map

from mlxkd.data.batching import Batch
from mlxkd.errors import UserError
from mlxkd.losses.curriculum import gaps
from mlxkd.losses.step import loss_and_gradients, loss_values
from mlxkd.losses.term import Term
from mlxkd.students.split import Split
from mlxkd.teachers.local import LocalTeacher

TERMS = [Term("forward_kl", 0.7, 2.0), Term("cross_entropy", 0.3)]


def naive(student: nn.Module, teacher: nn.Module, batch: Batch, vocabulary: int):
    """0.7 * 4 * KL at T=2 plus 0.3 * CE, summed with weights, full logits, automatic gradients."""
    inputs, labels, weights = mx.array(batch.inputs), mx.array(batch.labels), mx.array(batch.weights)

    def objective(x):
        z, zt = student(x)[..., :vocabulary], teacher(x)[..., :vocabulary]
        q, p = nn.log_softmax(z / 2), nn.log_softmax(zt / 2)
        kl = 4 * (mx.exp(p) * (p - q)).sum(-1)
        return ((0.7 * kl + 0.3 * nn.losses.cross_entropy(z, labels)) * weights).sum()

    return nn.value_and_grad(student, objective)(inputs)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk_bytes", [1, 37 * 4 * 8 * 17, 2**28])
@pytest.mark.parametrize("student_rows, teacher_rows, vocabulary", [(37, 37, 37), (40, 37, 37), (37, 48, 35)])
def test_equals_the_naive_form(tied, chunk_bytes, student_rows, teacher_rows, vocabulary) -> None:
    student, _ = toy(1, tie_word_embeddings=tied, vocab_size=student_rows)
    teacher, _ = toy(2, hidden_size=24, num_hidden_layers=2, head_dim=6, vocab_size=teacher_rows)
    batch = ragged_batch(vocabulary=vocabulary, rows=4, length=19)
    value, expected = naive(student, teacher, batch, vocabulary)
    targets = LocalTeacher(teacher, vocabulary).targets(batch)
    sums, gradients, count = loss_and_gradients(student, Split(student), batch, targets, TERMS, chunk_bytes=chunk_bytes)
    assert sums["loss"].item() == pytest.approx(value.item(), rel=1e-6)
    assert count == pytest.approx(batch.weights.sum())
    assert_trees_close(gradients, expected, 3e-6)
    values, _ = loss_values(Split(student), batch, targets, TERMS, chunk_bytes=chunk_bytes)
    assert values["forward_kl@2"].item() == pytest.approx(sums["forward_kl@2"].item(), rel=1e-6)


def test_padding_of_the_vocabulary_gets_no_gradient() -> None:
    student, _ = toy(1, tie_word_embeddings=False, vocab_size=40)
    teacher, _ = toy(2)
    batch = ragged_batch()
    step = loss_and_gradients(student, Split(student), batch, LocalTeacher(teacher).targets(batch), TERMS)
    head = np.array(step.gradients["lm_head"]["weight"])
    assert np.all(head[37:] == 0) and np.all(np.abs(head[:37]).max(axis=1) > 0)


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere"])
def test_soft_caps_and_scales_are_honoured(family) -> None:
    extra = {
        "gemma2": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 50.0, "query_pre_attn_scalar": 4},
        "granite": {
            "logits_scaling": 0.25, "attention_multiplier": 0.5, "embedding_multiplier": 2.0,
            "residual_multiplier": 0.3, "max_position_embeddings": 64, "attention_bias": False, "mlp_bias": False,
        },
        "cohere": {"logit_scale": 2.5},
    }[family]  # fmt: skip
    student, _ = toy(1, model_type=family, **extra)
    teacher, _ = toy(2)
    batch = ragged_batch()
    value, expected = naive(student, teacher, batch, 37)
    split = Split(student)
    assert (split.head.softcap, split.head.scale) == {"gemma2": (3, 1), "granite": (None, 4), "cohere": (None, 2.5)}[
        family
    ]
    step = loss_and_gradients(student, split, batch, LocalTeacher(teacher).targets(batch), TERMS, chunk_bytes=1)
    assert step.sums["loss"].item() == pytest.approx(value.item(), rel=2e-6)
    assert_trees_close(step.gradients, expected, 1e-5)


def test_a_quantised_teacher_and_a_frozen_quantised_head() -> None:
    student, _ = toy(1, tie_word_embeddings=False, hidden_size=32, head_dim=8)
    teacher, _ = toy(2, hidden_size=32, head_dim=8, intermediate_size=32)
    nn.quantize(teacher, group_size=32, bits=4)
    nn.quantize(student, group_size=32, bits=8, class_predicate=lambda path, _: path == "lm_head")
    student.lm_head.freeze()
    batch = ragged_batch()
    value, expected = naive(student, teacher, batch, 37)
    step = loss_and_gradients(
        student, Split(student), batch, LocalTeacher(teacher).targets(batch), TERMS, chunk_bytes=1
    )
    assert step.sums["loss"].item() == pytest.approx(value.item(), rel=1e-6)
    assert_trees_close(step.gradients, expected, 1e-5)


def test_micro_batches_add_up_to_the_whole() -> None:
    student, _ = toy(1)
    teacher, _ = toy(2)
    split, voice, batch = Split(student), LocalTeacher(teacher), ragged_batch(rows=4)
    whole = loss_and_gradients(
        student, split, batch, voice.targets(batch), TERMS, normaliser=float(batch.weights.sum())
    )
    total = None
    for row in range(4):
        part = Batch(
            batch.inputs[row : row + 1], batch.labels[row : row + 1], batch.weights[row : row + 1], (row,), (1, 11)
        )
        if part.supervised.size:
            step = loss_and_gradients(student, split, part, voice.targets(part), TERMS)
            total = step.gradients if total is None else tree_map(mx.add, total, step.gradients)
    count = float(batch.weights.sum())
    assert_trees_close(tree_map(lambda g: g / count, total), whole.gradients, 2e-6)


def test_the_teacher_is_left_alone() -> None:
    student, _ = toy(1)
    teacher, _ = toy(1)
    batch = ragged_batch()
    before = teacher(mx.array(batch.inputs))
    step = loss_and_gradients(student, Split(student), batch, LocalTeacher(teacher).targets(batch), TERMS[:1])
    assert abs(step.sums["loss"].item()) < 1e-4
    assert mx.array_equal(before, teacher(mx.array(batch.inputs)))
    assert not tree_flatten(teacher.trainable_parameters())


def test_refusals() -> None:
    student, _ = toy(1)
    teacher, _ = toy(2)
    split, voice, batch = Split(student), LocalTeacher(teacher), ragged_batch()
    with pytest.raises(UserError, match="the term 'forward_kl@2' needs a teacher, and no targets were given"):
        loss_and_gradients(student, split, batch, None, TERMS)
    empty = Batch(batch.inputs, batch.labels, batch.weights * 0, batch.rows, batch.shape)
    with pytest.raises(UserError, match="no supervised position: every loss weight is 0"):
        loss_and_gradients(student, split, empty, voice.targets(batch), TERMS)
    with pytest.raises(UserError, match=r"speaks about 3 positions, the batch supervises"):
        loss_and_gradients(student, split, batch, voice.targets(batch, np.arange(3)), TERMS)
    small, _ = toy(3, vocab_size=30)
    with pytest.raises(UserError, match="vocabulary mismatch: the teacher has 37 token ids, the student 30"):
        loss_and_gradients(small, Split(small), batch, voice.targets(batch), TERMS)
    wrong = Batch(batch.inputs, batch.labels + 30, batch.weights, batch.rows, batch.shape)
    with pytest.raises(UserError, match="lies outside the shared vocabulary of 37 ids"):
        loss_and_gradients(student, split, wrong, voice.targets(batch), TERMS)


def test_the_students_own_text_is_no_label_for_cross_entropy() -> None:
    """As if those positions carried no weight, but they still count in the divergence beside it."""
    student, _ = toy(1)
    batch = ragged_batch()
    own = np.isin(batch.supervised // batch.shape[1], [0, 2])
    rest = batch.weights.copy()
    rest[[0, 2]] = 0
    terms = [Term("cross_entropy")]
    mixed = loss_and_gradients(student, Split(student), batch, None, terms, inputs={"on_student": own})
    of_data = Batch(batch.inputs, batch.labels, rest, batch.rows, batch.shape)
    alone = loss_and_gradients(student, Split(student), of_data, None, terms)
    assert mixed.sums["loss"].item() == pytest.approx(alone.sums["loss"].item(), rel=1e-6)
    assert_trees_close(mixed.gradients, alone.gradients, 2e-6)
    assert mixed.weight == pytest.approx(batch.weights.sum())


def test_gaps_and_alphas_of_the_contrastive_pairing() -> None:
    """Per text the mean of p(label) - q(label), and a step with those alphas against one term for each side."""
    student, _ = toy(1)
    teacher, _ = toy(2)
    split, batch = Split(student), ragged_batch()
    said = LocalTeacher(teacher).targets(batch)
    probabilities = [np.array(mx.softmax(model(mx.array(batch.inputs)), axis=-1)) for model in (teacher, student)]
    p, q = (np.take_along_axis(x, batch.labels[..., None], axis=-1)[..., 0] for x in probabilities)
    carries = batch.weights > 0
    expected = np.array([(p - q)[row][carries[row]].mean() for row in range(3)])
    assert gaps(split, batch, said) == pytest.approx(expected, rel=1e-4)
    own = np.isin(batch.supervised // batch.shape[1], [1])
    inputs = {"on_student": own, "contrastive_alpha": np.full(len(own), 0.3, np.float32)}
    pairing = [Term("contrastive", options={"adaptive": True})]
    mixed = loss_and_gradients(student, split, batch, said, pairing, inputs=inputs)
    total = 0.0
    for name, rows in (("skew_kl", [0, 2]), ("skew_reverse_kl", [1])):
        weights = np.where(np.isin(np.arange(3), rows)[:, None], batch.weights, 0)
        part = Batch(batch.inputs, batch.labels, weights, batch.rows, batch.shape)
        term = [Term(name, options={"alpha": 0.3})]
        total += loss_values(split, part, LocalTeacher(teacher).targets(part), term)[0]["loss"].item()
    assert mixed.sums["loss"].item() == pytest.approx(total, rel=1e-6)
    for given, missing in (({}, "on_student"), ({"on_student": own}, "contrastive_alpha")):
        with pytest.raises(UserError, match=f"needs '{missing}' for every position"):
            loss_and_gradients(student, split, batch, said, pairing, inputs=given)
