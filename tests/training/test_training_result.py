"""What a run says of its student beside the twin, against hand-made answers and a closed form."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from mlxkd.evaluation.answers import Answer
from mlxkd.evaluation.toolcalls.parsing import parser_named
from mlxkd.evaluation.toolcalls.scoring import aggregate, score
from mlxkd.recipe import load_recipe
from mlxkd.training.result import Contender, RunResult, gap_closed, lead

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
WANTED = [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]
RIGHT = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'


def contender(right: str) -> Contender:
    """Answers that are right where ``right`` has a 1."""
    texts = [RIGHT if mark == "1" else "no" for mark in right]
    parser = parser_named("json_tools")
    answers = [Answer(WANTED, [TOOL], text, score(WANTED, [TOOL], text, parser)) for text in texts]
    metrics = {f"all/{k}": m for k, m in aggregate([a.score for a in answers], "here").items()}
    return Contender("", 0, 0, metrics, {"known": answers[:3], "composed": answers[3:]})


def result(**right: str) -> RunResult:
    return RunResult(load_recipe("demo"), Path(), {k: contender(v) for k, v in right.items()}, 0.0, 0, [])


def test_lead_is_paired() -> None:
    # Differences of the same requests: 0, 1, 1, -1, 0, 1, 0, 0; mean 2/8, squares 4, variance (4 - 8 * (1/4)^2) / 7.
    found = lead(result(student="11101110", baseline="10011010"))
    assert found.value == pytest.approx(25.0) and found.n == 8
    assert found.note.startswith(f"standard error {100 * math.sqrt((4 - 8 / 16) / 7 / 8):.1f}")


def test_gap_closed_is_a_share_of_the_distance() -> None:
    assert gap_closed(result(teacher="11111111", student="11111100", baseline="11110000")).value == pytest.approx(0.5)


def test_neither_exists_without_a_twin() -> None:
    alone = result(teacher="1111", student="1110")
    assert lead(alone).value is None and gap_closed(alone).value is None
    assert gap_closed(result(teacher="1111", student="1111", baseline="1111")).value is None
