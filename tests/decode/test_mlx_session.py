"""The session contract on MLX, for every cache kind, and the real model against its published output."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from decode_models import CONFIGS, tiny
from session_contract import Factory, SessionContract, last_rows, tokens_for

from mlxkd import compat
from mlxkd.decode.mlx_session import MlxSession
from mlxkd.decode.session import Snapshot
from mlxkd.errors import UserError


class TestLlama(SessionContract):
    @pytest.fixture
    def factory(self) -> Factory:
        model, config = tiny("llama")
        return lambda **options: MlxSession(model, config, **options)


def quantised(**options: Any) -> MlxSession:
    model, config = tiny("llama")
    return MlxSession(model, config, kv_bits=8, kv_group_size=32, **options)


def codes(snapshot: Snapshot) -> dict[str, np.ndarray]:
    """The 8-bit codes of a snapshot's keys and values, by name."""
    return {name: np.array(a).view(np.uint8) for name, a in snapshot.arrays.items() if name.endswith(".0")}


@cache
def one_code() -> float:
    """The most that a logit moves when any one code of four tokens' keys and values takes its neighbour's value."""
    session = quantised()
    tokens = tokens_for(session, 5)
    session.extend(tokens[None, :4])
    kept = session.snapshot(0)

    def logits(arrays: dict[str, Any]) -> np.ndarray:
        session.restore(0, replace(kept, arrays=arrays))
        return last_rows(session, tokens[4:])

    straight, moved = logits(kept.arrays), []
    for name, held in codes(kept).items():
        for at in range(held.size):
            changed = held.copy()
            changed.flat[at] ^= 1
            moved.append(np.abs(logits({**kept.arrays, name: mx.array(changed.view(np.uint32))}) - straight).max())
    return float(max(moved))


class TestQuantisedKeysAndValues(SessionContract):
    """Kernels for other numbers of queries round differently, and a key next to a boundary may take the next code."""

    @property
    def tolerance(self) -> float:
        return one_code()

    @pytest.fixture
    def factory(self) -> Factory:
        return quantised

    @pytest.mark.parametrize("sizes", [(1,) * 12, (5, 7), (3, 1, 8), (11, 1)], ids=str)
    def test_codes_are_those_of_any_other_split(self, sizes: tuple[int, ...]) -> None:
        whole, parts = quantised(), quantised(batch_size=3)
        tokens = tokens_for(whole, 13)
        whole.extend(tokens[None, :12])
        for end, size in zip(np.cumsum(sizes), sizes, strict=True):
            parts.extend(np.tile(tokens[end - size : end], (3, 1)), [size, 0, size])
        left, right = whole.snapshot(0), parts.snapshot(2)
        apart = np.concatenate([np.abs(codes(left)[n].astype(int) - codes(right)[n]).ravel() for n in codes(left)])
        assert apart.max() <= 1 and (apart > 0).sum() <= 2 and apart.size == 1536
        for name in left.arrays.keys() - codes(left).keys():
            np.testing.assert_allclose(np.array(left.arrays[name]), np.array(right.arrays[name]), rtol=1e-4, atol=1e-5)

    def test_equal_codes_give_equal_logits(self) -> None:
        """The loose tolerance of the contract is that of one code; without any that differs it is not needed."""
        session, batch = quantised(), quantised(batch_size=3)
        tokens = tokens_for(session, 13)
        session.extend(tokens[None, :12])
        batch.restore(1, session.snapshot(0))
        batch.extend(np.tile(tokens[:5], (3, 1)), [5, 0, 2])
        found = np.array(batch.extend(np.tile(tokens[12:], (3, 1))))[1]
        np.testing.assert_allclose(found, last_rows(session, tokens[12:]), atol=1e-4, rtol=1e-4)


class TestSlidingWindow(SessionContract):
    """The window (5) is passed by every test of 12 tokens, so rewinding crosses it."""

    tolerance = 1e-3

    @pytest.fixture
    def factory(self) -> Factory:
        model, config = tiny("gemma3")
        return lambda **options: MlxSession(model, config, **options)


