"""Evidence, numbers and dates, against cases decided by hand."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal

import pytest

from mlxkd.errors import UserError
from mlxkd.evaluation.toolcalls.evidence import mentions, score_evidence, tool_facts
from mlxkd.evaluation.toolcalls.locales import LOCALES, dates, locale_named, number_readings, numbers, same_value


@pytest.mark.parametrize(
    ("literal", "locale", "values"),
    [
        ("1234", None, {"1234"}),
        ("1,234.50", "en_US", {"1234.5"}),
        ("1.234,50", "de_DE", {"1234.5"}),
        ("1.234,50", "en_US", set()),
        ("1 234,5", "fr_FR", {"1234.5"}),
        ("1\u202f234\u202f567", "fr_FR", {"1234567"}),
        ("1’234.5", "de_CH", {"1234.5"}),
        ("1,234", None, {"1234", "1.234"}),
        ("1,234", "en_GB", {"1234"}),
        ("1,234", "de_DE", {"1.234"}),
        ("0,234", None, {"0.234"}),
        ("-3.5", None, {"-3.5"}),
        ("−3", None, {"-3"}),
        ("12,34", None, {"12.34"}),
        ("12,34", "en_US", set()),
    ],
)
def test_number_readings(literal: str, locale: str | None, values: set[str]) -> None:
    assert number_readings(literal, locale_named(locale)) == {Decimal(v) for v in values}


def test_numbers_in_a_sentence() -> None:
    text = "It was 1.234,50 € on 3 May, up 7% from v2; call 555-0199."
    assert [text[s:e] for s, e, _ in numbers(text)] == ["1.234,50", "3", "7", "555", "0199"]


@pytest.mark.parametrize(
    ("text", "locale", "days"),
    [
        ("2024-03-05", None, {(3, 5)}),
        ("03/05/2024", "en_US", {(3, 5)}),
        ("03/05/2024", "en_GB", {(5, 3)}),
        ("03/05/2024", None, {(3, 5), (5, 3)}),
        ("25/12/2024", "en_US", set()),
        ("5.3.2024", "de_DE", {(3, 5)}),
        ("March 5, 2024", None, {(3, 5)}),
        ("5th March 2024", "en_US", {(3, 5)}),
        ("5. März 2024", None, {(3, 5)}),
        ("5 de marzo de 2024", None, {(3, 5)}),
        ("le 5 mars 2024", None, {(3, 5)}),
        ("05/03/24", "fr_FR", {(3, 5)}),
        ("2024-13-40", None, set()),
    ],
)
def test_dates(text: str, locale: str | None, days: set[tuple[int, int]]) -> None:
    found = {d for _, _, readings in dates(text, locale_named(locale)) for d in readings}
    assert found == {datetime.date(2024, month, day) for month, day in days}


def test_same_value() -> None:
    assert same_value("1,234.5", 1234.5)
    assert same_value("5 March 2024", "2024-03-05")
    assert same_value(" Paris", "paris")
    assert not same_value("03/05/2024", "2024-05-03", LOCALES["en_US"])
    assert same_value("03/05/2024", "2024-05-03", LOCALES["en_GB"])
    assert not same_value("1.234", 1234, LOCALES["en_US"])
    assert not same_value(True, 1) and not same_value("true", True)
    with pytest.raises(UserError, match="did you mean 'en_US'"):
        locale_named("en_us")


RESULT = {"city": "Oslo", "wind": {"speed": 12.5, "from": "north"}, "date": "2024-03-05", "ok": True, "code": 1234}
MESSAGES = [
    {"role": "user", "content": "Weather in Oslo for 2 people?"},
    {"role": "assistant", "content": "", "tool_calls": []},
    {"role": "tool", "content": json.dumps(RESULT)},
]


def test_facts_and_where_they_are_mentioned() -> None:
    assert tool_facts(MESSAGES) == ["Oslo", 12.5, "north", "2024-03-05", 1234]
    assert tool_facts([{"role": "tool", "content": "12 km"}]) == ["12 km", "12"]
    text = "Northern Oslo: 12,5 m/s from the north on March 5, 2024 (1,234)."
    assert [text[s:e] for fact in tool_facts(MESSAGES) for s, e in mentions(fact, text)] == [
        "Oslo",
        "12,5",
        "north",
        "March 5, 2024",
        "1,234",
    ]


@pytest.mark.parametrize(
    ("generated", "precision", "recall"),
    [
        ("In Oslo the wind is 12.5 from the north.", 1.0, 1.0),
        ("In OSLO: 12,5.", 1.0, 2 / 3),
        ("In Oslo the wind is 15 from the north.", 2 / 3, 2 / 3),
        ("For 2 people: 12.5 in Oslo, north, on 5 March 2024.", 3 / 4, 1.0),
        ("No idea.", None, 0.0),
    ],
)
def test_precision_and_recall_of_copied_facts(generated: str, precision: float | None, recall: float) -> None:
    score = score_evidence(MESSAGES, "Oslo: wind 12.5 from the north", generated)
    assert (score.precision, score.recall) == (pytest.approx(precision) if precision else None, pytest.approx(recall))
