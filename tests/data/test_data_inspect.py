"""`data inspect`: colours, counts and faults."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console
from toy_tokenizer import CHATML, tokenizer_folder

from mlxkd import compat
from mlxkd.data.inspect import CONTEXT, STYLES, coloured, inspect, inspect_command, parse_shape, show
from mlxkd.data.spans import KINDS
from mlxkd.errors import UserError

CALL = {"name": "get_weather", "arguments": {"city": "Oslo"}}
GOOD = {
    "messages": [
        {"role": "user", "content": "weather in Oslo"},
        {"role": "assistant", "content": "Well. ", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"degrees": 7}'},
        {"role": "assistant", "content": "It is 7."},
    ],
    "tools": [{"name": "get_weather"}],
}
LONG = {"messages": [{"role": "user", "content": "hm"}, {"role": "assistant", "content": "long " * 50}]}
MUTE = {"messages": [{"role": "user", "content": "hm"}]}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "d.jsonl"
    file.write_text("\n".join(json.dumps(r) for r in (GOOD, LONG, MUTE)))
    return file


def test_figures_and_colours(tmp_path: Path, data: Path) -> None:
    tokenizer = compat.load_tokenizer(tokenizer_folder(tmp_path / "tok", CHATML, corpus=["é"]))
    found = inspect(data, tokenizer, [(2, 240)])
    assert found.report is not None
    assert found.report.truncated == 1 and found.report.skipped == {"no supervised token": 1}
    assert set(STYLES) == set(KINDS)
    text = coloured(found.examples[0], tokenizer)
    styled = {str(span.style): text.plain[span.start : span.end] for span in text.spans}
    assert styled[STYLES["name"]] == "get_weather" and styled[STYLES["value"]] == "Oslo"
    assert styled[STYLES["evidence"]] == "7" and styled[STYLES["preamble"]] == "Well. "
    assert text.plain == tokenizer.decode(found.examples[0].tokens.tolist())
    assert str(text.spans[0].style) == CONTEXT
    console = Console(file=io.StringIO(), width=100)
    show(found, tokenizer, console)
    printed = console.file.getvalue()
    assert "1 examples truncated" in printed and "in evidence" in printed and "d.jsonl:1" in printed


def test_the_command_fails_when_a_record_cannot_be_rendered(tmp_path: Path, data: Path) -> None:
    picky = "{%- if messages|length > 3 %}{{ raise_exception('too long') }}{% endif %}" + CHATML
    folder = tokenizer_folder(tmp_path / "tok", picky)
    result = CliRunner().invoke(inspect_command, [str(data), "--model", str(folder), "--shape", "2x512"])
    assert result.exit_code == 1
    assert "cannot be rendered" in result.output and "too long" in result.output


def test_shapes_are_checked() -> None:
    assert parse_shape("8x512") == (8, 512)
    with pytest.raises(UserError, match="a shape looks like 8x512, not '8by512'"):
        parse_shape("8by512")
