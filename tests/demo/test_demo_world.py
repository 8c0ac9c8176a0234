"""The demo world is deterministic, varied, valid, and its splits do not leak."""

from __future__ import annotations

import itertools
import json
import random

import jsonschema
import pytest

from mlxkd.demo import values, words, world
from mlxkd.demo.catalog import everyday_tools
from mlxkd.demo.composed import compose
from mlxkd.demo.values import spoken

SETS = ("train", "known", "composed", "words")


def _calls(record: dict) -> list[tuple[dict, dict]]:
    tools = {t["function"]["name"]: t["function"] for t in record["tools"]}
    made = [c["function"] for m in record["messages"] for c in m.get("tool_calls", ())]
    return [(tools[call["name"]], call["arguments"]) for call in made]


@pytest.mark.parametrize("split", SETS)
def test_every_call_is_valid_and_said_in_the_request(split: str) -> None:
    for record in world.conversations(split, 3, 400):  # type: ignore[arg-type]
        asked = " ".join(m["content"] for m in record["messages"] if m["role"] == "user")
        for tool, arguments in _calls(record):
            jsonschema.validate(arguments, tool["parameters"])
            for value in arguments.values():
                if not isinstance(value, bool):
                    assert spoken(value) in asked


def test_the_same_seed_gives_the_same_world() -> None:
    first, again = (json.dumps(list(world.conversations("train", 5, 50))) for _ in range(2))
    assert first == again
    assert first != json.dumps(list(world.conversations("train", 6, 50)))


def test_the_world_is_varied() -> None:
    tools = everyday_tools()
    assert len(tools) >= 24
    assert all(len(t.templates) >= 5 for t in tools)
    types = {s["type"] for t in tools for s in t.schema()["function"]["parameters"]["properties"].values()}
    assert types == {"string", "integer", "number", "boolean", "array"}
    kinds = {r["kind"] for r in world.conversations("train", 1, 300)}
    assert kinds == {"call", "result", "none", "two", "again"}


def test_training_never_sees_held_out_words_or_pairs() -> None:
    rng = random.Random(0)
    trained = [compose(rng, "train") for _ in range(2000)]
    composed = [compose(rng, "composed") for _ in range(500)]
    unseen = [compose(rng, "words") for _ in range(500)]
    assert not {t.name for t in trained} & {t.name for t in composed}
    assert {t.verb for t in composed} <= {t.verb for t in trained}
    assert not {t.verb for t in unseen} & {t.verb for t in trained}
    assert not {t.noun for t in unseen} & {t.noun for t in trained}
    assert not {p.name for t in unseen for p in t.params} & {p.name for t in trained for p in t.params}


def test_held_out_names_are_not_in_training_requests() -> None:
    held = set(words.pool(words.NAMES, salt="name", unseen=True))
    assert len(held) > 5
    for record in world.conversations("train", 2, 500):
        said = {word.strip(",.:") for m in record["messages"] for word in str(m["content"]).split()}
        assert not said & (held - set(words.PLACES))


def test_answers_use_every_field_of_a_result() -> None:
    for record in world.conversations("train", 9, 300):
        messages = record["messages"]
        for result, answer in itertools.pairwise(messages):
            if result["role"] == "tool":
                for name, value in json.loads(result["content"]).items():
                    assert f"the {name} is {spoken(value)}" in answer["content"]


def test_value_generators_match_their_json_types() -> None:
    checks = {"string": str, "integer": int, "number": float, "boolean": bool, "array": list}
    rng = random.Random(1)
    for kind, generate in values.GENERATORS.items():
        for unseen in (False, True):
            assert isinstance(generate(rng, unseen), checks[values.JSON_TYPES[kind]])
