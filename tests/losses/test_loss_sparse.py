"""Sparse targets: the bucket as a coarse-graining, unbiased sampling, and what a cache cannot serve."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxkd.losses.chunk import Chunk, Plan, chunk_loss
from mlxkd.losses.distribution import LOG_ZERO
from mlxkd.losses.sparse import Bucket, Renormalised, Sampled
from mlxkd.losses.term import Term

torch = pytest.importorskip("torch")
V, K, N = 31, 6, 8


def case(temperature, seed=5):
    random = np.random.default_rng(seed)
    z, zt = random.normal(0, 2, (N, V)), random.normal(0, 2, (N, V))
    ids = np.argsort(-zt, axis=-1)[:, :K]
    log1 = torch.log_softmax(torch.tensor(zt), -1)
    at_t = torch.softmax(torch.tensor(zt) / temperature, -1)
    tail = (1 - at_t.gather(-1, torch.tensor(ids)).sum(-1)).log()
    arrays = {"ids": mx.array(ids.astype(np.int32)),
              "logprobs": mx.array(log1.gather(-1, torch.tensor(ids)).numpy().astype(np.float32)),
              "tail": mx.array(tail.numpy().astype(np.float32)[:, None])}  # fmt: skip
    return z, zt, ids, arrays


def ours(form, term, z, arrays):
    chunk = Chunk(mx.zeros(N, mx.int32), mx.ones(N), {"teacher": arrays}, {})
    (value,), gradient = chunk_loss(Plan((term,), (("teacher", form),)), mx.array(z.astype(np.float32)), chunk)
    return value.item(), np.array(gradient)


def coarse(x, ids):
    """Probabilities of the ids and of everything else."""
    known = x.gather(-1, torch.tensor(ids))
    return torch.cat([known, 1 - known.sum(-1, keepdim=True)], -1)


def jsd(p, q, beta):
    def kl(a, b):
        return (a * (a.log() - b.log())).sum()

    if beta in (0, 1):
        return kl(q, p) if beta else kl(p, q)
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_bucket(beta, temperature) -> None:
    z, zt, ids, arrays = case(temperature)
    student = torch.tensor(z, requires_grad=True)
    q, p = torch.softmax(student / temperature, -1), torch.softmax(torch.tensor(zt) / temperature, -1)
    total = jsd(coarse(p, ids), coarse(q, ids), beta) * temperature**2
    total.backward()
    term = Term("jsd", 1.0, temperature, {"beta": beta})
    value, gradient = ours(Bucket((temperature,)), term, z, arrays)
    assert value == pytest.approx(total.item(), rel=3e-6)
    assert np.allclose(gradient, student.grad.numpy(), atol=3e-6)


def test_bucket_over_the_whole_vocabulary_is_dense() -> None:
    z, zt, _, _ = case(1.0)
    ids = np.tile(np.arange(V, dtype=np.int32), (N, 1))
    arrays = {"ids": mx.array(ids), "logprobs": mx.array(zt.astype(np.float32)), "tail": mx.full((N, 1), LOG_ZERO)}
    student = torch.tensor(z, requires_grad=True)
    total = jsd(torch.softmax(torch.tensor(zt), -1), torch.softmax(student, -1), 0.0)
    total.backward()
    value, gradient = ours(Bucket((1.0,)), Term("forward_kl"), z, arrays)
    assert value == pytest.approx(total.item(), rel=1e-6) and np.allclose(gradient, student.grad.numpy(), atol=1e-6)


def test_a_tail_of_vanishing_student_mass_keeps_its_gradient() -> None:
    """1 - sum(q) is 0 in float32 here; the pull of the teacher's tail must not be lost with it."""
    z = np.full((N, V), -30.0)
    z[:, :K] = 0.0
    arrays = {"ids": mx.array(np.tile(np.arange(K, dtype=np.int32), (N, 1))), "logprobs": mx.zeros((N, K)),
              "tail": mx.full((N, 1), np.log(0.25))}  # fmt: skip
    _, gradient = ours(Bucket((1.0,)), Term("forward_kl"), z, arrays)
    assert gradient[:, K:].sum(axis=1) == pytest.approx([-0.25] * N, rel=1e-5)


def test_renormalised() -> None:
    z, zt, ids, arrays = case(1.0)
    student, at = torch.tensor(z, requires_grad=True), torch.tensor(ids)
    p, q = torch.softmax(torch.tensor(zt).gather(-1, at), -1), torch.softmax(student.gather(-1, at), -1)
    total = jsd(p, q, 0.0)
    total.backward()
    value, gradient = ours(Renormalised(), Term("forward_kl"), z, arrays)
    assert value == pytest.approx(total.item(), rel=2e-6) and np.allclose(gradient, student.grad.numpy(), atol=2e-6)


def test_sampled_is_forward_kl_to_the_weights() -> None:
    z, _, ids, arrays = case(1.0)
    weights = np.float32([0.5, 0.1, 0.15, 0.1, 0.1, 0.05])
    arrays["logprobs"] = mx.array(np.log(np.tile(weights, (N, 1))))
    p = torch.zeros(N, V, dtype=torch.float64).scatter(
        -1, torch.tensor(ids), torch.tensor(np.tile(weights, (N, 1))).double()
    )
    student = torch.tensor(z, requires_grad=True)
    total = -(p * torch.log_softmax(student, -1)).sum() + (p * p.clamp_min(1e-300).log()).sum()
    total.backward()
    value, gradient = ours(Sampled(), Term("forward_kl"), z, arrays)
    assert value == pytest.approx(total.item(), rel=2e-6) and np.allclose(gradient, student.grad.numpy(), atol=2e-6)
