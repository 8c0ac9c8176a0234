"""Conversations cut to windows: the latency losses of what is left are those of the whole."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxkd import compat
from mlxkd.data.batching import Batches, build
from mlxkd.data.example import Example, windows
from mlxkd.losses.latency import inputs
from mlxkd.students.split import Split

VOCABULARY, OPENS, ANY_WORD = 16, 8, 3
# Two turns; each hesitates for three tokens and calls with four.
FIRST, SECOND = (4, 11), (15, 22)
CALLS = [(7, 11), (18, 22)]
BOTH = ("early_call", "expected_length")


@pytest.fixture(scope="module")
def split() -> Split:
    mx.random.seed(1)
    return Split(compat.build_model({
        "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24,
        "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
    }))  # fmt: skip


def conversation() -> Example:
    tokens = np.full(23, ANY_WORD, np.int32)
    weights = np.zeros(23, np.float32)
    for (start, end), (call, _) in zip((FIRST, SECOND), CALLS, strict=True):
        weights[start:end], tokens[call] = 1, OPENS
    meta = {"turns": [FIRST, SECOND], "calls": CALLS, "tools": ({},), "should_call": True}
    return Example(tokens, weights, source="d.jsonl:1", meta=meta)


def figures(example: Example, split: Split) -> dict[str, np.ndarray]:
    """Each input by position of the example; 0 where nothing is supervised."""
    batch = build([example], [0], (1, 24))
    found = inputs.early_call(batch, [example], [OPENS], VOCABULARY) | inputs.expected_length(
        batch, [example], split, [OPENS]
    )
    out = {}
    for name in ("early_label", "early_prefix", "early_grammar", "early_avoid", "length_value", "length_slope"):
        out[name] = np.zeros(24, found[name].dtype)
        out[name][batch.supervised] = found[name]
    return out


@pytest.mark.parametrize("length", [4, 5, 8, 12, 15, 16, 20, 22])
def test_what_a_cut_leaves_keeps_its_losses(length: int, split: Split) -> None:
    """Also where the call itself is cut away: the turn still hesitates before a call, it does not refuse one."""
    whole, cut = figures(conversation(), split), figures(windows(conversation(), length)[0], split)
    assert whole["length_value"].max() > 0 and whole["early_avoid"].max() == 0
    for name in whole:
        if name in ("length_value", "length_slope"):
            continue
        assert np.array_equal(cut[name][:length], whole[name][:length]), name
    # The hinge of a turn whose hesitation is all here is the whole turn's; a part of it cannot cost more.
    for (start, _), (call, _) in zip((FIRST, SECOND), CALLS, strict=True):
        here = slice(start - 1, call - 1)
        for name in ("length_value", "length_slope"):
            if call - 1 <= length:
                assert cut[name][here] == pytest.approx(whole[name][here], abs=1e-6), name
        assert cut["length_value"][start - 1] <= whole["length_value"][start - 1]


@pytest.mark.parametrize("length", [5, 9, 12, 14])
def test_later_windows_speak_of_the_turns_that_begin_in_them(length: int, split: Split) -> None:
    whole = figures(conversation(), split)
    covered = np.zeros(24, bool)
    for number, piece in enumerate(windows(conversation(), length)):
        if not piece.supervised:
            continue
        found, offset = figures(piece, split), number * length
        begins = [start - offset for start, _ in (FIRST, SECOND) if 1 <= start - offset <= length]
        told = np.zeros(24, bool)
        for start, (first, end) in zip(begins, [t for t in (FIRST, SECOND) if t[0] - offset in begins], strict=True):
            told[start - 1 : min(end - first + start - 1, length)] = True
        for name in ("early_prefix", "early_grammar", "early_avoid"):
            assert not found[name][~told].any(), name
            assert np.array_equal(found[name][told], whole[name][np.flatnonzero(told) + offset]), name
        covered[np.flatnonzero(told) + offset] = True
    assert covered[[FIRST[0] - 1, SECOND[0] - 1]].all()


def test_batches_cut_conversations_that_are_too_long(split: Split) -> None:
    batches = Batches([conversation()], [(1, 16)])
    assert batches.report.truncated == 1
    given = inputs.early_call(batches.batch(0), batches.examples, [OPENS], VOCABULARY)
    assert given["early_avoid"].max() == 0 and given["early_prefix"].max() > 0
