"""The student's own text weighed by its length: from the producer of rollouts to the gradient."""

from __future__ import annotations

import itertools
import json
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from call_texts import TOOLS
from mlx.utils import tree_flatten, tree_map
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mlxkd import compat
from mlxkd.data.batching import Batches
from mlxkd.data.example import Example
from mlxkd.data.spans import Required
from mlxkd.decode.detokenize import detokenizer_factory
from mlxkd.errors import UserError
from mlxkd.evaluation.toolcalls.parsing import parser_for
from mlxkd.losses.latency.collect import LatencyInputs
from mlxkd.losses.latency.missing import of_batch, tokens_missing
from mlxkd.losses.step import loss_and_gradients
from mlxkd.losses.term import Term
from mlxkd.recipe import parse_recipe
from mlxkd.recipe_sections import OnPolicy
from mlxkd.students.split import Split
from mlxkd.training.feed import WrittenText

# One token per word, a whole call among them, so that every answer of three tokens can be enumerated.
WORDS = ["<eos>", '<tool_call>{"name":"now","arguments":{}}</tool_call>', "hm", "ask", "12"]
EOS, CALLS, HM, ASK, TWELVE = range(5)
LONGEST = 3


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("words")
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="hm"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoders.ByteLevel()
    inner.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "tool_parser_type": "json_tools"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return compat.load_tokenizer(folder, {})


@pytest.fixture
def student() -> nn.Module:
    mx.random.seed(3)
    model = compat.build_model({
        "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8,
        "num_attention_heads": 1, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "vocab_size": len(WORDS),
        "tie_word_embeddings": False,
    })  # fmt: skip
    model.update(tree_map(lambda p: p * 3, model.parameters()))
    return model


def asked(required: Required = Required(("now",))) -> Example:  # noqa: B008
    """The teacher's turn is the call and the end."""
    weights = np.array([0, 1, 1], np.float32)
    meta = {"turns": [(1, 3)], "calls": [(1, 2)], "required": [required], "tools": tuple(TOOLS)}
    return Example(np.array([ASK, CALLS, EOS], np.int32), weights, source="d.jsonl:1", meta=meta)


@pytest.mark.parametrize(
    ("tokens", "required", "until"),
    [
        ([CALLS, EOS], Required(("now",)), 1),
        ([HM, HM, CALLS, HM], Required(("now",)), 3),
        ([HM, EOS], Required(("now",)), None),
        ([CALLS, HM, CALLS], Required(("now", "now")), 3),
        ([CALLS], Required(("get_weather",)), None),
        ([HM, TWELVE, HM], Required((), ("12",)), 2),
        ([TWELVE, CALLS], Required(("now",), ("12",)), 2),
    ],
)
def test_tokens_until_everything_required_is_there(
    tokenizer: Any, tokens: list[int], required: Required, until: int | None
) -> None:
    text_of = detokenizer_factory(tokenizer)()
    found = tokens_missing(np.array(tokens), required, TOOLS, parser_for(tokenizer), text_of)
    assert found == until


def producer(student: nn.Module, rows: int, **options: Any) -> WrittenText:
    batches = Batches([asked() for _ in range(rows)], [(rows, 4)])
    wanted = OnPolicy(share=1.0, max_tokens=LONGEST, **options)
    return WrittenText(batches, wanted, student, student, frozenset({EOS}), seed=1, total=1000)


def cost(answer: tuple[int, ...]) -> float:
    """Hinge on the tokens until the call, the whole budget where it never comes; the teacher needs two."""
    own = answer.index(CALLS) + 1 if CALLS in answer else LONGEST
    return max(0.0, own / 2 - 1 - 0.15)


def test_gradients_of_sampled_batches_average_to_that_of_the_expected_cost(student: nn.Module, tokenizer: Any) -> None:
    """Oracle: the expected cost over all answers, differentiated through the model."""
    answers = [
        a
        for n in range(1, LONGEST + 1)
        for a in itertools.product(range(len(WORDS)), repeat=n)
        if EOS not in a[:-1] and (a[-1] == EOS or n == LONGEST)
    ]

    def expected(model: nn.Module) -> mx.array:
        total = mx.array(0.0)
        for n in range(1, LONGEST + 1):
            same = [a for a in answers if len(a) == n]
            tokens = mx.array([[ASK, *a] for a in same])
            log = nn.log_softmax(model(tokens[:, :-1]), axis=-1)
            law = mx.exp(mx.take_along_axis(log, tokens[:, 1:, None], -1)[..., 0].sum(-1))
            total = total + (law * mx.array([cost(a) for a in same])).sum()
        return total

    value, exact = nn.value_and_grad(student, expected)(student)
    assert 0.1 < value.item() < 0.35, "some answers call early and some do not"
    rows, batches = 32, 150
    text, split = producer(student, rows), Split(student)
    terms = [Term("rollout_length")]
    latency = LatencyInputs(terms, split, tokenizer)
    total: Any = None
    for step in range(batches):
        batch = text.batch(step)
        given = latency(batch, text.examples)
        found = loss_and_gradients(student, split, batch, None, terms, rows * batches, inputs=given)
        total = found.gradients if total is None else tree_map(mx.add, total, found.gradients)
        mx.eval(total)
    sampled, wanted = (
        np.concatenate([np.array(v).ravel() for _, v in sorted(tree_flatten(tree))]) for tree in (total, exact)
    )
    cosine = sampled @ wanted / np.linalg.norm(sampled) / np.linalg.norm(wanted)
    assert cosine > 0.97
    assert np.linalg.norm(sampled) == pytest.approx(np.linalg.norm(wanted), rel=0.15)


def test_fresh_samples_know_their_turn_and_replayed_or_corrected_ones_cost_nothing(
    student: nn.Module, tokenizer: Any
) -> None:
    """A replayed or corrected text does not follow the student's present law, so its score would be no gradient."""
    text = producer(student, 4, replay=0.5)
    seen = {True: 0, False: 0}
    for step in range(12):
        batch = text.batch(step)
        fresh = ["origin" in text.examples[row].meta for row in batch.rows]
        assert len(set(fresh)) == 1
        seen[fresh[0]] += 1
        missing = of_batch(batch, text.examples, tokenizer)
        assert sorted(missing) == ([0, 1, 2, 3] if fresh[0] else [])
        for row, (own, teacher) in missing.items():
            answer = tuple(text.examples[batch.rows[row]].tokens[1:].tolist())
            assert teacher == 2 and own == (answer.index(CALLS) + 1 if CALLS in answer else LONGEST)
    assert min(seen.values()) > 2
    fixed = producer(student, 4, corrected=1.0, top=5)
    assert of_batch(fixed.batch(0), fixed.examples, tokenizer) == {}


@pytest.mark.parametrize(
    ("loss", "more", "said"),
    [
        (
            [{"name": "cross_entropy"}, {"name": "rollout_length"}],
            {},
            "it weighs what the student writes; set on_policy",
        ),
        (
            [{"name": "cross_entropy"}, {"name": "rollout_length"}],
            {"on_policy": {"temperature": 0.7}},
            "its temperature must be that of on_policy",
        ),
        ([{"name": "expected_length"}], {}, "shortness alone teaches to stop"),
        ([{"name": "cross_entropy"}], {"on_policy": {}}, "no loss says anything about what the student writes"),
    ],
)
def test_recipes_that_would_mislead_are_refused(loss: list[dict], more: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_recipe({"data": {"train": "d.jsonl"}, "loss": loss, **more}, "recipe.yaml")
