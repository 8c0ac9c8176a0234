"""BFCL: the leaderboard's own checker is the oracle; without it, cases decided by hand from its rules."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest

from mlxkd.data.fields import check_tools
from mlxkd.errors import UserError
from mlxkd.evaluation.toolcalls.bfcl import categories, literals, mutants, official, reader, rules
from mlxkd.evaluation.toolcalls.parsing import Call

FUNCTION = {
    "name": "book.table",
    "parameters": {
        "type": "dict",
        "properties": {
            "place": {"type": "string"},
            "people": {"type": "integer"},
            "tip": {"type": "float"},
            "dishes": {"type": "array", "items": {"type": "string"}},
            "seats": {"type": "array", "items": {"type": "dict"}},
            "options": {"type": "dict"},
            "vip": {"type": "boolean"},
        },
        "required": ["place", "people"],
    },
}
ANSWER = {
    "book.table": {
        "place": ["Chez Ana", "Ana's"],
        "people": [4],
        "tip": ["", 5],
        "dishes": ["", ["Soup of the day", "fish"]],
        "seats": ["", [{"row": [1], "side": ["left", ""]}]],
        "options": ["", {"terrace": [True], "note": ["by the sea", ""]}],
        "vip": ["", False],
    }
}
SCRAPS = [
    '"a"', "'b'", "1", "-2", "3.5", "4L", "5f", "6e2", "7n", "true", "x", '"y z"', "[1, 2]", "[[1,2],[3]]", '{"k": 1}',
    "{'k': [1, 2], 'm': x}", "new int[]{1,2}", 'new ArrayList<>(Arrays.asList("a", "b"))', "new HashMap<>()", "{}",
    "[]", "new ArrayList<Integer>() {{ add(1); add(x); }}", 'new HashMap<>() {{ put("a", 1); put("b", "x"); }}',
    "new Array(1, 2)", "new Array([1],[2, 3])", "new ArrayList<>()", ",", ", ", ":", "{", "}", "[", "]", "(", ")", " ",
]  # fmt: skip
GOOD = {"place": "chez  ANA", "people": 4}
#     arguments                                       accepted
CASES: list[tuple[dict[str, Any], bool]] = [
    (GOOD, True),
    ({**GOOD, "place": 'ana"s'}, True),
    ({**GOOD, "place": "Ana"}, False),
    ({"place": "Chez Ana"}, False),
    ({**GOOD, "people": "4"}, False),
    ({**GOOD, "people": 4.0}, False),
    ({**GOOD, "people": True}, False),
    ({**GOOD, "tip": 5}, True),
    ({**GOOD, "tip": 5.0}, True),
    ({**GOOD, "tip": 6}, False),
    ({**GOOD, "dishes": ["soup-of-the day", "FISH"]}, True),
    ({**GOOD, "dishes": ["fish", "soup of the day"]}, False),
    ({**GOOD, "dishes": ["fish", 1]}, False),
    ({**GOOD, "seats": [{"row": 1}]}, True),
    ({**GOOD, "seats": [{"row": 1, "side": "LEFT"}]}, True),
    ({**GOOD, "seats": [{"row": 2}]}, False),
    ({**GOOD, "seats": [{"row": 1}, {"row": 1}]}, False),
    ({**GOOD, "options": {"terrace": True}}, True),
    ({**GOOD, "options": {"note": "by the sea"}}, False),
    ({**GOOD, "options": {"terrace": True, "more": 1}}, False),
    ({**GOOD, "vip": False}, True),
    ({**GOOD, "vip": 0}, False),
    ({**GOOD, "colour": "red"}, False),
]


@pytest.mark.parametrize(("arguments", "accepted"), CASES)
def test_rules_by_hand(arguments: dict[str, Any], accepted: bool) -> None:
    reason = rules.fault("simple_python", [FUNCTION], [ANSWER], [Call("book.table", arguments)])
    assert (reason is None) == accepted, reason


def test_counts_names_and_order() -> None:
    good, other = Call("book.table", GOOD), {**FUNCTION, "name": "other"}
    answers = [ANSWER, {"other": ANSWER["book.table"]}]
    pair = [Call("other", GOOD), good]
    assert rules.fault("parallel_multiple", [FUNCTION, other], answers, pair) is None
    assert rules.fault("multiple", [other, FUNCTION], [ANSWER], [good]) is None
    assert rules.fault("multiple", [other, FUNCTION], [ANSWER], [Call("book_table", GOOD)]) is not None
    assert rules.fault("parallel", [FUNCTION, other], answers, [good]) == "1 calls instead of 2"
    assert "no call matches other" in (rules.fault("parallel", [FUNCTION, other], answers, [good, good]) or "")


def test_gold_answers_pass_and_schemas_become_json_schemas(bfcl: Path) -> None:
    assert reader.categories_in(bfcl) == ("simple_python", "multiple", "irrelevance")
    for category, count in [("simple_python", 400), ("multiple", 200), ("irrelevance", 240)]:
        cases = reader.load_cases(bfcl, category)
        assert len(cases) == count
        for case in cases:
            check_tools(list(case.tools), case.id)
            if case.answers:
                assert rules.fault(category, case.functions, case.answers, reader.gold_calls(case)) is None


def test_mutants_fail_as_they_should_and_fast(bfcl: Path) -> None:
    cases = [c for name in ("simple_python", "multiple") for c in reader.load_cases(bfcl, name)]
    made = list(mutants.mutants(cases, 20_000, seed=2))
    start = time.perf_counter()
    passed: dict[str, list[bool]] = {}
    for case, kind, calls in made:
        passed.setdefault(kind, []).append(rules.fault(case.category, case.functions, case.answers, calls) is None)
    assert time.perf_counter() - start < 10
    for kind in ("wrong_name", "extra", "dropped", "repeated"):
        assert not any(passed[kind]), kind
    assert all(passed["reordered_arguments"])
    assert sum(passed["wrong_value"]) / len(passed["wrong_value"]) < 0.02, "another allowed value may be hit"


def test_verdicts_equal_the_official_checker(bfcl: Path) -> None:
    pytest.importorskip("bfcl_eval", reason=official.INSTALL)
    check, data = official.official_checker(), official.official_data()
    assert check is not None and data is not None
    cases = [c for name in reader.categories_in(data) for c in reader.load_cases(data, name) if c.answers]
    assert len(cases) == 2501
    golden = [(case, "gold", reader.gold_calls(case)) for case in cases]
    for case, kind, calls in [*golden, *mutants.mutants(cases, 20_000, seed=3)]:
        ours = rules.fault(case.category, case.functions, case.answers, calls)
        assert (ours is None) == check(case, calls), (case.id, kind, calls, ours)


@pytest.mark.parametrize("name", ["java", "javascript"])
def test_foreign_literals_equal_the_official_converters(name: str) -> None:
    """Random scraps of source, whole and with a character missing, under every type."""
    pytest.importorskip("bfcl_eval", reason=official.INSTALL)
    short = {"java": "java", "javascript": "js"}[name]
    module = f"bfcl_eval.eval_checker.ast_eval.type_convertor.{short}_type_converter"
    theirs = getattr(importlib.import_module(module), f"{short}_type_converter")
    random, types = Random(4), list(literals.TYPES[name])
    for _ in range(5_000):
        text = "".join(random.choice(SCRAPS) for _ in range(random.choice([1, 1, 2, 3])))
        text = text[: random.randrange(len(text) + 1)] + text[random.randrange(len(text) + 1) :]
        declared, inner = random.choice(types), random.choice(types)
        inner = inner if declared in ("Array", "ArrayList", "array") else None
        ours = literals.READ[name](text, declared, inner)
        assert repr(ours) == repr(theirs(text, declared, inner)), (text, declared, inner)


#      language      declared     inner      source                                              value
FOREIGN_VALUES = [
    ("java", "long", None, "42L", 42),
    ("java", "long", None, "42", "42"),
    ("java", "float", None, "1.5f", 1.5),
    ("java", "double", None, "-3e2", -300.0),
    ("java", "boolean", None, "true", True),
    ("java", "any", None, "42", "42"),
    ("java", "Array", "integer", "new int[]{2, 7, x}", [2, 7, "x"]),
    ("java", "ArrayList", "String", 'new ArrayList<String>(Arrays.asList("GC pause", "b"))', ["GC pause", "b"]),
    ("java", "ArrayList", "integer", "new ArrayList<>() {{ add(1); add(2); }}", [1, 2]),
    ("java", "ArrayList", "integer", "ids", "ids"),
    ("java", "HashMap", None, 'new HashMap<String, Object>() {{ put("a", 50); put("b", "c"); }}', {"a": 50, "b": "c"}),
    ("java", "HashMap", None, "new HashMap<>()", {}),
    ("javascript", "String", None, "'utf-8'", "utf-8"),
    ("javascript", "Bigint", None, "7n", 7),
    ("javascript", "Boolean", None, "True", "True"),
    ("javascript", "array", "float", "[60, 30]", [60.0, 30.0]),
    ("javascript", "array", "String", "new Array('a', \"b\")", ["a", "b"]),
    ("javascript", "array", "array", "[[1, 2], [3]]", [[1, 2], [3]]),
    ("javascript", "dict", None, "{'method': 'GET', retries: [1, true]}", {"method": "GET", "retries": [1, True]}),
    ("javascript", "dict", None, "responseData", "responseData"),
]


@pytest.mark.parametrize(("name", "declared", "inner", "source", "value"), FOREIGN_VALUES)
def test_foreign_literals_by_hand(name: str, declared: str, inner: str | None, source: str, value: Any) -> None:
    found = literals.READ[name](source, declared, inner)
    assert repr(found) == repr(value)


def test_foreign_calls_pass_as_source_text_and_only_so() -> None:
    function = {
        "name": "Queue.retry",
        "description": "Retries.",
        "parameters": {
            "type": "dict",
            "properties": {
                "ids": {"type": "ArrayList", "description": "Which.", "items": {"type": "long"}},
                "delay": {"type": "long", "description": "Seconds."},
                "mode": {"type": "any"},
            },
            "required": ["ids", "delay"],
        },
    }
    answer = {"Queue.retry": {"ids": [[101, 202]], "delay": [5], "mode": ["", "FAST"]}}
    case = reader.Case("j", "simple_java", (), (function,), (reader.as_tool(function, language="java"),), (answer,))
    (gold,) = reader.gold_calls(case)
    assert gold.arguments == {"ids": "new ArrayList<>(Arrays.asList(101L, 202L))", "delay": "5L", "mode": "FAST"}
    assert rules.fault("simple_java", [function], [answer], [gold]) is None
    for wrong in ({"delay": 5}, {"delay": "5"}, {"delay": "6L"}, {"ids": "ids"}, {"mode": "SLOW"}):
        made = Call("Queue.retry", {**gold.arguments, **wrong})
        assert rules.fault("simple_java", [function], [answer], [made]) is not None, wrong
    described = case.tools[0]["function"]
    assert described["description"] == "Retries. Note that the provided function is in Java 8 SDK syntax."
    assert described["parameters"]["properties"]["ids"] == {
        "type": "string",
        "description": "Which. This is Java ArrayList type parameter in string representation. The list elements are "
        "of type long; they are not in string representation.",
    }


def test_averages_follow_the_leaderboard() -> None:
    accuracy = {
        "simple_python": 0.9,
        "simple_java": 0.5,
        "simple_javascript": 0.1,
        "multiple": 0.8,
        "live_simple": 1.0,
        "live_multiple": 0.5,
        "irrelevance": 0.7,
    }
    count = dict.fromkeys(accuracy, 100) | {"live_multiple": 300}
    assert categories.overall(accuracy, count) == pytest.approx(
        {"non_live": (0.5 + 0.8) / 2, "live": (100 + 150) / 400, "irrelevance": 0.7}
    )


def test_faults_name_file_line_and_field(tmp_path: Path) -> None:
    line = '{"id": "a", "question": [[]], "function": [{"name": "f", "parameters": {"type": "dict", "properties": '
    (tmp_path / "BFCL_v4_irrelevance.json").write_text(line + '{"x": {"type": "flot"}}}}]}')
    with pytest.raises(UserError, match=r"irrelevance.json:1: f.parameters.x.type: unknown type 'flot'"):
        reader.load_cases(tmp_path, "irrelevance")
    (tmp_path / "BFCL_v4_irrelevance.json").write_text('{"id": "a"}\n')
    with pytest.raises(UserError, match=r"irrelevance.json:1: the line: 'question' is a required property"):
        reader.load_cases(tmp_path, "irrelevance")
    with pytest.raises(UserError, match="unknown BFCL category 'simpel'"):
        reader.load_cases(tmp_path, "simpel")
    with pytest.raises(UserError, match="no such BFCL file"):
        reader.load_cases(tmp_path, "multiple")
