"""Batches: fixed shapes, a pure function of the step, and nothing lost without a line in the report."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mlxkd.data.batching import Batches
from mlxkd.data.example import Example
from mlxkd.errors import UserError


def example(length: int, first: int = 0, kind: str = "messages") -> Example:
    tokens = np.arange(first, first + length, dtype=np.int32)
    weights = np.ones(length, np.float32)
    weights[0] = 0
    return Example(tokens, weights, meta={"kind": kind})


def many(lengths: list[int]) -> list[Example]:
    return [example(n, 100 * i) for i, n in enumerate(lengths)]


def test_an_epoch_holds_every_example_once_and_epochs_differ() -> None:
    batches = Batches(many([3, 5, 9, 4, 12, 5, 7]), [(2, 4), (2, 12)], seed=3)
    epochs = [[batches.batch(e * len(batches) + i) for i in range(len(batches))] for e in range(3)]
    for epoch in epochs:
        assert sorted(row for batch in epoch for row in batch.rows) == list(range(7))
    assert len({tuple(batch.rows for batch in epoch) for epoch in epochs}) > 1


def test_shifting_padding_and_supervision() -> None:
    batch = Batches([example(4, 10)], [(2, 5)]).batch(0)
    assert batch.inputs.tolist() == [[10, 11, 12, 0, 0], [0] * 5]
    assert batch.labels.tolist() == [[11, 12, 13, 0, 0], [0] * 5]
    assert batch.weights.tolist() == [[1, 1, 1, 0, 0], [0] * 5]
    assert batch.supervised.tolist() == [0, 1, 2]
    assert (batch.supervised.dtype, batch.inputs.dtype, batch.weights.dtype) == (np.int64, np.int32, np.float32)
    assert batch.rows == (0,)


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    examples = many([5] * 20)
    a, b = Batches(examples, [(3, 8)], seed=7), Batches(examples, [(3, 8)], seed=7)
    forward = [a.batch(step) for step in range(15)]
    for step in reversed(range(15)):
        assert b.batch(step).rows == forward[step].rows
        assert np.array_equal(b.batch(step).inputs, forward[step].inputs)
    other = Batches(examples, [(3, 8)], seed=8)
    assert [other.batch(s).rows for s in range(15)] != [x.rows for x in forward]


def test_the_mix_sets_how_often_a_shape_occurs() -> None:
    lengths = [8] * 80 + [16] * 10 + [32] * 10
    shapes = [(4, 8), (4, 16), (4, 32)]
    batches = Batches(many(lengths), shapes, mix=[0.5, 0.3, 0.2])
    seen = Counter(batches.batch(step).shape for step in range(10 * len(batches)))
    share = {shape: count / seen.total() for shape, count in seen.items()}
    assert share == pytest.approx({(4, 8): 0.5, (4, 16): 0.3, (4, 32): 0.2}, abs=0.03)
    rows = Counter(row for step in range(10 * len(batches)) for row in batches.batch(step).rows)
    for bucket in (range(80, 90), range(90, 100)):
        counts = [rows[row] for row in bucket]
        assert max(counts) - min(counts) <= 1, "examples of a shape recur evenly"


def test_nothing_is_dropped_silently() -> None:
    examples = [*many([30, 5]), example(25, kind="text"), Example(np.zeros(4, np.int32), np.zeros(4, np.float32))]
    batches = Batches(examples, [(2, 10)])
    report = batches.report.to_json()
    assert report["truncated"] == 1 and report["lost_tokens"] == 19
    assert report["windows"] == 3
    assert report["skipped"] == {"no supervised token": 1}
    assert report["supervised_tokens"] == 10 + 4 + 24
    assert "1 examples truncated, 19 supervised tokens lost" in batches.report.lines()
    skipping = Batches(examples, [(2, 10)], too_long="skip")
    assert skipping.report.skipped["longer than 10 positions"] == 1


@pytest.mark.parametrize(
    ("examples", "options", "message"),
    [
        ([], {"shapes": [(1, 4)]}, "no example can be used: there are none"),
        ([example(3)], {"shapes": []}, "shapes must be pairs"),
        ([example(3)], {"shapes": [(0, 4)]}, "shapes must be pairs"),
        ([example(3)], {"shapes": [(1, 4), (2, 4)]}, "two shapes have the same length"),
        ([example(3)], {"shapes": [(1, 4), (1, 8)], "mix": [0.5, 0.4]}, "mix must give each of the 2 shapes"),
        ([example(3)], {"shapes": [(1, 4), (1, 8)], "mix": [0.5, 0.5]}, "gives 0.5 to length 8, but no example"),
    ],
)
def test_faults(examples: list[Example], options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Batches(examples, **options)
