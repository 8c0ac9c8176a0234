"""BFCL: the leaderboard's own checker is the oracle; without it, cases decided by hand from its rules."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from mlxkd.data.fields import check_tools
from mlxkd.errors import UserError
from mlxkd.evaluation.toolcalls.bfcl import categories, mutants, official, reader, rules
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
    names = [n for n in reader.categories_in(data) if n not in reader.FOREIGN]
    cases = [c for name in names for c in reader.load_cases(data, name) if c.answers]
    assert len(cases) == 2351
    golden = [(case, "gold", reader.gold_calls(case)) for case in cases]
    for case, kind, calls in [*golden, *mutants.mutants(cases, 20_000, seed=3)]:
        ours = rules.fault(case.category, case.functions, case.answers, calls)
        assert (ours is None) == check(case, calls), (case.id, kind, calls, ours)


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
    with pytest.raises(UserError, match=r"irrelevance.json:1: field 'question' or 'id' is missing"):
        reader.load_cases(tmp_path, "irrelevance")
    with pytest.raises(UserError, match="unknown BFCL category 'simpel'"):
        reader.load_cases(tmp_path, "simpel")
    with pytest.raises(UserError, match="no such BFCL file"):
        reader.load_cases(tmp_path, "multiple")
