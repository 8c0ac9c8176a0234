"""Every divergence: value and gradient against torch's automatic differentiation of the written formula."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxkd import registry
from mlxkd.errors import UserError
from mlxkd.losses import terms
from mlxkd.losses.chunk import Chunk, Plan, chunk_loss
from mlxkd.losses.curriculum import Curriculum
from mlxkd.losses.forms import Dense
from mlxkd.losses.term import Term

torch = pytest.importorskip("torch")


def kl(a, b):
    return (a * (a.log() - b.log())).sum(-1)


def jsd(p, q, beta, normalise=False):
    if beta in (0, 1):
        return kl(q, p) if beta else kl(p, q)
    m = beta * p + (1 - beta) * q
    value = beta * kl(p, m) + (1 - beta) * kl(q, m)
    return value / (beta * (1 - beta)) if normalise else value


def akl(p, q, mu):
    value, order = p.sort(-1, descending=True)
    tail = value.cumsum(-1) > mu
    tail[:, 0] = False
    gap = (p - q).abs().gather(-1, order).detach()
    share = gap.masked_fill(tail, 0).sum(-1) / gap.sum(-1)
    return share * kl(p, q) + (1 - share) * kl(q, p)


def taid(p, q, t):
    return kl(torch.softmax((1 - t) * q.detach().log() + t * p.log(), -1), q)


REFERENCES = {
    "forward_kl": [({}, kl)],
    "reverse_kl": [({}, lambda p, q: kl(q, p))],
    "jsd": [
        ({"beta": b, "normalise": n}, lambda p, q, b=b, n=n: jsd(p, q, b, n))
        for b in (0.0, 1e-3, 0.3, 0.9, 1.0)
        for n in (False, True)
    ],
    "skew_kl": [({"alpha": a}, lambda p, q, a=a: kl(p, a * p + (1 - a) * q)) for a in (0.0, 0.1, 0.7)],
    "skew_reverse_kl": [({"alpha": a}, lambda p, q, a=a: kl(q, (1 - a) * p + a * q)) for a in (0.0, 0.1, 0.7)],
    "adaptive_kl": [({"mu": m}, lambda p, q, m=m: akl(p, q, m)) for m in (0.1, 0.5, 0.95)],
    "total_variation": [({}, lambda p, q: 0.5 * (p - q).abs().sum(-1))],
    "taid": [({"start": 0.2, "end": 0.8}, lambda p, q: taid(p, q, 0.5))],
    "contrastive": [({"alpha": 0.2}, None)],
}
CASES = [(name, options, reference) for name, rows in REFERENCES.items() for options, reference in rows]


def test_every_divergence_has_a_reference() -> None:
    divergences = {n for n in registry.listing(terms) if registry.member(terms, n).NEEDS == "teacher"}
    assert divergences == set(REFERENCES)


def contrastive(p, q, mine):
    return torch.where(mine, kl(q, 0.8 * p + 0.2 * q), kl(p, 0.2 * p + 0.8 * q))


@pytest.mark.parametrize("temperature, scale_t2", [(1.0, True), (2.5, True), (0.7, False)])
@pytest.mark.parametrize("name, options, reference", CASES, ids=[f"{n}-{o}" for n, o, _ in CASES])
def test_value_and_gradient(name, options, reference, temperature, scale_t2) -> None:
    random = np.random.default_rng(3)
    z, zt = (random.normal(0, 3, (9, 29)) for _ in range(2))
    weights = random.choice([0.0, 0.5, 2.0], 9)
    mine = random.random(9) < 0.5
    student = torch.tensor(z, requires_grad=True)
    q, p = torch.softmax(student / temperature, -1), torch.softmax(torch.tensor(zt) / temperature, -1)
    per_token = contrastive(p, q, torch.tensor(mine)) if reference is None else reference(p, q)
    total = (per_token * torch.tensor(weights)).sum() * (temperature**2 if scale_t2 else 1)
    total.backward()

    term = Term(name, 1.0, temperature, options, scale_t2=scale_t2)
    live = {term.key: {"t": mx.array(0.5)}} if name == "taid" else {}
    plan = Plan((term,), (("teacher", Dense()),))
    teachers = {"teacher": {"logits": mx.array(zt.astype(np.float32))}}
    chunk = Chunk(
        mx.zeros(9, mx.int32), mx.array(weights.astype(np.float32)), teachers, live, {"on_student": mx.array(mine)}
    )
    (value,), gradient = chunk_loss(plan, mx.array(z.astype(np.float32)), chunk)
    assert value.item() == pytest.approx(total.item(), rel=2e-6, abs=1e-6)
    assert np.allclose(np.array(gradient), student.grad.numpy(), atol=2e-6 * max(1, abs(student.grad).max()))


def test_taid_moves_with_progress() -> None:
    module = registry.member(terms, "taid")
    assert [module.live(module.Options(), x)["t"] for x in (-1.0, 0.0, 0.5, 1.0, 2.0)] == pytest.approx(
        [0.4, 0.4, 0.7, 1, 1]
    )


def test_extreme_logits_stay_finite() -> None:
    """Probabilities that underflow to 0 on one side or both must not make NaN."""
    z = mx.array([[0.0, 500.0, -500.0, 3.0], [1000.0, 0.0, 0.0, 0.0]])
    zt = mx.array([[0.0, -500.0, -500.0, 3.0], [0.0, 1000.0, 0.0, 0.0]])
    for name in REFERENCES:
        term = Term(name)
        chunk = Chunk(mx.zeros(2, mx.int32), mx.ones(2), {"teacher": {"logits": zt}},
                      {term.key: {"t": mx.array(0.5)}}, {"on_student": mx.array([True, False])})  # fmt: skip
        (value,), gradient = chunk_loss(Plan((term,), (("teacher", Dense()),)), z, chunk)
        assert np.isfinite(value.item()) and np.isfinite(np.array(gradient)).all(), name


def test_curriculum_moves_alpha() -> None:
    """Far texts get alpha0, near ones the floor; the anchor follows the mean gap (2503.07067, section 3.3)."""
    state = Curriculum(alpha0=0.1, momentum=0.5)
    first = state.update([0.5, 0.5])
    assert first == pytest.approx([0.1, 0.1]) and state.anchor == 0.5
    second = state.update([0.7, 0.3])
    assert second == pytest.approx([0.1, 0.01])
    state.update([0.1, 0.1])
    assert state.anchor == pytest.approx(0.3)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Term("jsd", options={"beta": 1.2}), "loss.jsd: beta must lie between 0 and 1, not 1.2"),
        (lambda: Term("jsd", options={"betta": 0.2}), r"unknown option 'betta'\nhint: did you mean 'beta'"),
        (lambda: Term("foward_kl"), r"unknown loss 'foward_kl'\nhint: did you mean 'forward_kl'"),
        (lambda: Term("skew_kl", options={"alpha": 1.0}), "alpha must lie between 0 and 1"),
        (lambda: Term("adaptive_kl", options={"mu": 0.0}), "mu must lie between 0 and 1"),
        (lambda: Term("taid", options={"start": 0.9, "end": 0.5}), "need 0 <= start <= end <= 1"),
        (lambda: Term("forward_kl", temperature=0.0), "temperature must be a positive number, not 0.0"),
        (lambda: Term("forward_kl", weight=-1.0), r"weight must be a positive number, not -1.0"),
        (lambda: Term("forward_kl", options=Term("jsd").options), "options of another loss"),
    ],
)
def test_refusals(make, message) -> None:
    with pytest.raises(UserError, match=message):
        make()
