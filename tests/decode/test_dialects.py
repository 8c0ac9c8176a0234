"""Grammars of every tool dialect: mlx-lm's own parsers and JSON Schema judge what random models write under them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from call_texts import NOW, TEXTS, WEATHER
from call_texts import TOOLS as CALL_TOOLS
from call_writers import WRITERS, arguments
from table_session import Table, TableSession
from tool_tokenizer import TEMPLATE, make

from mlxkd import compat
from mlxkd.decode.constrained import ToolGrammar
from mlxkd.decode.dialects import DIALECTS
from mlxkd.decode.engine import Engine
from mlxkd.decode.generate import complete
from mlxkd.decode.requests import GenerateOptions
from mlxkd.decode.sampling import SamplingOptions
from mlxkd.errors import UserError
from mlxkd.evaluation.toolcalls import schema
from mlxkd.evaluation.toolcalls.parsing import parser_named

VOCABULARY = 330
PLAIN = TEMPLATE[: TEMPLATE.index("{% for tool_call")] + TEMPLATE[TEMPLATE.index("<|im_end|>") :]
UNIT = {"type": "string", "enum": ["celsius", "kelvin"]}
CITY = {"type": "string", "minLength": 1, "maxLength": 6}


def tool(name: str, properties: dict[str, Any], *required: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


FLAT = [
    tool("get_weather", {"city": CITY, "unit": UNIT, "days": {"type": "integer", "minimum": 1, "maximum": 9}}, "city"),
    tool("stop", {}),
    tool("log", {"level": {"type": "integer", "enum": [1, 2]}, "loud": {"type": "boolean"}}),
]
STOP = {
    "type": "object",
    "properties": {"city": CITY, "nights": {"type": "integer", "minimum": 0, "maximum": 20}},
    "required": ["city"],
}
NESTED = [
    *FLAT,
    tool(
        "plan",
        {
            "stops": {"type": "array", "items": STOP, "maxItems": 2},
            "tags": {"type": "array", "items": {"type": "string", "enum": ["a", "b"]}, "minItems": 1, "maxItems": 3},
        },
        "stops",
        "tags",
    ),
]
MARKERS = {
    "kimi_k2": ["<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>",
                "<|tool_call_argument_begin|>", "<|tool_call_end|>"],
    "kimi_k3": ["<|open|>", "<|close|>", "<|sep|>"],
    "gemma4": ["<|tool_call>", "<tool_call|>", '<|"|>'],
    "function_gemma": ["<start_function_call>", "<end_function_call>", "<escape>"],
    "mistral": ["[TOOL_CALLS]", "[ARGS]"],
    "pythonic": ["<|tool_call_start|>", "<|tool_call_end|>"],
    "glm47": ["<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"],
}  # fmt: skip


# Strings that Muse Spark's parser would read as numbers and the like stand as JSON.
QUOTED = tool("choose", {"code": {"type": "string", "enum": ["null", "3", "x"]}, "free": CITY}, "code", "free")


def tools_of(dialect: str) -> list[dict[str, Any]]:
    # mlx-lm's parser of FunctionGemma reads neither lists nor objects.
    return {"function_gemma": FLAT, "muse_spark": [*NESTED, QUOTED]}.get(dialect, NESTED)


def tokenizer_of(folder: Path, dialect: str, special: bool) -> Any:
    """Markers as special tokens, as their models have them, or as plain text."""
    template = TEMPLATE if dialect == "json_tools" else PLAIN
    tokenizer = make(folder, parser=dialect, tags_are_tokens=False, template=template)
    if special:
        tokenizer._tokenizer.add_special_tokens({"additional_special_tokens": MARKERS[dialect]})
    return tokenizer


VARIANTS = [(name, special) for name in sorted(DIALECTS) for special in (False, True) if not special or name in MARKERS]


def test_there_is_a_dialect_for_every_parser_of_mlx_lm() -> None:
    assert tuple(sorted(DIALECTS)) == compat.tool_parser_names()


@pytest.mark.parametrize(("dialect", "special"), VARIANTS)
def test_random_models_write_calls_that_the_parser_reads_and_the_schema_accepts(
    dialect: str, special: bool, tmp_path: Path
) -> None:
    tokenizer, tools = tokenizer_of(tmp_path, dialect, special), tools_of(dialect)
    grammar = ToolGrammar(tokenizer, tools, VOCABULARY, mode="required")
    parser, names = parser_named(dialect), set()
    for seed in range(16):
        asked = GenerateOptions(400, SamplingOptions(temperature=1.0, seed=seed), constraint=grammar)
        session = TableSession(Table(VOCABULARY, seed=seed, order=2, spread=3.0), 1)
        text = _with_markers(complete(Engine(session, tokenizer), [5, 6], asked).tokens, tokenizer)
        found, _ = parser.read(text, tools)
        for item in found:
            assert item.fault is None, (item.fault, text)
            for call in item.calls:
                assert schema.fault(call, tools) is None, (call, text)
                names.add(call.name)
    assert len(names) >= 2, "a random model seldom closes a list, but it calls more than one tool"


def _with_markers(tokens: Any, tokenizer: Any) -> str:
    return str(tokenizer._tokenizer.decode(list(tokens), skip_special_tokens=False)).removesuffix("<|im_end|>")


@pytest.mark.parametrize(("dialect", "special"), VARIANTS)
def test_what_models_write_unconstrained_is_never_changed(dialect: str, special: bool, tmp_path: Path) -> None:
    """Hand-written calls of every format, free text around them: each token is among those that the mask leaves."""
    tokenizer = tokenizer_of(tmp_path, dialect, special)
    opening, weather, now, between, closing = TEXTS[dialect]
    tools = CALL_TOOLS
    if dialect == "function_gemma":
        described = CALL_TOOLS[0]["function"]["parameters"]["properties"]
        tools = [tool("get_weather", {k: v for k, v in described.items() if k != "parts"}, "city"), CALL_TOOLS[1]]
    grammar = ToolGrammar(tokenizer, tools, VOCABULARY)
    for written, expected in [(weather, [WEATHER]), (weather + between + now, [WEATHER, NOW])]:
        call = opening + written + closing
        text = call if dialect in ("pythonic", "mistral") else f"Let me see < {call}"
        assert read(text, dialect, tools) == expected
        assert refused(text, tokenizer, grammar) is None


def read(text: str, dialect: str, tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What mlx-lm's parser makes of a text."""
    found, _ = parser_named(dialect).read(text, tools)
    return [{"name": call.name, "arguments": call.arguments} for item in found for call in item.calls]


