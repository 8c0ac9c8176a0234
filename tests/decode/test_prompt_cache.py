"""The prompt cache: what it returns is the truth, what it forgets is the oldest, what it loads is its own."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from decode_models import tiny
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from table_session import PlainTokenizer, Table, TableSession

from mlxkd.decode.engine import Engine
from mlxkd.decode.generate import collect, complete
from mlxkd.decode.mlx_session import MlxSession
from mlxkd.decode.prompt_cache import PromptCache
from mlxkd.decode.prompt_store import StaleCache, load, model_key, save
from mlxkd.decode.requests import GenerateOptions, Request
from mlxkd.decode.session import Snapshot
from mlxkd.decode.tokens import Prompts
from mlxkd.errors import UserError

TABLE = Table(4, seed=8)
TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=12)


def state_after(tokens: list[int]) -> Snapshot:
    """A state that is its own tokens, so that a wrong one cannot hide."""
    session = TableSession(TABLE)
    if tokens:
        session.extend(np.array([tokens]))
    return session.snapshot(0)


def tokens_of(snapshot: Snapshot) -> list[int]:
    return np.asarray(snapshot.arrays["seen"])[:, 0].tolist()


class Interleavings(RuleBasedStateMachine):
    """Random inserts, lookups, pins, answers, reloads under a small budget, against a plain list of sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = PromptCache(budget=160)  # twenty tokens
        self.inserted: list[list[int]] = []
        self.pinned: list[list[int]] = []

    @rule(tokens=TOKENS)
    def insert(self, tokens: list[int]) -> None:
        if self.cache.insert("m", tokens, state_after(tokens)):
            self.inserted.append(tokens)
            assert self.cache.lookup("m", tokens).length == len(tokens)

    @rule(tokens=TOKENS)
    def lookup(self, tokens: list[int]) -> None:
        found = self.cache.lookup("m", tokens)
        length = 0 if found is None else found.length
        if found is not None:
            assert tokens_of(found) == tokens[:length] and found.start == 0
        best = max((len(_shared(tokens, known)) for known in self.inserted), default=0)
        assert length <= best
        assert (self.cache.last_reason is None) == (length == len(tokens))
        if not self.cache.statistics.evictions:
            assert length == best

    @rule(tokens=TOKENS)
    def another_model_never_sees_it(self, tokens: list[int]) -> None:
        assert self.cache.lookup("other", tokens) is None

    @precondition(lambda self: self.inserted and not self.pinned)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        tokens = data.draw(st.sampled_from(self.inserted))[:5]
        found = self.cache.lookup("m", tokens)
        if found is not None and found.length == len(tokens):
            self.cache.pin("m", tokens)
            self.pinned.append(tokens)

    @precondition(lambda self: self.pinned)
    @rule()
    def unpin(self) -> None:
        self.cache.unpin("m", self.pinned.pop())

    @rule(prompt=TOKENS)
    def answer(self, prompt: list[int]) -> None:
        options = GenerateOptions(max_tokens=3)
        engine = Engine(TableSession(TABLE), PlainTokenizer(), cache=self.cache.for_model("m"))
        plain = Engine(TableSession(TABLE), PlainTokenizer())
        answer = complete(engine, prompt, options)
        assert answer.tokens == complete(plain, prompt, options).tokens
        self.inserted.append([*prompt, *answer.tokens[:-1]])
        self.inserted.append(prompt[:-1])

    @rule()
    def reload(self) -> None:
        evictions = self.cache.statistics.evictions
        with tempfile.TemporaryDirectory() as folder:
            save(self.cache, "m", Path(folder) / "cache")
            fresh = PromptCache(self.cache.budget)
            load(fresh, "m", Path(folder) / "cache")
        for pinned in self.pinned:
            fresh.pin("m", pinned)
        for known in self.inserted:
            before, after = self.cache.lookup("m", known), fresh.lookup("m", known)
            assert (before and before.length) == (after and after.length)
        fresh.statistics.evictions = evictions
        self.cache = fresh

    @invariant()
    def budget_holds(self) -> None:
        assert self.cache.nbytes <= self.cache.budget

    @invariant()
    def pins_hold(self) -> None:
        for tokens in self.pinned:
            assert self.cache.lookup("m", tokens).length == len(tokens)

    @invariant()
    def edges_hold_their_own_states(self) -> None:
        for node in self.cache.root("m").descendants():
            path = np.concatenate([part.tokens for part in node.path()])
            assert tokens_of(node.state) == node.tokens.tolist()
            assert (node.state.start, node.state.length) == (len(path) - len(node.tokens), len(path))


