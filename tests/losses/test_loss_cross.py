"""Teachers with another tokenizer: groups, merged distributions and gradients against torch and TRL's functions."""

from __future__ import annotations

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlxkd.losses.chunk import Chunk, Plan, chunk_loss
from mlxkd.losses.cross import Cross, align
from mlxkd.losses.forms import Dense
from mlxkd.losses.term import Term

torch = pytest.importorskip("torch")
VS, VT = 13, 17
PAIRS = ((0, 1), (3, 2), (5, 5), (7, 11))
GROUPS = ([[0], [1, 2], [3, 4, 5], [6]], [[0, 1], [2], [3, 4], [5]])


def test_groups_close_where_both_tokenizers_have_a_border() -> None:
    ours, theirs = align(np.array([2, 4, 7, 7, 9]), np.array([4, 5, 9, 12]))
    assert ours.tolist() == [0, 0, 1, 1, 1] and theirs.tolist() == [0, 1, 1, -1]


def test_one_multibyte_character_in_pieces_stays_together() -> None:
    """Three byte tokens of one character share its end; the other side's whole character must meet all three."""
    ours, theirs = align(np.array([3, 3, 3, 4]), np.array([3, 4]))
    assert ours.tolist() == [0, 0, 0, 1] and theirs.tolist() == [0, 1]


def merged(z, ids, groups):
    probs = torch.softmax(z, -1)
    rows = [
        probs[g[-1]] * torch.prod(torch.stack([probs[i, ids[i]] for i in g[:-1]] or [torch.ones(())])) for g in groups
    ]
    return torch.stack(rows)


def reference(q, p, beta):
    """GOLD on merged rows: JSD on matched ids, ranked differences on the rest, matched share of the teacher's ids."""
    ours, theirs = [a for a, _ in PAIRS], [b for _, b in PAIRS]
    a, b = p[:, theirs].clamp_min(1e-8), q[:, ours].clamp_min(1e-8)
    if beta == 0:
        match = (a * (a.log() - b.log())).sum()
    elif beta == 1:
        match = (b * (b.log() - a.log())).sum()
    else:
        m = beta * a + (1 - beta) * b
        match = (beta * a * (a / m).log() + (1 - beta) * b * (b / m).log()).sum()
    rest_q = q[:, [i for i in range(VS) if i not in ours]].sort(-1, descending=True).values
    rest_p = p[:, [i for i in range(VT) if i not in theirs]].sort(-1, descending=True).values
    rest = (torch.nn.functional.pad(rest_q, (0, rest_p.shape[1] - rest_q.shape[1])) - rest_p).abs().sum()
    share = len(PAIRS) / VT
    return share * match + (1 - share) * rest


def case():
    random = np.random.default_rng(2)
    z, zt = random.normal(0, 1.5, (7, VS)).astype(np.float32), random.normal(0, 1.5, (6, VT)).astype(np.float32)
    return z, zt, random.integers(0, VS, 7), random.integers(0, VT, 6)


def ours(term, z, zt, ids, teacher_ids):
    log = torch.log_softmax(torch.tensor(zt), -1)
    last, at, scale = np.zeros(7, np.int32), np.zeros(7, np.int64), np.zeros(7, np.float32)
    for mine, theirs in zip(*GROUPS, strict=True):
        last[mine] = mine[-1]
        at[mine[-1]] = theirs[-1]
        scale[mine[-1]] = sum(float(log[i, teacher_ids[i]]) for i in theirs[:-1])
    arrays = {"logits": mx.array(zt[at]), "scale": mx.array(scale), "last": mx.array(last),
              "labels": mx.array(ids.astype(np.int32))}  # fmt: skip
    chunk = Chunk(mx.zeros(7, mx.int32), mx.ones(7), {"teacher": arrays}, {})
    plan = Plan((term,), (("teacher", Cross(PAIRS, VS)),))
    (value,), gradient = chunk_loss(plan, mx.array(z), chunk)
    return value.item(), np.array(gradient)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_gold(beta) -> None:
    z, zt, ids, teacher_ids = case()
    student = torch.tensor(z, requires_grad=True)
    expected = reference(merged(student, ids, GROUPS[0]), merged(torch.tensor(zt), teacher_ids, GROUPS[1]), beta)
    expected.backward()
    value, gradient = ours(Term("gold", options={"beta": beta}), z, zt, ids, teacher_ids)
    assert value == pytest.approx(expected.item(), rel=2e-6)
    assert np.abs(gradient - student.grad.numpy()).max() <= 1e-6


