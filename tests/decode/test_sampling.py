"""Laws against independent definitions written with sorting in pure Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxkd.decode.sampling import Law, SamplingOptions, law, log_probability
from mlxkd.errors import UserError

LOGITS = st.lists(st.floats(-6, 6, width=16), min_size=2, max_size=12)


def plain_law(logits: list[float], temperature: float, k: int, p: float, m: float) -> list[float]:
    """The textbook, token by token in order of probability."""
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    kept = order[:k] if k else order
    total = sum(weights[i] for i in kept)
    if p < 1:
        mass, nucleus = 0.0, []
        for i in kept:
            nucleus.append(i)
            mass += weights[i] / total
            if mass >= p - 1e-12:
                break
        kept = nucleus
        total = sum(weights[i] for i in kept)
    best = max(weights[i] / total for i in kept)
    kept = [i for i in kept if weights[i] / total >= m * best]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


@settings(max_examples=300, deadline=None)
@given(
    LOGITS,
    st.sampled_from([0.3, 1.0, 2.0]),
    st.integers(0, 5),
    st.sampled_from([1.0, 0.9, 0.5]),
    st.sampled_from([0.0, 0.2]),
)
def test_laws_equal_the_textbook(logits: list[float], temperature: float, k: int, p: float, m: float) -> None:
    found = law(np.array(logits), SamplingOptions(temperature=temperature, top_k=k, top_p=p, min_p=m))
    dense = np.zeros(len(logits))
    dense[found.ids] = found.probabilities
    np.testing.assert_allclose(dense, plain_law(logits, temperature, k, p, m), atol=1e-12)


def test_greedy_takes_the_smallest_of_equal_best() -> None:
    assert law(np.array([1.0, 3.0, 3.0]), SamplingOptions()).ids.tolist() == [1]


def test_masks_come_before_everything_else() -> None:
    allowed = np.array([True, False, True])
    found = law(np.array([0.0, 9.0, 0.0]), SamplingOptions(temperature=1.0, top_k=2), allowed=allowed)
    assert found.ids.tolist() == [0, 2] and found.probabilities.tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match="no token has a finite logit"):
        law(np.zeros(2), SamplingOptions(), allowed=np.zeros(2, dtype=bool))


def test_the_repetition_penalty_divides_and_multiplies() -> None:
    options = SamplingOptions(temperature=1.0, repetition_penalty=2.0, repetition_window=2)
    found = law(np.array([2.0, -1.0, 0.5]), options, history=[2, 0, 1])
    expected = np.exp([1.0, -2.0, 0.5])
    np.testing.assert_allclose(found.probabilities, expected / expected.sum(), atol=1e-15)


def test_draws_invert_the_distribution_function() -> None:
    found = Law(np.array([2, 5, 9]), np.array([0.25, 0.5, 0.25]))
    uniforms = [0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 1e-16]
    assert [found.draw(u) for u in uniforms] == [2, 2, 5, 5, 9, 9]


def test_log_probabilities_are_those_of_the_softmax() -> None:
    logits = np.array([1.0, 2.0, 4.0])
    assert math.isclose(log_probability(logits, 1), 2 - math.log(sum(math.exp(x) for x in logits)))


@pytest.mark.parametrize(("name", "value"), [("temperature", -1.0), ("top_p", 0.0), ("min_p", 2.0), ("top_k", -1)])
def test_values_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{name} = {value} is out of range"):
        SamplingOptions(**{name: value})