def _shared(left: list[int], right: list[int]) -> list[int]:
    found = []
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        found.append(a)
    return found


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)


def test_a_prefix_is_stored_once() -> None:
    cache = PromptCache(10_000)
    common = [0, 1, 2, 3] * 10
    cache.insert("m", [*common, 0, 0], state_after([*common, 0, 0]))
    once = cache.nbytes
    cache.insert("m", [*common, 1, 1], state_after([*common, 1, 1]))
    assert cache.nbytes - once == 2 * 8  # two tokens, 4 bytes of id and 4 of state each


def test_a_hit_counts_as_use() -> None:
    """Room for three prompts; the one hit before every insertion stays. By order of insertion it would go."""
    cache = PromptCache(3 * 8 * 4)
    prompts = [[i, 0, 0, 0] for i in range(4)]
    table = {i: state_after([i % 4, 0, 0, 0]) for i in range(4)}
    cache.insert("m", prompts[0], table[0])
    for i in (1, 2, 3):
        assert cache.lookup("m", prompts[0]).length == 4
        cache.insert("m", prompts[i], table[i])
    assert cache.lookup("m", prompts[0]).length == 4
    assert cache.lookup("m", prompts[1]) is None and cache.last_reason == "evicted"
    assert cache.lookup("m", prompts[2]).length == 4


def test_every_miss_has_its_reason() -> None:
    cache = PromptCache(8 * 6)
    state = state_after([0, 1, 2, 3])
    reasons = []

    def ask(key: str, tokens: list[int]) -> None:
        cache.lookup(key, tokens)
        reasons.append(cache.last_reason)

    ask("m", [0, 1])
    cache.insert("m", [0, 1, 2, 3], state)
    ask("m", [0, 1, 2, 3])
    ask("m", [0, 1, 3])
    ask("m", [2, 2])
    ask("n", [0, 1, 2, 3])
    cache.insert("m", [3, 3, 3], state_after([3, 3, 3]))
    ask("m", [0, 1, 2, 3])
    assert reasons == [
        "nothing stored for this model",
        None,
        "differs from here on",
        "not seen before",
        "stored for another model",
        "evicted",
    ]
    numbers = cache.statistics
    assert (numbers.lookups, numbers.hits, numbers.cached_tokens, numbers.evictions) == (6, 2, 6, 1)
    assert sum(numbers.misses.values()) == 5


def test_what_does_not_fit_is_refused_and_pins_stay() -> None:
    cache = PromptCache(8 * 5)
    cache.insert("m", [0, 1, 2], state_after([0, 1, 2]))
    cache.pin("m", [0, 1])
    assert not cache.insert("m", [3] * 4, state_after([3] * 4))
    assert cache.statistics.refused == 1
    assert cache.lookup("m", [0, 1, 2]).length == 2  # the unpinned tail made room in vain
    cache.unpin("m", [0, 1])
    assert cache.insert("m", [3] * 4, state_after([3] * 4))
    with pytest.raises(UserError, match="only 0 of 2 tokens are in the prompt cache"):
        cache.pin("m", [2, 2])
    with pytest.raises(UserError, match="is not pinned"):
        cache.unpin("m", [3])


@pytest.mark.parametrize("rows", [1, 3])
def test_the_real_model_answers_the_same_with_a_cache(stories: Any, rows: int) -> None:
    model, tokenizer, config = stories
    system = "Once upon a time there was a little dog who liked to play in the park with a big red ball. "
    texts = [system + rest for rest in ("One day", "Lily", "One day he", "", "Tom saw")]
    prompts = Prompts(tokenizer).raw_batch(texts)
    requests = [Request(prompt, GenerateOptions(max_tokens=12), str(i)) for i, prompt in enumerate(prompts)]
    plain = collect(Engine(MlxSession(model, config, batch_size=rows), tokenizer).run(requests))
    cache = PromptCache(10_000_000)
    session = MlxSession(model, config, batch_size=rows)
    engine = Engine(session, tokenizer, cache=cache.for_model("m"))
    for _ in range(2):
        found = collect(engine.run(requests))
        assert {name: a.tokens for name, a in found.items()} == {name: a.tokens for name, a in plain.items()}
    numbers = cache.statistics
    assert numbers.hits >= 9 and numbers.cached_tokens > 0.7 * numbers.asked_tokens


