"""Spans: byte-exact in the text, and carried to tokens wherever the tokenizer cuts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_tokenizer import CHATML, tokenizer_folder

from mlxkd import compat
from mlxkd.data.example import Example, Span
from mlxkd.data.records import Record
from mlxkd.data.render import RenderOptions, render
from mlxkd.data.spans import Required, weighted
from mlxkd.errors import UserError

TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}
ARGUMENTS = {"city": "São Paulo", "days": [3, {"part": "日中"}]}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}}
CHAT = (
    {"role": "user", "content": "weather in São Paulo"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"sky": "azul 🙂", "degrees": 31}'},
    {"role": "assistant", "content": "It is azul 🙂 and 31 degrees, not 310."},
)
RECORD = Record("messages", messages=CHAT, tools=(TOOL,))
HEAD = "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{%- for c in m.tool_calls or [] %}"
FOOT = "{%- endfor %}<|im_end|>\n{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# Each format's own way to write a call, in a template from which mlx-lm infers its parser.
TEMPLATES = {
    "json_tools": CHATML,
    "qwen3_coder": HEAD
    + "<tool_call>\n<function={{ c.function.name }}>\n{% for k, v in c.function.arguments.items() %}"
    "<parameter={{ k }}>\n{{ v if v is string else v | tojson }}\n</parameter>\n{% endfor %}</function>\n</tool_call>"
    + FOOT,
    "glm47": HEAD
    + "<tool_call>{{ c.function.name }}{% for k, v in c.function.arguments.items() %}<arg_key>{{ k }}</arg_key>"
    "<arg_value>{{ v if v is string else v | tojson }}</arg_value>{% endfor %}</tool_call>" + FOOT,
    "mistral": HEAD + "[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}" + FOOT,
    "kimi_k2": HEAD
    + "<|tool_calls_section_begin|><|tool_call_begin|>functions.{{ c.function.name }}:0<|tool_call_argument_begin|>"
    "{{ c.function.arguments | tojson }}<|tool_call_end|><|tool_calls_section_end|>" + FOOT,
    "pythonic": HEAD + "<|tool_call_start|>[{{ c.function.name }}({% for k, v in c.function.arguments.items() %}"
    "{{ k }}={{ v | tojson }}{{ '' if loop.last else ', ' }}{% endfor %})]<|tool_call_end|>" + FOOT,
}
EXPECTED = {"name": ["get_weather"], "value": ["São Paulo", "3", "日中"], "evidence": ["azul 🙂", "31"]}


def texts(example: Example, tokenizer: Any, kind: str) -> list[str]:
    return [tokenizer.decode(example.tokens[s.start : s.end]) for s in example.spans if s.kind == kind]


def build(folder: Path, template: str, corpus: list[str] | None = None) -> Any:
    return compat.load_tokenizer(tokenizer_folder(folder, template, corpus=corpus or ["é"]))


@pytest.mark.parametrize("name", TEMPLATES)
def test_spans_are_exact_where_the_tokenizer_cuts_at_bytes(tmp_path: Path, name: str) -> None:
    tokenizer = build(tmp_path, TEMPLATES[name])
    assert compat.tool_format(tokenizer) == name
    example = render(RECORD, tokenizer)
    found = {kind: texts(example, tokenizer, kind) for kind in EXPECTED}
    if name in ("qwen3_coder", "glm47"):  # an argument is one raw text there, whatever it holds
        assert found.pop("value") == ["São Paulo", '[3, {"part": "日中"}]']
        assert found == {k: v for k, v in EXPECTED.items() if k != "value"}
    else:
        assert found == EXPECTED
        assert texts(example, tokenizer, "key") == ["city", "days", "part"]
    assert texts(example, tokenizer, "stop") == ["<|im_end|>", "<|im_end|>"]
    call = example.meta["calls"][0]
    inside = [s for s in example.spans if s.kind in ("name", "key", "value", "structure", "end")]
    assert (min(s.start for s in inside), max(s.end for s in inside)) == call
    assert example.meta["calls"][1] is None
    assert example.meta["required"] == [Required(("get_weather",)), Required((), tuple(EXPECTED["evidence"]))]


@pytest.mark.parametrize("name", TEMPLATES)
def test_spans_survive_tokens_that_cross_their_borders(tmp_path: Path, name: str) -> None:
    """Merges trained on the rendering itself glue quotes, keys and values together."""
    plain = build(tmp_path / "a", TEMPLATES[name])
    rendered = plain.apply_chat_template(list(CHAT), tools=[TOOL], tokenize=False)
    glued = build(tmp_path / "b", TEMPLATES[name], [rendered] * 3)
    example = render(RECORD, glued)
    assert len(example) < 0.7 * len(render(RECORD, plain)), "the tokenizer must really glue"
    assert glued.decode(example.tokens) == rendered
    offsets = glued._tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    for kind, words in EXPECTED.items():
        if kind == "value" and name in ("qwen3_coder", "glm47"):
            continue
        spans = sorted((s for s in example.spans if s.kind == kind), key=lambda s: (s.start, s.end))
        assert len(spans) == len(words)
        for span, word in zip(spans, words, strict=True):
            start, end = offsets[span.start][0], offsets[span.end - 1][1]
            assert word in rendered[start:end]
            # No token at either end could be left out.
            assert word not in rendered[offsets[span.start][1] : end]
            assert word not in rendered[start : offsets[span.end - 1][0]]


def test_weights_follow_the_spans(tmp_path: Path) -> None:
    tokenizer = build(tmp_path, CHATML)
    plain = render(RECORD, tokenizer)
    heavy = render(RECORD, tokenizer, RenderOptions(weights={"name": 3.0, "evidence": 2.0, "structure": 0.5}))
    ratio = heavy.weights[plain.weights > 0]
    assert set(ratio.tolist()) == {0.5, 1.0, 2.0, 3.0}
    assert np.array_equal(heavy.weights == 0, plain.weights == 0)
    for span in heavy.spans:
        if span.kind == "name":
            assert (heavy.weights[span.start : span.end] == 3).all()


def test_a_token_of_two_kinds_takes_the_larger_factor() -> None:
    weights = np.array([0, 1, 1, 1, 1], np.float32)
    spans = [Span(1, 3, "name"), Span(2, 4, "structure")]
    assert weighted(weights, spans, {"name": 2.0, "structure": 0.5}).tolist() == [0, 2, 2, 0.5, 1]
    with pytest.raises(UserError, match="unknown span kind 'nam'"):
        weighted(weights, spans, {"nam": 1.0})


def test_weights_on_calls_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    template = CHATML.replace('"name":', '"tool":')
    tokenizer = build(tmp_path, template)
    assert not [s for s in render(RECORD, tokenizer).spans if s.kind == "name"]
    record = Record("messages", messages=CHAT, tools=(TOOL,), source="d.jsonl:9")
    with pytest.raises(UserError, match=r"d.jsonl:9: the template's tool calls cannot be read as 'json_tools'"):
        render(record, tokenizer, RenderOptions(weights={"name": 2.0}))


def test_the_arguments_in_the_example_round_trip(tmp_path: Path) -> None:
    tokenizer = build(tmp_path, CHATML)
    example = render(RECORD, tokenizer)
    start, end = example.meta["calls"][0]
    text = tokenizer.decode(example.tokens[start:end])
    assert json.loads(text.removeprefix("<tool_call>").removesuffix("</tool_call>"))["arguments"] == ARGUMENTS


def test_thinking_aloud_before_a_call_is_a_preamble(tmp_path: Path) -> None:
    tokenizer = build(tmp_path, CHATML)
    aloud = {**CHAT[1], "content": "Let me look. "}
    example = render(Record("messages", messages=(CHAT[0], aloud, *CHAT[2:]), tools=(TOOL,)), tokenizer)
    assert texts(example, tokenizer, "preamble") == ["Let me look. "]
    assert not [s for s in render(RECORD, tokenizer).spans if s.kind == "preamble"]


def test_direct_calls_lose_the_text_before_them(tmp_path: Path) -> None:
    tokenizer = build(tmp_path, CHATML)
    aloud = {**CHAT[1], "content": "Let me look. "}
    records = [
        Record("messages", messages=(CHAT[0], aloud, *CHAT[2:]), tools=(TOOL,), source=f"d.jsonl:{i}")
        for i in range(200)
    ]

    def hesitating(share: float) -> int:
        made = [render(r, tokenizer, RenderOptions(direct_calls=share)) for r in records]
        return sum(any(s.kind == "preamble" for s in example.spans) for example in made)

    assert (hesitating(0.0), hesitating(1.0)) == (200, 0)
    assert 60 < hesitating(0.5) < 140
    with pytest.raises(UserError, match="direct_calls is a share, not 2"):
        RenderOptions(direct_calls=2)
