"""Calls from a random model must parse and fit their schema; drafts and batches must not change them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from table_session import Table, TableSession
from tool_tokenizer import TEMPLATE, TOOLS, make

from mlxkd.decode.constrained import ToolGrammar, call_layout
from mlxkd.decode.draft_length import FixedLength
from mlxkd.decode.drafting import FirstOf, GrammarDrafter, ModelDrafter, NgramDrafter
from mlxkd.decode.engine import Engine
from mlxkd.decode.generate import collect, complete
from mlxkd.decode.requests import GenerateOptions, Request
from mlxkd.decode.sampling import SamplingOptions
from mlxkd.decode.tokens import Prompts
from mlxkd.errors import UserError

VOCABULARY = 310


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def grammar(tokenizer: Any) -> ToolGrammar:
    return ToolGrammar(tokenizer, TOOLS, VOCABULARY, mode="required")


def call_in(text: str) -> dict[str, Any]:
    assert text.startswith("<tool_call>") and text.endswith("</tool_call>")
    call = json.loads(text.removeprefix("<tool_call>").removesuffix("</tool_call>"))
    tool = next(tool for tool in TOOLS if tool["name"] == call["name"])
    jsonschema.validate(call["arguments"], tool["parameters"])
    return call


def options(grammar: ToolGrammar | None, temperature: float = 1.0, seed: int = 0) -> GenerateOptions:
    return GenerateOptions(200, SamplingOptions(temperature=temperature, seed=seed), constraint=grammar)


def worker(rows: int = 1, seed: int = 3) -> TableSession:
    return TableSession(Table(VOCABULARY, seed=seed, order=2, spread=3.0), rows)


def test_random_models_write_valid_calls(tokenizer: Any, grammar: ToolGrammar) -> None:
    names = set()
    for seed in range(25):
        answer = complete(Engine(worker(), tokenizer), [5, 6], options(grammar, seed=seed))
        assert answer.finish == "tool_call"
        names.add(call_in(answer.text)["name"])
    assert names == {"get_weather", "stop"}


class Writing(Table):
    """A model that wants to write one text, and goes on at random where it was led astray."""

    def __init__(self, prompt: list[int], tokens: list[int]):
        super().__init__(VOCABULARY, seed=3, order=2, spread=3.0)
        self.order, self._wanted = 10_000, [*prompt, *tokens]

    def logits(self, context: tuple[int, ...]) -> np.ndarray:
        found = super().logits(context[-2:]).copy()
        if len(context) < len(self._wanted) and list(context) == self._wanted[: len(context)]:
            found[self._wanted[len(context)]] += 100.0
        return found


USUAL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo", "days": 3}}\n</tool_call>'
OTHER = '<tool_call> {"arguments":{"days":3,"unit":"kelvin","city":"O\\u00e5"},"name":"get_weather"}</tool_call>'


@pytest.mark.parametrize(("text", "share"), [(USUAL, 0.6), (OTHER, 1.0)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_proposals_save_forwards_and_change_nothing(
    tokenizer: Any, grammar: ToolGrammar, text: str, share: float, temperature: float
) -> None:
    """A call in the usual spelling takes far fewer forwards, one in another spelling no more than without a drafter."""
    wanted = Writing([5, 6], tokenizer.encode(text, add_special_tokens=False))
    free = complete(Engine(TableSession(wanted), tokenizer), [5, 6], options(None, temperature))
    plain = Engine(TableSession(wanted), tokenizer)
    ahead = Engine(TableSession(wanted), tokenizer, drafter=GrammarDrafter(), length=FixedLength(7))
    for engine in (plain, ahead):
        answer = complete(engine, [5, 6], options(grammar, temperature))
        assert answer.text == free.text == text and answer.tokens == free.tokens
    assert ahead.statistics.forwards <= share * plain.statistics.forwards


def test_where_models_are_led_astray_proposals_still_change_nothing(tokenizer: Any, grammar: ToolGrammar) -> None:
    for seed in range(5):
        plain, ahead = (
            Engine(worker(seed=seed), tokenizer),
            Engine(worker(seed=seed), tokenizer, drafter=GrammarDrafter(), length=FixedLength(7)),
        )
        asked = options(grammar, 0.0)
        assert complete(ahead, [5, 6], asked).tokens == complete(plain, [5, 6], asked).tokens


def test_proposals_follow_the_answer_back_and_forth(tokenizer: Any, grammar: ToolGrammar) -> None:
    """After a rollback to the usual spelling the schema's next argument is proposed again."""
    matcher = grammar.matcher()
    start = tokenizer.encode('<tool_call>\n{"name": "get_weather", "arguments": {', add_special_tokens=False)
    for token in start:
        matcher.consume(token)
    proposed = matcher.likely()
    assert '"city": "'.startswith(tokenizer.decode(proposed)) and proposed
    away = tokenizer.encode('"days":', add_special_tokens=False)
    for token in away:
        matcher.consume(token)
    assert tokenizer.decode(matcher.likely()) == "", "any number may follow"
    matcher.rollback(len(away))
    assert matcher.likely() == proposed
    matcher.rollback(len(start))
    assert matcher.likely()[0] == start[0]