def refused(text: str, tokenizer: Any, grammar: ToolGrammar) -> str | None:
    """Where the mask would have changed an answer; None where each of its tokens and its end are allowed."""
    matcher = grammar.matcher()
    for at, token in enumerate(ids := tokenizer.encode(text, add_special_tokens=False)):
        if not matcher.mask()[token]:
            return f"{tokenizer.decode(ids[:at])} | {tokenizer.decode([token])}"
        matcher.consume(token)
    return None if matcher.mask()[tokenizer.eos_token_id] else f"{text} | the end"


PLACE = {
    "type": "object",
    "properties": {"x": {"type": "number"}, "y": {"type": "number"}, "label": {"type": "string"}},
    "required": ["x"],
}
OPEN = tool("place", {"at": PLACE, "free": {"type": "string"}, "when": {"anyOf": [{"type": "integer"}, PLACE]}}, "at")


@pytest.mark.parametrize(("dialect", "special"), VARIANTS)
def test_valid_calls_in_any_spelling_are_never_changed(dialect: str, special: bool, tmp_path: Path) -> None:
    """Arguments in any order, JSON spaced and escaped in many ways: what mlx-lm's parser reads as the call
    that was meant and JSON Schema accepts must pass the mask."""
    tokenizer = tokenizer_of(tmp_path, dialect, special)
    tools = tools_of(dialect) if dialect in ("function_gemma", "gemma4") else [*tools_of(dialect), OPEN]
    grammar, rng, valid = ToolGrammar(tokenizer, tools, VOCABULARY), random.Random(dialect), 0
    for _ in range(30):
        function = rng.choice(tools)["function"]
        meant = {"name": function["name"], "arguments": arguments(function["parameters"], rng)}
        text = WRITERS[dialect](meant["name"], meant["arguments"], rng)
        jsonschema.validate(meant["arguments"], function["parameters"])
        if read(text, dialect, tools) != [meant]:
            continue  # some parsers misread some strings, such as one that is "null"
        valid += 1
        assert refused(text, tokenizer, grammar) is None
    assert valid > 20


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "get_weather", "arguments": {"days": 3}}',  # a required argument is absent
        '{"name": "get_weather", "arguments": {"city": "Oslo", "city": "Oslo"}}',  # twice
        '{"name": "get_weather", "arguments": {"days": 3, "city": "Oslo", "hour": 1}}',  # not declared
        '{"name": "get_weather", "arguments": {"unit": "rankine", "city": "Oslo"}}',
        '{"arguments": {}, "name": "get_weather"}',  # the arguments are another tool's
        '{"arguments": {"city": "Oslo"}}',
        '{"name": "get_weather", "arguments": {"city": "Trondheim"}}',  # too long
        '{"name": "plan", "arguments": {"tags": ["a"], "stops": [{"nights": 1}]}}',
        '{"name": "get_weather", "arguments": {"city": "\\ud800"}}',  # half of a character
    ],
)
def test_no_order_excuses_an_invalid_call(text: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, "json_tools", special=False)
    assert refused(f"<tool_call>\n{text}\n</tool_call>", tokenizer, ToolGrammar(tokenizer, NESTED, VOCABULARY))