def test_uld() -> None:
    z, zt, ids, teacher_ids = case()
    student = torch.tensor(z, requires_grad=True)
    q, p = merged(student, ids, GROUPS[0]), merged(torch.tensor(zt), teacher_ids, GROUPS[1])
    q, p = (x.sort(-1, descending=True).values for x in (q, p))
    expected = (torch.nn.functional.pad(q, (0, VT - VS)) - p).abs().sum()
    expected.backward()
    value, gradient = ours(Term("uld"), z, zt, ids, teacher_ids)
    assert value == pytest.approx(expected.item(), rel=2e-6)
    assert np.abs(gradient - student.grad.numpy()).max() <= 1e-6


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_equal_tokenizers_reduce_to_the_plain_divergence(beta) -> None:
    random = np.random.default_rng(4)
    z, zt = (mx.array(random.normal(size=(5, 9)).astype(np.float32)) for _ in range(2))
    labels = mx.zeros(5, mx.int32)
    arrays = {"logits": zt, "scale": mx.zeros(5), "last": mx.arange(5), "labels": labels}
    same = Plan((Term("gold", options={"beta": beta}),), (("teacher", Cross(tuple((i, i) for i in range(9)), 9)),))
    plain = Plan((Term("jsd", options={"beta": beta}),), (("teacher", Dense()),))
    (a,), da = chunk_loss(same, z, Chunk(labels, mx.ones(5), {"teacher": arrays}, {}))
    (b,), db = chunk_loss(plain, z, Chunk(labels, mx.ones(5), {"teacher": {"logits": zt}}, {}))
    assert a.item() == pytest.approx(b.item(), rel=1e-6) and np.allclose(da, db, atol=1e-6)


@pytest.mark.slow  # importing TRL takes minutes on a small machine
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_trl_hybrid_uld(beta) -> None:
    gold = pytest.importorskip("trl.experimental.gold.gold_trainer")
    z, zt, ids, teacher_ids = case()
    config = SimpleNamespace(
        uld_crossentropy_weight=0, uld_distillation_weight=1, uld_student_temperature=1, uld_teacher_temperature=1,
        uld_skip_student_eos=False, uld_skip_teacher_eos=False, use_extended_uld=True,
        uld_token_merge_strategy="bayesian", uld_use_hybrid_loss=True, uld_hybrid_matched_weight=None,
        uld_hybrid_unmatched_weight=None, beta=beta,
    )  # fmt: skip
    student_words = {f"s{i}": i for i in range(VS)} | {f"m{i}": a for i, (a, _) in enumerate(PAIRS)}
    teacher_words = {f"t{i}": i for i in range(VT)} | {f"m{i}": b for i, (_, b) in enumerate(PAIRS)}
    for words in (student_words, teacher_words):
        taken = {v for k, v in words.items() if k.startswith("m")}
        for key in [k for k, v in words.items() if not k.startswith("m") and v in taken]:
            del words[key]
    peer = gold.ULDLoss(config, *(SimpleNamespace(get_vocab=lambda w=w: w) for w in (student_words, teacher_words)))
    student = torch.tensor(z, requires_grad=True)
    q = peer._merge_probabilities_with_alignment_groups(torch.softmax(student, -1), GROUPS[0], ids.tolist())
    p = peer._merge_probabilities_with_alignment_groups(
        torch.softmax(torch.tensor(zt), -1), GROUPS[1], teacher_ids.tolist()
    )
    # TRL divides by the number of groups
    expected = peer._compute_hybrid_uld_loss(q, p) * len(GROUPS[0])
    expected.backward()
    value, gradient = ours(Term("gold", options={"beta": beta}), z, zt, ids, teacher_ids)
    assert value == pytest.approx(expected.item(), rel=2e-6)
    assert np.abs(gradient - student.grad.numpy()).max() <= 1e-6