class TestGroupedScores(SessionContract):
    """gemma2 masks grouped scores; with two rows and two kv heads a mask of four axes is silently wrong."""

    tolerance = 1e-3

    @pytest.fixture
    def factory(self) -> Factory:
        model, config = tiny("gemma2")
        return lambda **options: MlxSession(model, config, **options)


class TestRecurrent(SessionContract):
    @pytest.fixture
    def factory(self) -> Factory:
        model, config = tiny("lfm2")
        return lambda **options: MlxSession(model, config, **options)


class TestReal(SessionContract):
    @pytest.fixture
    def factory(self, stories: Any) -> Factory:
        model, _, config = stories
        return lambda **options: MlxSession(model, config, **options)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "lfm2"])
def test_logits_are_those_of_the_model_without_a_cache(name: str) -> None:
    model, config = tiny(name)
    session = MlxSession(model, config)
    tokens = tokens_for(session, 20)
    np.testing.assert_allclose(
        last_rows(session, tokens), np.array(model(mx.array(tokens)[None]))[0], atol=2e-3, rtol=1e-3
    )


def test_sliding_windows_match_mlx_lms_ring() -> None:
    """A window that is only masked must give what mlx-lm's rotating cache gives, far beyond the window."""
    model, config = tiny("gemma3")
    session, ring = MlxSession(model, config), compat.new_cache(model)
    tokens = tokens_for(session, 40)
    expected = [np.array(model(mx.array(tokens[i : i + 1])[None], cache=ring))[0, -1] for i in range(40)]
    np.testing.assert_allclose(last_rows(session, tokens), np.stack(expected), atol=2e-3, rtol=1e-3)


def test_quantised_keys_and_values_match_mlx_lms_cache() -> None:
    model, config = tiny("llama")
    kinds = compat.cache_module()
    session = MlxSession(model, config, kv_bits=4, kv_group_size=32)
    tokens = tokens_for(session, 30)
    cache = [kinds.QuantizedKVCache(group_size=32, bits=4) for _ in model.layers]
    np.testing.assert_allclose(
        last_rows(session, tokens), np.array(model(mx.array(tokens)[None], cache=cache))[0], atol=1e-4, rtol=1e-4
    )
    assert session.snapshot(0).nbytes < _snapshot_bytes(model, config, tokens) / 2


def _snapshot_bytes(model: Any, config: dict[str, Any], tokens: np.ndarray) -> int:
    plain = MlxSession(model, config)
    plain.extend(tokens[None])
    return plain.snapshot(0).nbytes


def test_quantised_keys_and_values_are_refused_where_they_cannot_be() -> None:
    model, config = tiny("lfm2")
    with pytest.raises(UserError, match="cannot be quantised: not all its layers attend"):
        MlxSession(model, config, kv_bits=8)
    model, config = tiny("gemma3")
    with pytest.raises(UserError, match="gemma3_text cannot run with quantised keys and values"):
        MlxSession(model, config, kv_bits=8, kv_group_size=64)
    model, config = tiny("gemma2")
    with pytest.raises(UserError, match="gemma2 cannot run with quantised keys and values"):
        MlxSession(model, config, kv_bits=8, kv_group_size=16)


def test_a_model_that_cannot_mask_ragged_rows_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """gemma2 as if nobody knew that it groups its scores: one row decodes, two are refused before they do."""
    monkeypatch.setattr(compat, "masks_grouped_scores", lambda model: False)
    config = {**CONFIGS["gemma2"], "num_key_value_heads": 1}
    model = compat.build_model(config)
    MlxSession(model, config)
    with pytest.raises(UserError, match="mlx-lm's gemma2 cannot run with 2 rows of tokens"):
        MlxSession(model, config, batch_size=2)


def test_the_real_model_writes_its_published_text(stories: Any, stories_model: Path) -> None:
    model, tokenizer, config = stories
    session = MlxSession(model, config)
    tokens = [1]
    for _ in range(199):
        tokens.append(int(mx.argmax(session.extend(np.array([[tokens[-1]]]))[0, -1])))
    text = tokenizer.decode(tokens[1:])
    expected = (stories_model / "expected_greedy.txt").read_text()
    assert len(text) > 450 and expected.startswith(text)
