"""The real model through its exported bundle on the MIL runtime: everything that decoding promises of it.

That a session on this runtime fulfils the contract is tested on small bundles.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from table_session import pruned

from ane.convert.export import export
from ane.convert.options import Options
from mlxkd.decode.draft_length import FixedLength
from mlxkd.decode.drafting import ModelDrafter, NgramDrafter
from mlxkd.decode.engine import Engine
from mlxkd.decode.generate import collect, complete
from mlxkd.decode.mlx_session import MlxSession
from mlxkd.decode.opening import CacheFile, Worker, open_worker
from mlxkd.decode.requests import GenerateOptions, Request
from mlxkd.decode.sampling import SamplingOptions, law
from mlxkd.decode.tokens import Prompts

TEXTS = ("Once upon a time", "", "Lily and Tom went to the park. Lily and Tom")


@pytest.fixture(scope="module")
def worker(stories_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Worker:
    """Exported for 1, 2 and 3 rows with calls of 1, 4 and 16 tokens."""
    out = tmp_path_factory.mktemp("real") / "bundle"
    export(stories_model, out, Options(context=96, prefill=16, verify=4, batch=(1, 2, 3)))
    return open_worker(str(out), "mil")


def requests(worker: Worker, texts: Sequence[str] = TEXTS) -> list[Request]:
    """Ragged prompts and answers."""
    prompts = Prompts(worker.tokenizer).raw_batch(texts)
    return [Request(p, GenerateOptions(max_tokens=8 + 5 * i), str(i)) for i, p in enumerate(prompts)]


def plain(worker: Worker) -> dict[str, tuple[int, ...]]:
    """Answers of one row at a time."""
    engine = Engine(worker.session(1), worker.tokenizer)
    return {r.name: complete(engine, r.prompt, r.options).tokens for r in requests(worker)}


def common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common beginning."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))


def test_it_writes_the_published_text(worker: Worker, stories_model: Path) -> None:
    answer = complete(Engine(worker.session(1), worker.tokenizer), [1], GenerateOptions(max_tokens=40))
    assert (stories_model / "expected_greedy.txt").read_text().startswith(answer.text) and len(answer.text) > 80


def test_batches_do_not_change_answers(worker: Worker) -> None:
    together = collect(Engine(worker.session(2), worker.tokenizer).run(requests(worker)))
    assert {name: answer.tokens for name, answer in together.items()} == plain(worker)


@pytest.mark.parametrize("kind", ["drafts of an MLX model", "prompt lookup"])
def test_drafts_do_not_change_greedy_answers(worker: Worker, stories: Any, kind: str) -> None:
    model, _, config = stories
    session = worker.session(3)
    assert session.query_sizes == (1, 4, 16)
    small, small_config = pruned(model, config, (0, 1, 3))
    drafter = {
        "drafts of an MLX model": ModelDrafter(MlxSession(small, small_config, batch_size=3)),
        "prompt lookup": NgramDrafter(),
    }[kind]
    # An adaptive length depends on what forwards cost, and so on what else the machine does.
    engine = Engine(session, worker.tokenizer, drafter=drafter, length=FixedLength(3))
    found = collect(engine.run(requests(worker)))
    assert {name: answer.tokens for name, answer in found.items()} == plain(worker)
    assert engine.statistics.accepted > 0


def test_sampling_follows_the_law_of_the_model_in_mlx(worker: Worker, stories: Any) -> None:
    """One text through both: at each token the laws differ by what float16 rounds."""
    model, _, config = stories
    options = SamplingOptions(temperature=0.8, top_p=0.95, seed=3)
    answer = complete(Engine(worker.session(1), worker.tokenizer), [1], GenerateOptions(24, options))
    block = np.array([[1, *answer.tokens[:-1]]], dtype=np.int32)
    ours = np.asarray(worker.session(1).extend(block))[0]
    theirs = np.array(MlxSession(model, config).extend(block))[0]
    apart = []
    for left, right in zip(ours, theirs, strict=True):
        p, q = law(left, SamplingOptions(temperature=0.8)), law(right, SamplingOptions(temperature=0.8))
        apart.append(0.5 * float(np.abs(p.probabilities - q.probabilities).sum()))
    assert len(apart) == 24 and max(apart) < 0.01


def test_prompts_come_back_from_the_cache_and_from_its_file(worker: Worker, tmp_path: Path) -> None:
    """A later process finds the states on disk; another suffix takes the common part of it."""
    story = "Once upon a time there was a little girl called Lily. She liked the park."
    prompts = Prompts(worker.tokenizer).raw_batch([story, f"{story} One day", f"{story[:-5]}sea."])
    expected = [complete(Engine(worker.session(1), worker.tokenizer), p, GenerateOptions(6)).tokens for p in prompts]
    shared = [common(p, prompts[0]) for p in prompts]
    for number, prompt in enumerate(prompts):
        session = worker.session(1)
        kept = CacheFile(tmp_path / "prompts", worker, session, 1 << 24)
        assert kept.stale is None
        engine = Engine(session, worker.tokenizer, cache=kept.store)
        assert complete(engine, prompt, GenerateOptions(6)).tokens == expected[number]
        assert engine.statistics.cached_tokens >= (shared[number] - 1 if number else 0)
        kept.save()
    assert shared[2] > 10
