"""Reading data: the three shapes, and faults that name file, line and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlxkd.data.records import load_records
from mlxkd.errors import UserError

CALL = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def write(path: Path, *items: Any) -> Path:
    path.write_text("\n".join(item if isinstance(item, str) else json.dumps(item) for item in items))
    return path


def test_reads_the_three_shapes(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    file = write(
        tmp_path / "d.jsonl",
        {"text": "a\u2028b"},
        "",
        {"prompt": "p", "completion": "c"},
        {"messages": messages, "tools": [TOOL], "id": 7},
    )
    text, completion, chat = load_records(file)
    assert (text.kind, text.text, text.source) == ("text", "a\u2028b", f"{file}:1")
    assert (completion.prompt, completion.completion, completion.source) == ("p", "c", f"{file}:3")
    assert chat.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert chat.messages[1]["content"] == ""
    assert chat.extra == {"id": 7}
    assert chat.tools == (TOOL,)


def test_bare_tools_and_calls_are_wrapped(tmp_path: Path) -> None:
    call = {"name": "f", "arguments": {"a": [1]}}
    messages = [{"role": "assistant", "tool_calls": [call]}]
    record = load_records(write(tmp_path / "d.jsonl", {"messages": messages, "tools": [{"name": "f"}]}))[0]
    assert record.messages[0]["tool_calls"] == [{"type": "function", "function": call}]
    assert record.tools == ({"type": "function", "function": {"name": "f"}},)


def test_folders_arrays_text_and_limit(tmp_path: Path) -> None:
    write(tmp_path / "a.json", [{"text": "1"}, {"text": "2"}])
    (tmp_path / "b.txt").write_text("story\n\nmore\n")
    write(tmp_path / "c.jsonl", {"text": "3"})
    (tmp_path / "notes.md").write_text("not data")
    records = load_records(tmp_path)
    assert [r.text for r in records] == ["1", "2", "story\n\nmore", "3"]
    assert records[1].source == f"{tmp_path / 'a.json'}:[1]"
    assert len(load_records(tmp_path, limit=2)) == 2


def test_a_folder_in_the_layout_of_mlx_lm_keeps_its_splits_apart(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", {"text": "t"})
    write(tmp_path / "valid.jsonl", {"text": "v"})
    assert [r.text for r in load_records(tmp_path)] == ["t"]
    assert [r.text for r in load_records(tmp_path, split="valid")] == ["v"]
    with pytest.raises(UserError, match="no 'test' split"):
        load_records(tmp_path, split="test")


def bad_tool(parameters: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "x"}], "tools": [{"name": "f", "parameters": parameters}]}


def bad_call(**function: Any) -> dict[str, Any]:
    return {"messages": [{"role": "assistant", "tool_calls": [{"function": function}]}]}


FAULTS = [
    ('{"text": "cut', ":2: broken JSON at column 10"),
    ("[1, 2]", ":2: a record must be an object, not list"),
    ({"txt": "x"}, ":2: no known shape (keys: 'txt')"),
    ({"text": 3}, ":2: field 'text' must be a string, not int"),
    ({"prompt": "x"}, ":2: field 'completion' is missing"),
    ({"messages": []}, ":2: field 'messages' must be a list with at least one message"),
    ({"messages": [{"role": "asistant", "content": ""}]}, "messages[0].role: unknown role 'asistant'"),
    ({"messages": [{"role": "user"}]}, ":2: field 'messages[0]' has neither content nor tool_calls"),
    ({"messages": [{"role": "user", "content": 3}]}, ":2: field 'messages[0].content' must be"),
    (bad_call(name=1), ":2: field 'messages[0].tool_calls[0].function.name' must be a string, not int"),
    (bad_call(name="f", arguments="{1"), "tool_calls[0].function.arguments' is broken JSON"),
    (bad_call(name="f", arguments=[1]), "tool_calls[0].function.arguments' must be an object, not list"),
    (bad_tool({"type": "dict"}), ":2: field 'tools[0].parameters.type' is no JSON Schema: 'dict'"),
    (bad_tool({"properties": {"a": {"minimum": "x"}}}), "tools[0].parameters.properties.a.minimum' is no JSON Schema"),
    (bad_tool([]), ":2: field 'tools[0].parameters' must be an object, not list"),
    ({**bad_tool({}), "tools": [{"name": "f"}, {"name": "f"}]}, "two tools are called 'f'"),
]


@pytest.mark.parametrize(("line", "message"), FAULTS, ids=[m for _, m in FAULTS])
def test_faults_name_file_line_and_field(tmp_path: Path, line: Any, message: str) -> None:
    file = write(tmp_path / "d.jsonl", {"text": "fine"}, line)
    with pytest.raises(UserError) as caught:
        load_records(file)
    assert str(caught.value).startswith(f"{file}:2")
    assert message in str(caught.value)


def test_faults_of_files(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    (tmp_path / "x.csv").write_text("a,b")
    (tmp_path / "folder").mkdir()
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    for name, message in [
        ("empty.jsonl", "this file holds no records"),
        ("latin.jsonl", "latin.jsonl:2: this is not UTF-8 text"),
        ("x.csv", "cannot read .csv data"),
        ("folder", "this folder holds no data"),
        ("missing", "no such data file or folder"),
        ("deep.jsonl", "JSON nested too deeply"),
    ]:
        with pytest.raises(UserError, match=message):
            load_records(tmp_path / name)