def test_a_next_turn_finds_the_answer_before_it(stories: Any) -> None:
    model, tokenizer, config = stories
    cache = PromptCache(10_000_000)
    engine = Engine(MlxSession(model, config), tokenizer, cache=cache.for_model("m"))
    first = complete(engine, [1, 300, 301], GenerateOptions(max_tokens=20))
    complete(engine, [1, 300, 301, *first.tokens, 310], GenerateOptions(max_tokens=2))
    assert engine.statistics.cached_tokens == 2 + 20


def test_states_that_cannot_be_cut_are_found_at_checkpoints() -> None:
    model, config = tiny("lfm2")
    cache = PromptCache(10_000_000)
    prompts = [(*range(3, 20), 30 + i, 40) for i in range(3)]
    requests = [
        Request(prompt, GenerateOptions(max_tokens=5, stop_tokens=frozenset()), str(i), checkpoints=(10, 17))
        for i, prompt in enumerate(prompts)
    ]
    plain = collect(Engine(MlxSession(model, config), PlainTokenizer()).run(requests))
    engine = Engine(MlxSession(model, config), PlainTokenizer(), cache=cache.for_model("m"))
    found = collect(engine.run(requests))
    assert {name: a.tokens for name, a in found.items()} == {name: a.tokens for name, a in plain.items()}
    assert engine.statistics.cached_tokens == 17 + 17


def test_a_file_brings_everything_back(stories: Any, tmp_path: Path) -> None:
    model, tokenizer, config = stories
    session = MlxSession(model, config)
    cache, options = PromptCache(10_000_000), GenerateOptions(max_tokens=6)
    prompts = [[1, *range(100, 140), i] for i in (50, 60)]
    expected = [
        complete(Engine(session, tokenizer, cache=cache.for_model("k")), prompt, options).tokens for prompt in prompts
    ]
    assert save(cache, "k", tmp_path / "cache") == cache.nbytes
    again = PromptCache(10_000_000)
    assert load(again, "k", tmp_path / "cache") > 0 and again.nbytes == cache.nbytes
    for prompt, tokens in zip(prompts, expected, strict=True):
        engine = Engine(MlxSession(model, config), tokenizer, cache=again.for_model("k"))
        assert complete(engine, prompt, options).tokens == tokens
        assert engine.statistics.cached_tokens == len(prompt) - 1


def test_stale_and_damaged_files_are_refused(tmp_path: Path) -> None:
    cache = PromptCache(1000)
    cache.insert("k", [1, 2, 3], state_after([1, 2, 3]))
    path = tmp_path / "cache.safetensors"
    save(cache, "k", path)
    with pytest.raises(StaleCache, match="written for another model, tokenizer, grid, session layout or version"):
        load(PromptCache(1000), "another", path)
    whole = path.read_bytes()
    for damage in (whole[:-3], whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:], b"nothing"):
        path.write_bytes(damage)
        fresh = PromptCache(1000)
        with pytest.raises(StaleCache, match="damaged"):
            load(fresh, "k", path)
        assert fresh.nbytes == 0
    with pytest.raises(UserError, match="no such prompt cache"):
        load(PromptCache(1000), "k", tmp_path / "none")


def test_half_precision_states_survive_the_disk(tmp_path: Path) -> None:
    arrays = {"0.keys": mx.random.normal((1, 2, 3, 4)).astype(mx.bfloat16)}
    cache = PromptCache(10_000)
    cache.insert("k", [5, 6, 7], Snapshot(3, arrays, {"0.keys": -2}, "l"))
    save(cache, "k", tmp_path / "c")
    again = PromptCache(10_000)
    load(again, "k", tmp_path / "c")
    found = again.lookup("k", [5, 6, 7]).arrays["0.keys"]
    assert found.dtype == mx.bfloat16 and mx.array_equal(found, arrays["0.keys"]).item()


def test_the_key_follows_weights_tokenizer_and_layout(stories_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    copy.mkdir()
    for path in stories_model.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    key = model_key(copy, "a")
    assert key == model_key(stories_model, "a") != model_key(copy, "b")
    (copy / "notes.txt").write_text("does not matter")
    assert model_key(copy, "a") == key
    for name in ("model.safetensors", "tokenizer_config.json", "config.json"):
        original = (copy / name).read_bytes()
        (copy / name).write_bytes(original[:-1] + b"\n")
        assert model_key(copy, "a") != key
        (copy / name).write_bytes(original)
