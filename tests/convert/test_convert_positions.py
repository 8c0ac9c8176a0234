"""Rotary tables against mlx-lm's own layers, masks and rings against a plain list of what was written."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.rope_utils import initialize_rope

from ane.convert.architecture import rotary
from ane.runtime.kv import Cache, mask
from mlxkd.errors import UserError

SCALINGS = {
    "plain": None,
    "linear": {"type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    "yarn with temperatures": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 256,
        "beta_fast": 16,
        "mscale": 0.7,
        "mscale_all_dim": 0.4,
    },
    "longrope": {
        "rope_type": "longrope",
        "original_max_position_embeddings": 128,
        "short_factor": [1.0] * 16,
        "long_factor": [1.0 + 0.25 * i for i in range(16)],
    },
}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("name", SCALINGS)
def test_tables_rotate_as_mlx_lm(name: str, interleaved: bool) -> None:
    if name == "longrope" and interleaved:
        pytest.skip("mlx-lm has no interleaved LongRoPE")
    dim, length = 32, 40
    x = np.random.default_rng(0).normal(size=(1, 2, length, dim)).astype(np.float32)
    theirs = initialize_rope(dim, 10000.0, interleaved, SCALINGS[name], 1024)
    expected = np.array(theirs(mx.array(x), offset=300))
    ours = rotary(dim, 10000.0, SCALINGS[name], max_positions=1024, interleaved=interleaved)
    cos, sin = (t.astype(np.float32) for t in ours.table(np.arange(300, 300 + length)))
    pairs = np.arange(dim) ^ 1 if interleaved else np.roll(np.arange(dim), dim // 2)
    np.testing.assert_allclose(x * cos + x[..., pairs] * sin, expected, atol=4e-3)  # tables are float16


def test_frequencies_that_change_with_the_length_are_refused() -> None:
    with pytest.raises(UserError, match="'dynamic' changes its frequencies with the length"):
        rotary(32, 10000.0, {"type": "dynamic", "factor": 2.0})
    with pytest.raises(UserError, match="unknown rope_scaling type 'spiral'"):
        rotary(32, 10000.0, {"type": "spiral"})


def cache(window: int | None, ring: int | None, slots: int) -> Cache:
    return Cache(
        name="kv", layers=1, kv_heads=1, head_dim=32, width=32, slots=slots, window=window, ring=ring
    )  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(
    window=st.sampled_from([None, 1, 5, 20]),
    calls=st.lists(st.integers(1, 6), min_size=1, max_size=14),
    back=st.integers(0, 6),
)
def test_a_query_sees_exactly_its_window_whatever_was_written(window: int | None, calls: list[int], back: int) -> None:
    """Simulates the slots as a list, padding and a rewind included, and asks the mask which it may read."""
    query = 6
    ring = None if window is None else 32
    used = cache(window, ring, 128 if ring is None else ring + 8)
    slots = np.full(used.slots, -1)
    length = written = 0
    for i, count in enumerate(calls):
        if i == len(calls) // 2 and used.intact(max(0, length - back), written):
            length = max(0, length - back)
        count = min(count, used.span(length))
        start = int(used.slot(np.array(length)))
        slots[start : start + query] = length + np.arange(query)  # the padding is written too
        written = max(written, length + query)
        seen = mask(used, "state", np.array([length]), query, -1.0)[0, 0, :count] == 0
        for offset in range(count):
            position = length + offset
            oldest = 0 if window is None else max(0, position - window + 1)
            assert sorted(slots[seen[offset]]) == list(range(oldest, position + 1))
        length += count
