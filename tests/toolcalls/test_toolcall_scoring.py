"""Scoring against cases decided by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
from call_texts import NOW, TOOLS, WEATHER, one, two

from mlxkd.evaluation.toolcalls.parsing import parser_named
from mlxkd.evaluation.toolcalls.scoring import CallScore, aggregate, same_json, score


def answer(*calls: dict[str, Any], text: str = "") -> list[dict[str, Any]]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = [{"type": "function", "function": c} for c in calls]
    return [{"role": "user", "content": "?"}, message]


def judge(text: str, *wanted: dict[str, Any]) -> CallScore:
    return score(answer(*wanted), TOOLS, text, parser_named("json_tools"))


def write(*calls: dict[str, Any]) -> str:
    return "".join(f"<tool_call>{json.dumps(c)}</tool_call>" for c in calls)


def changed(**arguments: Any) -> dict[str, Any]:
    return {"name": "get_weather", "arguments": {**WEATHER["arguments"], **arguments}}


#                text                                            wanted       exact name  args  valid called
CASES = [
    (one("json_tools"), [WEATHER], True, True, True, True, True),
    ("Hm. " + one("json_tools") + "<|im_end|>", [WEATHER], True, True, True, True, True),
    (write(changed(days=3.0)), [WEATHER], True, True, True, True, True),
    (write(changed(days="3")), [WEATHER], False, True, False, False, True),
    (write(changed(days=4)), [WEATHER], False, True, False, True, True),
    (write(changed(extra=1)), [WEATHER], False, True, False, True, True),
    (write({"name": "get_weather", "arguments": {"days": 3}}), [WEATHER], False, True, False, False, True),
    (write({"name": "weather", "arguments": WEATHER["arguments"]}), [WEATHER], False, False, False, False, True),
    (write(WEATHER, WEATHER), [WEATHER], False, False, False, True, True),
    (two("json_tools"), [NOW, WEATHER], True, True, True, True, True),
    (write(WEATHER), [NOW, WEATHER], False, False, False, True, True),
    ("<tool_call>{broken</tool_call>" + write(WEATHER), [WEATHER], False, False, False, False, True),
    (write(WEATHER)[:-3], [WEATHER], False, False, False, False, True),
    ("I cannot.", [WEATHER], False, False, False, False, False),
    ("I cannot.", [], True, True, True, False, False),
    (write(NOW), [], False, False, False, True, True),
    ("<tool_call>{broken", [], False, False, False, False, True),
]


@pytest.mark.parametrize(("text", "wanted", "exact", "name", "arguments", "valid", "called"), CASES)
def test_hand_made_cases(
    text: str, wanted: list[dict], exact: bool, name: bool, arguments: bool, valid: bool, called: bool
) -> None:
    s = judge(text, *wanted)
    assert (s.exact, s.name_ok, s.arguments_ok, s.schema_valid, s.called) == (exact, name, arguments, valid, called)
    assert s.should_call == bool(wanted)


def test_a_truth_value_is_no_number() -> None:
    assert same_json({"a": [1, {"b": 2.0}]}, {"a": [1.0, {"b": 2}]})
    assert not same_json(1, True)
    assert not same_json(0.0, False)
    assert not same_json("1", 1)
    assert not same_json(None, "")


def test_aggregate_counts_each_share_over_its_own_answers() -> None:
    scores = [judge(text, *wanted) for text, wanted, *_ in CASES]
    figures = aggregate(scores, "test CPU")
    calls = [c for c in CASES if c[1]]
    assert figures["exact"].n == len(CASES)
    assert figures["exact_calls"].value == sum(c[2] for c in calls) / len(calls)
    assert figures["false_calls"].value == pytest.approx(2 / 3)
    assert figures["missed_calls"].value == 1 / len(calls)
    assert figures["several"].value == 0.5
    empty = aggregate([judge("no")], "test CPU")["exact_calls"]
    assert empty.value is None and empty.note == "no answer should call a tool"
