"""Anything in the place of anything: data files are read, or refused with file and line, and never crash the reader."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from call_texts import TOOLS

from mlxkd.data.records import load_records
from mlxkd.errors import UserError
from mlxkd.evaluation.toolcalls.bfcl import reader

CALL = {"type": "function", "id": "a", "function": {"name": "now", "arguments": {"zone": ["x", 1]}}}
RECORD = {
    "messages": [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"time": 3}', "name": "now"},
        {"role": "assistant", "content": "It is 3."},
    ],
    "tools": TOOLS,
}
FUNCTION = {
    "name": "f",
    "description": "Does.",
    "parameters": {
        "type": "dict",
        "properties": {"a": {"type": "array", "items": {"type": "float"}}, "b": {"type": "any", "description": "b"}},
        "required": ["a"],
    },
}
CASE = {"id": "c0", "question": [[{"role": "user", "content": "do"}]], "function": [FUNCTION]}
ANSWER = {"id": "c0", "ground_truth": [{"f": {"a": [[1.0]], "b": ["", "x"]}}]}
OTHERS: list[Any] = [None, True, 3, -1.5, "", "x", [], {}, [1], {"a": 1}, [[]], [{}], "object"]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything inside a JSON value, itself included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, item in inner for p in places(item, (*path, key)))]


def damaged(value: Any, random: Random) -> Any:
    """The value with one place replaced or removed."""
    made = copy.deepcopy(value)
    path = random.choice(places(made)[1:])
    holder = made
    for key in path[:-1]:
        holder = holder[key]
    if random.random() < 0.25:
        del holder[path[-1]]
    else:
        holder[path[-1]] = random.choice(OTHERS)
    return made


def test_damaged_conversations_are_refused_with_file_line_and_field(tmp_path: Path) -> None:
    random, refused = Random(1), 0
    path = tmp_path / "d.jsonl"
    for _ in range(600):
        path.write_text(json.dumps(RECORD) + "\n" + json.dumps(damaged(RECORD, random)) + "\n")
        try:
            load_records(path)
        except UserError as error:
            refused += 1
            assert f"{path}:2" in str(error), error
            assert "messages" in str(error) or "tools" in str(error) or "no known shape" in str(error), error
    assert refused > 150


@pytest.mark.parametrize("category", ["simple_python", "simple_java"])
@pytest.mark.parametrize("part", ["case", "answer"])
def test_damaged_leaderboard_files_are_refused_with_file_and_line(category: str, part: str, tmp_path: Path) -> None:
    random, refused = Random(2), 0
    text = json.dumps({"case": CASE, "answer": ANSWER}[part])
    case = text.replace('"array"', '"ArrayList"') if category == "simple_java" else text
    good = json.dumps(CASE).replace('"array"', '"ArrayList"') if category == "simple_java" else json.dumps(CASE)
    for _ in range(400):
        bad = json.dumps(damaged(json.loads(case), random))
        cases, answers = (bad, json.dumps(ANSWER)) if part == "case" else (good, bad)
        (tmp_path / f"BFCL_v4_{category}.json").write_text(cases + "\n")
        (tmp_path / f"possible_answer_{category}.json").write_text(answers + "\n")
        try:
            for item in reader.load_cases(tmp_path, category):
                reader.gold_calls(item)
        except UserError as error:
            refused += 1
            assert ".json:1" in str(error), error
    assert refused > 40