def test_every_drafter_keeps_to_the_grammar_and_greedy_stays_greedy(tokenizer: Any, grammar: ToolGrammar) -> None:
    for drafter in (
        ModelDrafter(worker(seed=9)),
        NgramDrafter(),
        FirstOf(GrammarDrafter(), NgramDrafter(), ModelDrafter(worker(seed=3))),
    ):
        for temperature in (0.0, 1.0):
            engine = Engine(worker(), tokenizer, drafter=drafter, length=FixedLength(4))
            answer = complete(engine, [5, 6], options(grammar, temperature))
            call_in(answer.text)
            if temperature == 0:
                plain = complete(Engine(worker(), tokenizer), [5, 6], options(grammar, 0.0))
                assert answer.tokens == plain.tokens


def test_batches_hold_rows_with_and_without_a_grammar(tokenizer: Any, grammar: ToolGrammar) -> None:
    requests = [
        Request((5, 6 + i), options(grammar, 0.7, i) if i % 2 else GenerateOptions(12), str(i)) for i in range(6)
    ]
    together = collect(Engine(worker(3), tokenizer).run(requests))
    for request in requests:
        alone = complete(Engine(worker(), tokenizer), request.prompt, request.options)
        assert together[request.name].tokens == alone.tokens


@pytest.mark.parametrize("tags_are_tokens", [True, False])
def test_text_is_free_until_the_tag(tmp_path: Path, tags_are_tokens: bool) -> None:
    tokenizer = make(tmp_path, tags_are_tokens=tags_are_tokens)
    matcher = ToolGrammar(tokenizer, TOOLS, VOCABULARY).matcher()
    good = 'so <b> it is <tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
    for token in tokenizer.encode(good, add_special_tokens=False):
        assert matcher.mask()[token] and matcher.accepts(token)
        matcher.consume(token)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert matcher.mask()[end]
    matcher = ToolGrammar(tokenizer, TOOLS, VOCABULARY).matcher()
    bad = 'so <tool_call>\n{"name": "go'
    outcomes = []
    for token in tokenizer.encode(bad, add_special_tokens=False):
        outcomes.append(matcher.accepts(token))
        if not outcomes[-1]:
            break
        matcher.consume(token)
    assert outcomes[-1] is False and all(outcomes[:-1])
    assert not matcher.mask()[end]
    matcher.rollback(2)
    assert matcher.mask().any()


def test_masks_cover_the_whole_head(grammar: ToolGrammar, tokenizer: Any) -> None:
    mask = grammar.matcher().mask()
    assert mask.shape == (VOCABULARY,) and mask.dtype == np.bool_
    assert np.flatnonzero(mask).tolist() == [tokenizer.convert_tokens_to_ids("<tool_call>")]


def test_white_space_is_read_from_the_template(tmp_path: Path) -> None:
    assert call_layout(make(tmp_path / "a"), "").before == "\n"
    tight = TEMPLATE.replace("<tool_call>\\n", "<tool_call>").replace("\\n</tool_call>", "</tool_call>")
    tight = tight.replace("<tool_call>\n", "<tool_call>").replace("\n</tool_call>", "</tool_call>")
    tight = tight.replace("| tojson", "| tojson(separators=(',', ':'))")
    layout = call_layout(make(tmp_path / "b", template=tight), "\n")
    assert (layout.before, layout.after, layout.item, layout.key) == ("", "", ",", ":")


def test_what_cannot_be_enforced_is_refused(tokenizer: Any, stories: Any) -> None:
    bad = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}}
    with pytest.raises(UserError, match="these tools cannot be enforced"):
        ToolGrammar(tokenizer, [bad], VOCABULARY)
    with pytest.raises(UserError, match="need at least one tool"):
        ToolGrammar(tokenizer, [], VOCABULARY)
    with pytest.raises(UserError, match="no grammar for the tool dialect None"):
        ToolGrammar(stories[1], TOOLS, 512)


def test_function_tags_are_enforced_too(tmp_path: Path) -> None:
    tokenizer = make(tmp_path)
    tokenizer.init_kwargs["tool_parser_type"] = "qwen3_coder"
    grammar = ToolGrammar(tokenizer, TOOLS, VOCABULARY, mode="required")
    for seed in range(8):
        asked = options(grammar, 1.0, seed)
        answer = complete(Engine(worker(), tokenizer), [5, 6], GenerateOptions(400, asked.sampling, constraint=grammar))
        if answer.finish != "tool_call":
            continue  # a random model may never close a free string
        body = answer.text.removeprefix("<tool_call>").removesuffix("</tool_call>").strip()
        name = body.partition(">")[0].removeprefix("<function=")
        assert name in ("get_weather", "stop") and body.endswith("</function>")
        assert ("<parameter=days>\n" in body) == (name == "get_weather")


def test_prompts_render_once(tokenizer: Any) -> None:
    prompts = Prompts(tokenizer)
    messages = [{"role": "user", "content": "hi"}]
    first = prompts.chat(messages)
    assert prompts.chat([dict(messages[0])]) == first and prompts.hits == 1
    assert tokenizer.decode(list(first)) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert prompts.chat([{"role": "user", "content": "ho"}]) != first