@pytest.mark.parametrize(
    ("dialect", "properties", "said"),
    [
        ("glm47", {"when": {"type": "string", "format": "date"}}, "'format' of a string cannot be enforced"),
        ("minimax_m2", {"when": {"type": "string", "pattern": "a+"}}, "'pattern' of a string cannot be enforced"),
        (
            "minimax_m2",
            {"when": {"type": "string", "enum": ["now", "null"]}},
            "reads the choice 'null' as something else",
        ),
        ("gemma4", {"when": {"anyOf": [{"type": "string"}]}}, "a value of type None cannot be enforced"),
        ("function_gemma", {"when": {"type": "array", "items": {"type": "string"}}}, "type 'array' cannot be enforced"),
        ("json_tools", {"when": {"not": {"type": "string"}}}, "these tools cannot be enforced"),
    ],
)
def test_what_cannot_be_enforced_is_refused_with_its_place(
    dialect: str, properties: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said) as caught:
        ToolGrammar(make(tmp_path, parser=dialect), [tool("f", properties)], VOCABULARY)
    assert dialect == "json_tools" or caught.value.where == "f.when"


def test_lengths_hold_where_strings_stand_raw(tmp_path: Path) -> None:
    """Raw strings once ignored minLength and maxLength."""
    tokenizer = tokenizer_of(tmp_path, "glm47", special=False)
    for city, fits in [("Oslo", True), ("", False), ("Trondheim", False)]:
        matcher = ToolGrammar(tokenizer, FLAT, VOCABULARY).matcher()
        text = f"<tool_call>get_weather<arg_key>city</arg_key><arg_value>{city}</arg_value></tool_call>"
        outcome = True
        for token in tokenizer.encode(text, add_special_tokens=False):
            outcome = outcome and matcher.accepts(token)
            if outcome:
                matcher.consume(token)
        assert outcome == fits, city


def test_the_schemas_of_this_file_are_sound() -> None:
    for item in NESTED:
        jsonschema.Draft202012Validator.check_schema(item["function"]["parameters"])
