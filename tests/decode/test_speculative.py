"""Speculative decoding: the exact law, enumerated and drawn; greedy identity on real and random models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats
from decode_models import tiny
from table_session import PlainTokenizer, Table, TableSession, pruned

from mlxkd.decode.draft_length import AdaptiveLength, FixedLength
from mlxkd.decode.drafting import FirstOf, GrammarDrafter, ModelDrafter, NgramDrafter
from mlxkd.decode.engine import Drafter, Engine
from mlxkd.decode.generate import collect, complete
from mlxkd.decode.mlx_session import MlxSession
from mlxkd.decode.requests import GenerateOptions, Request
from mlxkd.decode.sampling import Law, SamplingOptions, law
from mlxkd.decode.speculative import Draft, Streams, acceptance, residual, stages, verify
from mlxkd.decode.tokens import Prompts
from mlxkd.errors import UserError

OPTIONS = {
    "temperature": SamplingOptions(temperature=0.8),
    "top-k": SamplingOptions(temperature=1.1, top_k=3),
    "top-p": SamplingOptions(temperature=0.9, top_p=0.8),
    "min-p": SamplingOptions(temperature=1.3, min_p=0.2),
    "penalty": SamplingOptions(temperature=1.0, repetition_penalty=1.7, top_p=0.9),
}
Laws = Callable[[tuple[int, ...]], Law]


def laws_of(table: Table, options: SamplingOptions) -> Laws:
    return lambda context: law(table.logits(context), options, context)


def drafts_of(drafter: Laws | None, context: tuple[int, ...], length: int) -> Iterator[tuple[float, Draft]]:
    """Every draft with its probability; None drafts a point mass that is often wrong."""
    if drafter is None:
        yield 1.0, Draft([(context[-1] + 1 + i) % 4 for i in range(length)])
        return
    for tokens in product(range(4), repeat=length):
        laws = [drafter((*context, *tokens[:i])) for i in range(length)]
        weight = float(np.prod([q.of(token) for q, token in zip(laws, tokens, strict=True)]))
        if weight > 0:
            yield weight, Draft(list(tokens), laws)


def enumerate_joint(worker: Laws, drafter: Laws | None, length: int, size: int) -> dict[tuple[int, ...], float]:
    """Exact joint law of the first ``size`` tokens of speculative decoding, by walking every branch."""
    joint: dict[tuple[int, ...], float] = {}

    def walk(text: tuple[int, ...], weight: float) -> None:
        if len(text) > size:
            joint[text[1 : size + 1]] = joint.get(text[1 : size + 1], 0.0) + weight
            return
        for chance, draft in drafts_of(drafter, text, length):
            reached = weight * chance
            for i, stage in enumerate(stages(lambda i, d=draft: worker((*text, *d.tokens[:i])), draft)):
                if stage.acceptance < 1:
                    left = residual(stage.worker, stage.drafter)
                    for token, p in zip(left.ids, left.probabilities, strict=True):
                        walk((*text, *draft.tokens[:i], int(token)), reached * (1 - stage.acceptance) * p)
                reached *= stage.acceptance
                if reached == 0:
                    break
            else:
                last = worker((*text, *draft.tokens))
                for token, p in zip(last.ids, last.probabilities, strict=True):
                    walk((*text, *draft.tokens, int(token)), reached * p)

    walk((0,), 1.0)
    return joint


def plain_joint(worker: Laws, size: int) -> dict[tuple[int, ...], float]:
    joint = {}
    for text in product(range(4), repeat=size):
        chances = [worker((0, *text[:i])).of(token) for i, token in enumerate(text)]
        joint[text] = float(np.prod(chances))
    return joint


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", ["model", "point", "other-options"])
def test_the_enumerated_law_is_that_of_plain_sampling(name: str, kind: str) -> None:
    """V = 4, drafts of 2, all branches: total variation below 1e-12, whatever law the drafts were drawn from."""
    options = OPTIONS[name]
    worker = laws_of(Table(4, seed=1), options)
    drafting = SamplingOptions(temperature=0.5, top_k=2) if kind == "other-options" else options
    drafter = None if kind == "point" else laws_of(Table(4, seed=2), drafting)
    found, expected = enumerate_joint(worker, drafter, 2, 3), plain_joint(worker, 3)
    distance = 0.5 * sum(abs(found.get(text, 0.0) - p) for text, p in expected.items())
    assert set(found) <= set(expected) and distance < 1e-12


def test_the_enumeration_notices_the_published_mistakes() -> None:
    """Residual = p, and a greedy draft scored with its softmax: both are far from lossless."""
    p, q = Law(np.arange(3), np.array([0.5, 0.3, 0.2])), Law(np.arange(3), np.array([0.2, 0.2, 0.6]))
    accepted = np.minimum(p.probabilities, q.probabilities)
    wrong = accepted + (1 - accepted.sum()) * p.probabilities
    right = accepted + (1 - accepted.sum()) * residual(p, q).probabilities @ np.eye(3)[residual(p, q).ids]
    assert np.abs(right - p.probabilities).sum() < 1e-15 and np.abs(wrong - p.probabilities).sum() > 0.1
    assert acceptance(p, q) == pytest.approx(accepted.sum())
    greedy_as_softmax = min(1.0, p.of(2) / q.of(2))
    assert abs(greedy_as_softmax - p.of(2)) > 0.1


def draw_counts(worker: Laws, drafter: Laws, length: int, draws: int, seed: int) -> Counter[tuple[int, ...]]:
    known: dict[tuple[str, tuple[int, ...]], Law] = {}

    def remembered(name: str, laws: Laws) -> Laws:
        def at(context: tuple[int, ...]) -> Law:
            key = (name, context)
            if key not in known:
                known[key] = laws(context)
            return known[key]

        return at

    p, q = remembered("p", worker), remembered("q", drafter)
    streams, counts = Streams(seed), Counter[tuple[int, ...]]()
    for _ in range(draws):
        text: tuple[int, ...] = (0,)
        while len(text) < 4:
            draft = Draft()
            for _ in range(length):
                found = q((*text, *draft.tokens))
                draft.tokens.append(found.draw(streams.draft.random()))
                draft.laws.append(found)
            accepted, following = verify(lambda i, t=text, d=draft: p((*t, *d.tokens[:i])), draft, streams)
            text = (*text, *draft.tokens[:accepted], following)
        counts[text[1:4]] += 1
    return counts


def chi_squares(name: str, draws: int) -> tuple[list[float], int]:
    """Pearson's statistic of each of 20 seeds, and its degrees of freedom; the rarest strings count as one, so that
    cells are expected 5 times or more."""
    options = OPTIONS[name]
    worker = laws_of(Table(4, seed=3, spread=0.7), options)
    drafter = laws_of(Table(4, seed=4, spread=0.7), options)
    expected = {text: p for text, p in plain_joint(worker, 3).items() if p > 0}
    frequencies = np.array(sorted(expected.values())) * draws
    merged = max(int((frequencies < 5).sum()), int(np.searchsorted(np.cumsum(frequencies), 5)) + 1)
    starts = [0, *range(merged, len(frequencies))]
    assert len(starts) > 8, "the law is too poor to test anything"
    values = []
    for seed in range(20):
        counts = draw_counts(worker, drafter, 2, draws, seed)
        assert set(counts) <= set(expected)
        seen = np.array([counts[text] for text in sorted(expected, key=expected.__getitem__)], dtype=float)
        values.append(scipy.stats.chisquare(*(np.add.reduceat(v, starts) for v in (seen, frequencies))).statistic)
    return values, len(starts) - 1


def follows(statistics: list[float], freedom: int) -> bool:
    """Whether the chi-squares of independent seeds allow the exact law: p > 0.01 over all of them, in three ways.

    The sum of the statistics is chi-square too: one p for all draws, the most sensitive to a small constant deviation.
    Holm's procedure doubts the law through a single seed exactly when the least p times their number is below 0.01;
    the demand that each of 20 be above 0.01 would fail an exact sampler in 1 - 0.99^20 = 18 % of runs (45 % for three
    laws). And under the exact law the p-values are uniform (Kolmogorov-Smirnov), neither too large nor too small.
    """
    values = scipy.stats.chi2.sf(statistics, freedom)
    together = scipy.stats.chi2.sf(sum(statistics), freedom * len(statistics))
    least = len(values) * min(values)
    return min(together, least, scipy.stats.kstest(values, "uniform").pvalue) > 0.01


@pytest.mark.parametrize("name", ["temperature", "top-k", "top-p"])
def test_draws_follow_the_law_of_plain_sampling(name: str) -> None:
    """20 seeds of 500 draws each; the long version draws 100,000 each."""
    assert follows(*chi_squares(name, 500))


def test_a_law_bent_by_a_tenth_is_doubted() -> None:
    """The check has teeth: draws of one law against another whose likeliest token weighs a tenth more."""
    rng, expected = np.random.default_rng(0), np.array([0.4, 0.3, 0.2, 0.1])
    bent = expected * [1.1, 1, 1, 1] / 1.04
    honest, other = (
        [scipy.stats.chisquare(rng.multinomial(5_000, p), 5_000 * expected).statistic for _ in range(20)]
        for p in (expected, bent)
    )
    assert follows(honest, 3) and not follows(other, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["temperature", "top-k", "top-p"])
def test_many_draws_follow_the_law_of_plain_sampling(name: str) -> None:
    assert follows(*chi_squares(name, 100_000))


def test_the_engine_draws_from_the_law_too() -> None:
    """The same check through sessions, a model drafter and the loop: 1,500 requests with seeds of their own."""
    options = OPTIONS["top-p"]
    worker, draft = Table(4, seed=5), Table(4, seed=6)
    engine = Engine(
        TableSession(worker, 4),
        PlainTokenizer(),
        drafter=ModelDrafter(TableSession(draft, 4)),
        length=FixedLength(2),
    )
    counts = Counter[tuple[int, ...]]()
    draws = 1500
    requests = [
        Request((0,), GenerateOptions(3, SamplingOptions(temperature=0.9, top_p=0.8, seed=seed)), str(seed))
        for seed in range(draws)
    ]
    for answer in collect(engine.run(requests)).values():
        counts[answer.tokens] += 1
    expected = {text: p for text, p in plain_joint(laws_of(worker, options), 3).items() if p * draws >= 5}
    seen = np.array([*(counts[text] for text in expected), 0.0])
    seen[-1] = draws - seen.sum()
    wanted = np.array([*(p * draws for p in expected.values()), 0.0])
    wanted[-1] = draws - wanted.sum()
    used = wanted > 1e-9
    assert scipy.stats.chisquare(seen[used], wanted[used]).pvalue > 0.001
    assert 0 < engine.statistics.acceptance_rate < 1


def drafters(model: Any, config: dict[str, Any], rows: int) -> dict[str, Drafter]:
    small, small_config = pruned(model, config, (0, 1, 3))
    session = MlxSession(small, small_config, batch_size=rows)
    return {
        "pruned": ModelDrafter(session),
        "n-gram": NgramDrafter(),
        "mixed": FirstOf(GrammarDrafter(), NgramDrafter(3, 2), ModelDrafter(session)),
    }


@pytest.mark.parametrize("kind", ["pruned", "n-gram", "mixed"])
def test_greedy_text_of_the_real_model_is_that_of_plain_decoding(stories: Any, kind: str) -> None:
    """Every draft length from 1 to 8, one row and a ragged batch of three."""
    model, tokenizer, config = stories
    prompts = Prompts(tokenizer).raw_batch(["Once upon a time", "", "Lily and Tom went to the park. Lily and Tom"])
    requests = [Request(p, GenerateOptions(max_tokens=24 + 6 * i), str(i)) for i, p in enumerate(prompts)]
    plain = collect(Engine(MlxSession(model, config, batch_size=3), tokenizer).run(requests))
    for length in range(1, 9):
        for rows in (1, 3) if length in (2, 5) else (3,):
            engine = Engine(
                MlxSession(model, config, batch_size=rows),
                tokenizer,
                drafter=drafters(model, config, rows)[kind],
                length=FixedLength(length),
            )
            found = collect(engine.run(requests))
            assert {name: a.tokens for name, a in found.items()} == {name: a.tokens for name, a in plain.items()}
            assert {name: a.text for name, a in found.items()} == {name: a.text for name, a in plain.items()}
            assert engine.statistics.accepted > 0


@pytest.mark.parametrize(("worker", "drafter"), [("llama", "llama"), ("gemma3", "llama"), ("llama", "gemma3")])
def test_greedy_text_of_random_pairs_is_that_of_plain_decoding(worker: str, drafter: str) -> None:
    """An unrelated drafter is nearly always wrong: rejection and rewinding, also across a sliding window."""
    model, config = tiny(worker)
    other, other_config = tiny(drafter, seed=9)
    options = GenerateOptions(max_tokens=30, stop_tokens=frozenset())
    plain = complete(Engine(MlxSession(model, config), PlainTokenizer()), [5, 7], options)
    for length in (1, 3, 8):
        proposals = ModelDrafter(MlxSession(other, other_config))
        engine = Engine(MlxSession(model, config), PlainTokenizer(), drafter=proposals, length=FixedLength(length))
        assert complete(engine, [5, 7], options).tokens == plain.tokens


def test_a_perfect_drafter_is_always_accepted(stories: Any) -> None:
    model, tokenizer, config = stories
    drafter = ModelDrafter(MlxSession(model, config))
    engine = Engine(MlxSession(model, config), tokenizer, drafter=drafter, length=FixedLength(4))
    sampling = SamplingOptions(temperature=1.0, top_p=0.9)
    complete(engine, [1], GenerateOptions(max_tokens=50, sampling=sampling))
    assert engine.statistics.acceptance_rate > 0.999
    assert engine.statistics.tokens_per_forward == 5.0 and engine.statistics.accepted_at == [10, 10, 10, 10]


def test_the_end_of_the_context_is_the_same_with_drafts(stories: Any) -> None:
    model, tokenizer, config = stories
    options = GenerateOptions(max_tokens=100)
    plain = complete(Engine(MlxSession(model, config, max_context=21), tokenizer), [1, 5], options)
    drafter = ModelDrafter(MlxSession(model, config))
    engine = Engine(MlxSession(model, config, max_context=21), tokenizer, drafter=drafter, length=FixedLength(8))
    found = complete(engine, [1, 5], options)
    assert found.tokens == plain.tokens and found.finish == plain.finish == "context"


def test_length_zero_is_plain_decoding_and_never_asks_the_drafter() -> None:
    class Refusing:
        def propose(self, rows: Any, limits: Any) -> Any:
            raise AssertionError("asked")

        def release(self, row: int) -> None:
            pass

    table = Table(4, seed=1)
    session = TableSession(table)
    engine = Engine(session, PlainTokenizer(), drafter=Refusing(), length=FixedLength(0))
    plain_session = TableSession(table)
    options = GenerateOptions(max_tokens=9)
    assert (
        complete(engine, [0, 1], options).tokens
        == complete(Engine(plain_session, PlainTokenizer()), [0, 1], options).tokens
    )
    assert session.calls == plain_session.calls


def test_prompt_lookup_continues_the_latest_repetition() -> None:
    drafter = NgramDrafter(3, 1)
    row = SimpleNamespace(history=[1, 2, 3, 9, 1, 2, 3, 8, 4, 2, 3])
    assert drafter.propose({0: row}, {0: 3})[0].tokens == [8, 4, 2]
    row.history = [*row.history, 8]
    assert drafter.propose({0: row}, {0: 9})[0].tokens == [4, 2, 3, 8]
    row.history = [*row.history, 55]
    assert drafter.propose({0: row}, {0: 9})[0].tokens == []


@pytest.mark.parametrize(
    ("rate", "draft_cost", "best"),
    [(0.95, 0.02, 7), (0.01, 0.02, 0), (0.6, 0.01, 3), (0.95, 3.0, 0), (0.6, 0.3, 1)],
)
def test_the_length_adapts_to_acceptance_and_costs(rate: float, draft_cost: float, best: int) -> None:
    """Costs in units of a plain forward; the expected choice maximises (1 - a^(k+1)) / (1 - a) / cost."""
    verify_cost = {0: 1.0, 1: 1.02, 3: 1.06, 7: 1.2}
    speed = {k: (1 - rate ** (k + 1)) / (1 - rate) / (draft_cost * k + verify_cost[k]) for k in verify_cost}
    assert max(speed, key=speed.get) == best
    policy, rng, chosen = AdaptiveLength(), np.random.default_rng(0), Counter[int]()
    for step in range(2000):
        k = policy.choose()
        wins = rng.random(k) < rate
        accepted = int(np.argmin(wins)) if not wins.all() else k
        policy.observe(k, k, accepted, draft_cost * k, verify_cost[k])
        if step > 300:
            chosen[k] += 1
    assert chosen.most_common(1)[0][0] == best and len(chosen) == 4


def test_lengths_fill_compiled_shapes() -> None:
    assert AdaptiveLength.for_queries((1, 8, 64)).lengths == (0, 7)
    assert AdaptiveLength.for_queries(None).lengths == (0, 1, 3, 7)


def test_drafts_need_a_worker_and_a_drafter_that_rewind(stories: Any) -> None:
    model, config = tiny("lfm2")
    with pytest.raises(UserError, match="drafts cannot be rejected"):
        Engine(MlxSession(model, config), PlainTokenizer(), drafter=NgramDrafter(), length=FixedLength(1))
    with pytest.raises(UserError, match="this drafter's state cannot rewind"):
        ModelDrafter(MlxSession(model, config))
