"""Agreement with TRL and Liger: generalised JSD, tail bucket, fused head; over betas, temperatures, masks, padding."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxkd.losses.chunk import Chunk, Plan, chunk_loss
from mlxkd.losses.forms import Dense
from mlxkd.losses.sparse import Bucket
from mlxkd.losses.term import Term

torch = pytest.importorskip("torch")
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


def chunked(beta, temperature, z, arrays, weights, form):
    term = Term("jsd", 1.0, temperature, {"beta": beta}, scale_t2=False)
    chunk = Chunk(mx.zeros(len(z), mx.int32), mx.array(weights), {"teacher": arrays}, {})
    (value,), gradient = chunk_loss(Plan((term,), (("teacher", form),)), mx.array(z), chunk)
    return value.item(), np.array(gradient)


def draw(rows, vocabulary, seed=0):
    random = np.random.default_rng(seed)
    return (random.normal(0, 2, (rows, vocabulary)).astype(np.float32) for _ in range(2))


@pytest.mark.slow  # importing TRL takes minutes on a small machine
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [0.9, 1.0, 3.0])
def test_trl_generalized_jsd(beta, temperature) -> None:
    trainer = pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer
    z, zt = draw(12, 23)
    labels = torch.where(torch.arange(12) % 3 == 0, -100, 1)[None]
    student = torch.tensor(z)[None].requires_grad_()
    expected = trainer.generalized_jsd_loss(student, torch.tensor(zt)[None], labels, beta, temperature, reduction="sum")
    expected.backward()
    weights = (labels[0] != -100).numpy().astype(np.float32)
    value, gradient = chunked(beta, temperature, z, {"logits": mx.array(zt)}, weights, Dense())
    assert value == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)
    assert np.abs(gradient - student.grad[0].numpy()).max() <= 1e-6


@pytest.mark.slow  # importing TRL takes minutes on a small machine
@pytest.mark.parametrize("beta", BETAS)
def test_trl_tail_bucket(beta) -> None:
    peer = pytest.importorskip("trl.experimental.server_distillation.server_distillation_trainer")
    z, zt = draw(12, 23)
    student, at = torch.tensor(z).requires_grad_(), torch.tensor(np.argsort(-zt, axis=-1)[:, :5].copy())
    known = torch.log_softmax(torch.tensor(zt), -1).gather(-1, at)
    valid = torch.ones_like(at, dtype=torch.bool)
    with_tail, support = peer._add_tail_bucket(torch.log_softmax(student, -1).gather(-1, at), valid)
    teacher_tail, _ = peer._add_tail_bucket(known, valid)
    expected = peer._jsd_divergence(with_tail, teacher_tail, beta, support).sum()
    expected.backward()
    arrays = {"ids": mx.array(at.numpy().astype(np.int32)), "logprobs": mx.array(known.numpy()),
              "tail": mx.array(teacher_tail[:, -1:].detach().numpy())}  # fmt: skip
    value, gradient = chunked(beta, 1.0, z, arrays, np.ones(12, np.float32), Bucket((1.0,)))
    assert value == pytest.approx(expected.item(), rel=2e-6)
    assert np.abs(gradient - student.grad.numpy()).max() <= 1e-6


@pytest.mark.parametrize("beta", (0.0, 0.5, 1.0))
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_liger_fused_linear_jsd(beta, temperature) -> None:
    """Values and gradients through the head, with masked labels."""
    liger = pytest.importorskip("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss
    random = np.random.default_rng(1)
    h, ht = (random.normal(0, 1, (10, d)).astype(np.float32) for d in (6, 8))
    w, wt = (random.normal(0, 1, (19, d)).astype(np.float32) for d in (6, 8))
    labels = torch.tensor([-100, 1, 2, 3, -100, 4, 5, 6, 7, -100])
    hidden, weight = torch.tensor(h, requires_grad=True), torch.tensor(w, requires_grad=True)
    fused = liger(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=temperature, compiled=False)
    expected = fused(hidden, weight, torch.tensor(ht), torch.tensor(wt), labels)
    expected.backward()
    mask = (labels != -100).numpy().astype(np.float32)
    raw = mx.array(h) @ mx.array(w).T
    value, slope = chunked(beta, temperature, np.array(raw), {"logits": mx.array(ht) @ mx.array(wt).T}, mask, Dense())
    count = mask.sum()
    assert value / count == pytest.approx(expected.item(), rel=2e-6)
    assert np.abs(np.array(mx.array(slope) @ mx.array(w)) / count - hidden.grad.numpy()).max() <= 1e-6
    assert np.abs(np.array(mx.array(slope).T @ mx.array(h)) / count - weight.grad.numpy()).max() <= 2e-6
