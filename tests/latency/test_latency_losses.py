"""Latency losses against torch's autograd, closed forms, enumeration and Monte Carlo."""

from __future__ import annotations

import itertools

import mlx.core as mx
import numpy as np
import pytest

from mlxkd.data.batching import Batches
from mlxkd.data.example import Example
from mlxkd.errors import UserError
from mlxkd.losses.distribution import softmax
from mlxkd.losses.latency import hazard, inputs
from mlxkd.losses.latency.bits import pack, unpack
from mlxkd.losses.term import Term
from mlxkd.losses.terms import early_call, expected_length, rollout_length

torch = pytest.importorskip("torch")
RANDOM = np.random.default_rng(5)


def test_bits_round_trip() -> None:
    for size in (1, 31, 32, 33, 100):
        mask = RANDOM.random((4, size)) < 0.4
        assert np.array_equal(np.array(unpack(mx.array(pack(mask)), size)), mask.astype(np.float32))


def test_expected_positions_against_monte_carlo() -> None:
    h = np.array([0.05, 0.3, 0.01, 0.6, 0.2])
    events = np.random.default_rng(1).random((200_000, len(h))) < h
    before = np.where(events.any(1), events.argmax(1), len(h))
    assert hazard.expected_positions(h) == pytest.approx(before.mean(), abs=4 * before.std() / len(before) ** 0.5)


def test_expected_positions_by_enumeration() -> None:
    """A longer formula: sum over where the event falls of position times probability."""
    h = RANDOM.random(6)
    survive = np.concatenate([[1.0], np.cumprod(1 - h)])
    exact = sum(t * survive[t] * h[t] for t in range(6)) + 6 * survive[6]
    assert hazard.expected_positions(h) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("h", [RANDOM.random(7), np.array([0.2, 1.0, 0.3]), np.array([0.0, 0.0]), np.array([0.4])])
def test_slope_of_the_expectation(h: np.ndarray) -> None:
    x = torch.tensor(h, requires_grad=True)
    torch.cumprod(1 - x, 0).sum().backward()
    slope = hazard.expected_slope(h)
    assert slope == pytest.approx(x.grad.numpy(), rel=1e-12)
    assert (slope < 0).any(), "a likelier event means fewer positions"


def test_the_hinge_tolerates_its_margin() -> None:
    assert hazard.hinge(1.5, 10, 0.15) == (0.0, 0.0)
    assert hazard.hinge(2.5, 10, 0.15) == pytest.approx((0.1, 0.1))


def early_inputs(n: int, vocabulary: int) -> dict[str, np.ndarray]:
    allowed = RANDOM.random((n, vocabulary)) < 0.3
    allowed[:, :2] = [True, False]  # neither none nor all: a logarithm of 0 has no gradient to compare
    return {
        "early_label": RANDOM.integers(0, vocabulary, n).astype(np.int32),
        "early_prefix": RANDOM.random(n).astype(np.float32) * (RANDOM.random(n) < 0.7),
        "early_grammar": RANDOM.random(n).astype(np.float32) * (RANDOM.random(n) < 0.7),
        "early_avoid": RANDOM.random(n).astype(np.float32) * (RANDOM.random(n) < 0.7),
        "early_allowed": pack(allowed),
    }


