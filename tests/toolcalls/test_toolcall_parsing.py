"""Finding calls in text: every format of mlx-lm, at the character that completes them."""

from __future__ import annotations

import pytest
from call_texts import NOW, TEXTS, TOOLS, WEATHER, one, two
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxkd import compat, registry
from mlxkd.errors import UserError
from mlxkd.evaluation.toolcalls import formats
from mlxkd.evaluation.toolcalls.parsing import Cursor, Found, parser_named

FORMATS = registry.listing(formats)


def as_dicts(found: list[Found]) -> list[dict]:
    return [{"name": c.name, "arguments": c.arguments} for f in found for c in f.calls]


def test_there_is_a_grammar_for_every_parser_of_mlx_lm() -> None:
    assert compat.tool_parser_names() == FORMATS
    assert set(TEXTS) == set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_reads_one_call_and_two_calls(name: str) -> None:
    parser = parser_named(name)
    assert as_dicts(parser.read(f"Let me see. {one(name)}", TOOLS)[0]) == [WEATHER]
    found, pending = parser.read(f"{two(name)} and then", TOOLS)
    assert as_dicts(found) == [WEATHER, NOW]
    assert pending is None
    assert not any(f.fault for f in found)
    assert parser.read("Nothing to call here.", TOOLS) == ([], None)


@pytest.mark.parametrize("name", FORMATS)
def test_the_call_completes_at_its_last_character_and_not_before(name: str) -> None:
    parser, text = parser_named(name), "hm: " + one(name)
    closes = parser.read(text, TOOLS)[0][0].end
    cursor = Cursor(parser, TOOLS)
    completed = [i + 1 for i, char in enumerate(text) if cursor.feed(char)]
    assert completed == [closes]
    # A call of a shared block is complete before the block closes; any other at the very end of the text.
    assert text[closes:] == (
        TEXTS[name][4] if parser.grammar.final != parser.grammar.close and parser.grammar.close else ""
    )
    assert parser.read(text[: closes - 1], TOOLS) == ([], 4)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_chunks_of_any_size_find_the_same_calls(name: str, data: st.DataObject) -> None:
    text = "Thinking { aloud ] <t " + two(name) + " done"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    cursor = Cursor(parser_named(name), TOOLS)
    found: list[Found] = []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        found += cursor.feed(text[start:end])
    assert found == parser_named(name).read(text, TOOLS)[0]
    assert cursor.opened == len("Thinking { aloud ] <t ")


@pytest.mark.parametrize("name", FORMATS)
def test_pieces_say_what_every_character_is(name: str) -> None:
    text = "é " + two(name)
    found = parser_named(name).read(text, TOOLS)[0]
    pieces = [p for f in found for p in f.pieces]
    words = {kind: [text[p.start : p.end] for p in pieces if p.kind == kind] for kind in ("name", "key", "value")}
    assert words == {"name": ["get_weather", "now"], "key": ["city", "days"], "value": ["São Paulo", "3"]}
    assert [p.path for p in pieces if p.kind == "value"] == [("city",), ("days",)]
    for item in found:
        assert item.pieces[0].start == item.start and item.pieces[-1].end == item.end
        assert all(a.end == b.start for a, b in zip(item.pieces, item.pieces[1:], strict=False))


NESTED = {"a": {"b": [1, {"c": "x"}], "d": None}, "e": "q\"]}' </tool_call>"}
NESTED_TEXTS = {
    "json_tools": r'<tool_call>{"arguments":{"a":{"b":[1,{"c":"x"}],"d":null},"e":"q\"]}' + "' </tool_call>"
    r'"},"name":"f"}</tool_call>',
    "mistral": r'[TOOL_CALLS][{"name":"f","arguments":{"a":{"b":[1,{"c":"x"}],"d":null},"e":"q\"]}'
    + "' </tool_call>\"}}]",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>"
    r'{"a":{"b":[1,{"c":"x"}],"d":null},"e":"q\"]}' + "' </tool_call>\"}<|tool_call_end|>",
    "pythonic": r"""<|tool_call_start|>[f(a={"b":[1,{"c":"x"}],"d":null}, e="q\"]}' </tool_call>")]<|tool_call_end|>""",
    "gemma4": '<|tool_call>call:f{a:{b:[1,{c:<|"|>x<|"|>}],d:null},e:<|"|>q"]}\' </tool_call><|"|>}<tool_call|>',
}


@pytest.mark.parametrize("name", NESTED_TEXTS)
def test_nested_arguments_and_markers_inside_strings(name: str) -> None:
    text = NESTED_TEXTS[name]
    cursor = Cursor(parser_named(name))
    found = [f for char in text for f in cursor.feed(char)]
    assert as_dicts(found) == [{"name": "f", "arguments": NESTED}]
    paths = [p.path for p in found[0].pieces if p.kind == "value"]
    assert paths == [("a", "b", 0), ("a", "b", 1, "c"), ("a", "d"), ("e",)]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("<tool_call>[1, 2]</tool_call>", "no object with a name and arguments"),
        ('<tool_call>{"name": "f", "arguments": {"a": }}</tool_call>', "unreadable: Expecting value"),
        ('<tool_call>{"name": 3, "arguments": {}}</tool_call>', "no object with a name"),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "no object with a name"),
        ('<tool_call>{"name": "f", "arguments": {}} x</tool_call>', "unreadable: Extra data"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "unreadable"),
    ],
)
def test_broken_calls_are_found_with_their_fault(text: str, fault: str) -> None:
    found, pending = parser_named("json_tools").read(text + " later " + one("json_tools"), TOOLS)
    assert pending is None
    assert found[0].calls == () and (found[0].fault or "").startswith(fault)
    assert as_dicts(found[1:]) == [WEATHER]


def test_an_unknown_format_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'json_tools'"):
        parser_named("json_tool")