@pytest.mark.parametrize("progress", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("vocabulary", [7, 32, 45])
def test_early_call_against_torch(vocabulary: int, progress: float) -> None:
    n, options = 9, early_call.Options(prefix=0.4, grammar=0.3, avoid=0.7, ramp=0.5)
    z = RANDOM.normal(0, 2, (n, vocabulary))
    given = early_inputs(n, vocabulary)
    logits = torch.tensor(z, requires_grad=True)
    q = torch.softmax(logits, -1)
    allowed = torch.tensor(np.array(unpack(mx.array(given["early_allowed"]), vocabulary)).astype(np.float64))
    mass = (q * allowed).sum(-1)
    part = {k: torch.tensor(given[f"early_{k}"].astype(np.float64)) for k in ("prefix", "grammar", "avoid")}
    label = torch.tensor(given["early_label"].astype(np.int64))[:, None]
    reference = min(1.0, progress / 0.5) * (
        -0.4 * part["prefix"] * torch.log(q.gather(1, label)[:, 0])
        - 0.3 * part["grammar"] * torch.log(mass)
        - 0.7 * part["avoid"] * torch.log(1 - mass)
    )
    reference.sum().backward()
    live = {k: mx.array(v) for k, v in early_call.live(options, progress).items()}
    arrays = {k: mx.array(v) for k, v in given.items()} | live
    values, slope = early_call.loss(softmax(mx.array(z.astype(np.float32))), mx.zeros(n, mx.int32), options, arrays)
    assert np.array(values) == pytest.approx(reference.detach().numpy(), abs=2e-6)
    assert np.array(slope) == pytest.approx(logits.grad.numpy(), abs=2e-6)


def test_grammar_mass_is_zero_for_any_valid_prefix_unlike_a_count_of_braces() -> None:
    """The loss this replaces asked for a brace at every position: an ideal call scored worse than "{{{{"."""
    z = np.full((1, 8), -40.0, np.float32)
    z[0, 3] = 0  # sure of one allowed token; which one does not matter
    given = {k: mx.array(v) for k, v in early_inputs(1, 8).items()}
    given |= {
        "early_prefix": mx.zeros(1),
        "early_avoid": mx.zeros(1),
        "early_grammar": mx.ones(1),
        "ramp": mx.array(1.0),
    }
    given["early_allowed"] = mx.array(pack(np.arange(8)[None] % 3 == 0))
    values, slope = early_call.loss(softmax(mx.array(z)), mx.zeros(1, mx.int32), early_call.Options(grammar=1.0), given)
    assert values.item() == 0 and np.abs(np.array(slope)).max() < 1e-12


def test_extreme_logits_stay_finite() -> None:
    z = np.array([[200.0, -200, 0], [-200, 200, 0]], np.float32)
    given = {
        "early_label": mx.array([1, 0]),
        **{f"early_{k}": mx.ones(2) for k in ("prefix", "grammar", "avoid")},
        "early_allowed": mx.array(pack(np.array([[False, True, False], [False, True, False]]))),
        "ramp": mx.array(1.0),
    }
    values, slope = early_call.loss(softmax(mx.array(z)), mx.zeros(2, mx.int32), early_call.Options(), given)
    assert np.isfinite(np.array(values)).all() and np.isfinite(np.array(slope)).all()


def test_expected_length_has_the_whole_gradient() -> None:
    """Slope by position equals autograd through softmax, hazard, survival, expectation and hinge at once."""
    z = RANDOM.normal(0, 1, (5, 11))
    event, reference, margin = [2, 7], 3, 0.15
    logits = torch.tensor(z, requires_grad=True)
    h = torch.softmax(logits, -1)[:, event].sum(-1)
    total = torch.relu(torch.cumprod(1 - h, 0).sum() / reference - margin)
    total.backward()
    assert total > 0
    value, rate = hazard.hinge(hazard.expected_positions(h.detach().numpy()), reference, margin)
    mask = np.zeros((5, 11), bool)
    mask[:, event] = True
    given = {
        "length_value": mx.array([value, 0, 0, 0, 0]),
        "length_slope": mx.array((rate * hazard.expected_slope(h.detach().numpy())).astype(np.float32)),
        "length_event": mx.array(pack(mask)),
    }
    student = softmax(mx.array(z.astype(np.float32)))
    values, slope = expected_length.loss(student, mx.zeros(5, mx.int32), expected_length.Options(), given)
    assert np.array(values).sum() == pytest.approx(total.item(), rel=1e-6)
    assert np.array(slope) == pytest.approx(logits.grad.numpy(), abs=1e-6)
    assert (np.array(slope)[:, event] < 0).all(), "every opening token gains"


def test_the_score_function_is_unbiased_by_enumeration() -> None:
    """Two samples of up to three tokens each, every pair weighed by its probability: the mean slope is the gradient."""
    z = RANDOM.normal(0, 1, (3, 3))  # token 0 ends the answer; the law does not depend on the past
    logits = torch.tensor(z, requires_grad=True)
    log_q = torch.log_softmax(logits, -1)
    answers = [a for n in (1, 2, 3) for a in itertools.product(range(3), repeat=n) if _is_answer(a)]
    laws = [sum(log_q[t, token] for t, token in enumerate(a)) for a in answers]
    teacher, margin = 1, 0.15
    costs = [max(0.0, len(a) / teacher - 1 - margin) for a in answers]
    sum(torch.exp(law) * cost for law, cost in zip(laws, costs, strict=True)).backward()

    expected = np.zeros((3, 3))
    student = softmax(mx.array(z.astype(np.float32)))
    for (i, a), (j, b) in itertools.product(enumerate(answers), repeat=2):
        probability = torch.exp(laws[i] + laws[j]).item()
        batch, examples = _sampled([a, b])
        missing = {0: (len(a), teacher), 1: (len(b), teacher)}
        given = inputs.rollout_length(batch, examples, missing, margin)["length_advantage"]
        for row, answer in ((0, a), (1, b)):
            at = [k for k, index in enumerate(batch.supervised) if index // batch.shape[1] == row]
            rows = mx.arange(len(answer))
            here = type(student)(student.log[rows], student.p[rows])
            _, slope = rollout_length.loss(
                here, mx.array(list(answer)), rollout_length.Options(), {"length_advantage": mx.array(given[at])}
            )
            # The step multiplies by the loss weight 0.5, which the inputs have divided out; two rows average.
            expected[: len(answer)] += probability * 0.5 * np.array(slope) / 2
    assert expected == pytest.approx(logits.grad.numpy(), abs=1e-5)


def _is_answer(tokens: tuple[int, ...]) -> bool:
    return (tokens[-1] == 0 or len(tokens) == 3) and 0 not in tokens[:-1]


def _sampled(answers: list[tuple[int, ...]]) -> tuple:
    """A batch whose rows are a prompt token and a sampled answer, in order."""
    examples = [example([9, *a], 1, call=None, prompt=1) for a in answers]
    batches = Batches(examples, [(len(answers), 4)])
    batch = next(b for s in range(50) if (b := batches.batch(s)).rows == tuple(range(len(answers))))
    return batch, examples


def example(tokens: list[int], start: int, call: tuple[int, int] | None, tools: tuple = ({},), **meta: int) -> Example:
    weights = np.zeros(len(tokens), np.float32)
    weights[start:] = 0.5
    meta = {"turns": [(start, len(tokens))], "calls": [call], "tools": tools, "should_call": call is not None, **meta}
    return Example(np.array(tokens, np.int32), weights, source="d.jsonl:1", meta=meta)


class Chain:
    """A grammar that allows exactly one sequence, and one other token beside each."""

    def __init__(self, tokens: list[int], vocabulary: int):
        self.tokens, self.vocabulary, self.position = tokens, vocabulary, 0

    def mask(self) -> np.ndarray:
        mask = np.zeros(self.vocabulary, bool)
        mask[[self.tokens[self.position], 15]] = True
        return mask

    def consume(self, token: int) -> None:
        assert token == self.tokens[self.position]
        self.position += 1


def one_batch(item: Example) -> tuple:
    batch = Batches([item], [(1, 12)]).batch(0)
    return batch, [item]


def test_inputs_of_a_hesitating_call() -> None:
    """Prompt 1 2, preamble 3 4, call 8 5 6 (8 opens), end 7."""
    batch, examples = one_batch(example([1, 2, 3, 4, 8, 5, 6, 7], 2, (4, 7)))
    options = inputs.EarlyOptions(positions=5, decay=0.5)
    made = inputs.early_call(batch, examples, [8], 16, options, lambda tools: Chain([8, 5, 6, 7], 16))
    assert made["early_label"].tolist() == [8, 8, 8, 5, 6, 7]
    assert made["early_prefix"].tolist() == [2, 1, 0.5, 0.25, 0.125, 0]  # decay over weight 0.5
    assert made["early_grammar"].tolist() == made["early_prefix"].tolist()
    assert made["early_avoid"].tolist() == [0] * 6
    allowed = np.array(unpack(mx.array(made["early_allowed"]), 16))
    assert [np.flatnonzero(row).tolist() for row in allowed[:5]] == [[8], [8], [8, 15], [5, 15], [6, 15]]
    without = inputs.early_call(batch, examples, [8], 16, options)
    assert without["early_grammar"].tolist() == [2, 1, 0.5, 0, 0, 0]


def test_inputs_where_no_call_belongs_or_one_is_missing() -> None:
    batch, examples = one_batch(example([1, 2, 3, 4, 7], 2, None))
    made = inputs.early_call(batch, examples, [8], 16, inputs.EarlyOptions(2, 1.0))
    assert (
        made["early_avoid"].tolist() == [2, 2, 0] and not made["early_prefix"].any() and not made["early_grammar"].any()
    )
    batch, examples = one_batch(example([1, 2, 3, 4, 7], 2, None, should_call=True))
    made = inputs.early_call(batch, examples, [8], 16, inputs.EarlyOptions(2, 1.0))
    assert made["early_grammar"].tolist() == [2, 2, 0] and not made["early_avoid"].any()
    batch, examples = one_batch(example([1, 2, 3, 4, 7], 2, None, tools=()))
    made = inputs.early_call(batch, examples, [8], 16)
    assert not made["early_avoid"].any(), "without tools there is nothing to avoid"


def test_missing_inputs_and_weights_are_refused() -> None:
    for name in ("early_call", "expected_length", "rollout_length"):
        assert Term(name).module.INPUTS, "the step refuses to start without these"
    item = example([1, 2, 3, 8, 7], 2, (3, 4))
    item.weights[2] = 0
    batch, examples = one_batch(item)
    with pytest.raises(UserError, match=r"d.jsonl:1: a part of this turn has weight 0"):
        inputs.early_call(batch, examples, [8], 16)
    with pytest.raises(UserError, match="the tokenizer has no tool calls"):
        inputs.opening_tokens(object())
    with pytest.raises(UserError, match="margin must not be negative"):
        Term("expected_length", options={"margin": -1})
    with pytest.raises(UserError, match="margin must not be negative"):
        Term("rollout_length", options={"margin": -1})


def test_only_tokens_up_to_completion_of_rows_that_lack_something_are_weighed() -> None:
    batch, examples = _sampled([(1, 1, 0), (1, 1, 0), (1, 1, 0)])
    made = inputs.rollout_length(batch, examples, {0: (2, 1), 2: (3, 1)})["length_advantage"].reshape(3, 3)
    # Costs 0.85 and 1.85, each against the other; divided by the loss weight 0.5.
    assert made == pytest.approx(np.array([[-2, -2, 0], [0, 0, 0], [2, 2, 2]]), abs=1e-6)
    assert not inputs.rollout_length(batch, examples, {})["length_advantage"].any()
    alone = inputs.rollout_length(batch, examples, {1: (3, 1)})["length_advantage"].reshape(3, 3)
    assert alone[1] == pytest.approx([3.7] * 3, rel=1e-6), "without others there is no baseline"
