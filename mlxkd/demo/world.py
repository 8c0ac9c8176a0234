"""Conversations of the demo world: calls, answers from tool results, and requests that no tool serves.

Everything is a pure function of a seed. Records have the form of mlx-lm's chat datasets:
``{"messages": [...], "tools": [...]}``, plus ``"kind"`` and ``"set"`` for whoever wants to count.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any, Literal

from mlxkd.demo.catalog import everyday_tools
from mlxkd.demo.composed import Novelty, compose
from mlxkd.demo.tools import DemoTool
from mlxkd.demo.values import GENERATORS, Value, spoken

Set = Literal["train", "known", "composed", "words"]
Record = dict[str, Any]

# A model that is told so says what it is about to do before it calls; a share of training is told so.
THINK_ALOUD = "Think aloud before you act."
ALOUD_SHARE = 0.08
NO_TOOL = "None of my tools can do that."
SMALL_TALK = (
    "how are you", "tell me a joke", "what is your name", "thank you very much", "good morning", "who made you",
    "what is the meaning of life", "I am bored", "do you like music", "why is the sky blue", "sing me a song",
    "you are very kind", "what do you think about cats", "how old are you", "see you later", "nice to meet you",
)  # fmt: skip
RESULT_FIELDS: dict[str, tuple[str, ...]] = {
    "id": ("code",),
    "status": ("ok", "done", "open", "late", "confirmed", "pending"),
    "price": ("decimal", "integer"),
    "total": ("decimal", "integer"),
    "count": ("small", "integer"),
    "city": ("place",),
    "contact": ("person",),
    "time": ("time",),
    "day": ("day",),
    "temperature": ("decimal", "small"),
    "title": ("topic",),
    "room": ("code", "small"),
    "seat": ("code",),
    "distance": ("decimal", "integer"),
    "color": ("color",),
    "items": ("things",),
    "owner": ("person",),
    "score": ("decimal", "small"),
}  # fmt: skip


def default_tools() -> list[dict[str, Any]]:
    """Schemas that a demo student is given when a person names none."""
    wanted = ("create_reminder", "get_weather", "send_message", "set_timer")
    by_name = {tool.name: tool for tool in everyday_tools()}
    return [by_name[name].schema() for name in wanted]


def conversations(split: Set, seed: int, count: int) -> Iterator[Record]:
    """``count`` conversations of a split; the same seed gives the same ones.

    Splits: "train"; "known" (everyday tools, unseen templates and values); "composed" (tools in unseen
    combinations of known words); "words" (tools made of words that training never sees).
    """
    rng = random.Random(f"{split}:{seed}")
    for _ in range(count):
        yield conversation(rng, split)


def conversation(rng: random.Random, split: Set) -> Record:
    """One conversation over one list of tools.

    Training has up to four requests in a conversation, so that one reading of the tools serves several answers;
    held-out sets mostly one. ``kind`` is that of the only request, or "again".
    """
    unseen = split != "train"
    offered = _offer(rng, split)
    requests = rng.choices((1, 2, 3, 4), (92, 8, 0, 0) if unseen else (30, 25, 25, 20))[0]
    aloud = not unseen and rng.random() < ALOUD_SHARE
    messages: list[dict[str, Any]] = [{"role": "system", "content": THINK_ALOUD}] if aloud else []
    kind = "again"
    for _ in range(requests):
        kind, turns = _exchange(rng, split, offered)
        if aloud:
            turns[1]["content"] = think(turns[1]) + turns[1]["content"]
        messages += turns
    return {
        "messages": messages,
        "tools": [t.schema() for t in offered],
        "kind": kind if requests == 1 else "again",
        "set": split,
    }


def _exchange(rng: random.Random, split: Set, offered: list[DemoTool]) -> tuple[str, list[dict[str, Any]]]:
    """A request and what follows it: usually one call, sometimes two, an answer from a result, or no call."""
    unseen = split != "train"
    kind = rng.choices(("call", "result", "none", "two"), (62, 17, 13, 8))[0]
    if kind == "none":
        absent = _outsider(rng, split, offered)
        text = rng.choice(SMALL_TALK) if rng.random() < 0.25 else absent.request(rng, unseen=unseen)[0]
        return kind, [_user(text), {"role": "assistant", "content": NO_TOOL}]
    if kind == "two" and len(offered) > 1:
        first, second = rng.sample(offered, 2)
        (ask, values), (ask2, values2) = (tool.request(rng, unseen=unseen) for tool in (first, second))
        joint = rng.choice((" and then ", ", then ", " and also ", ". After that "))
        return kind, [_user(ask + joint + ask2), _call((first, values), (second, values2))]
    tool = rng.choice(offered)
    text, values = tool.request(rng, unseen=unseen)
    turns = [_user(text), _call((tool, values))]
    if kind == "result":
        return kind, turns + _result_and_answer(rng, unseen)
    return "call", turns


def think(answer: dict[str, Any]) -> str:
    """What a model that thinks aloud says before ``answer``: the tool and the values it is about to use."""
    calls = [call["function"] for call in answer.get("tool_calls", ())]
    if not calls:
        return "Let me think. I look at my tools. Nothing fits. "
    thoughts = (
        f"I will use {call['name']}" + "".join(f", {name} is {spoken(v)}" for name, v in call["arguments"].items())
        for call in calls
    )
    return f"Let me think. {'. '.join(thoughts)}. "


def _offer(rng: random.Random, split: Set) -> list[DemoTool]:
    everyday = split == "known" or (split == "train" and rng.random() < 0.3)
    count = rng.choice((1, 2, 3, 3, 4))
    if everyday:
        return rng.sample(everyday_tools(), count)
    made: list[DemoTool] = [compose(rng, _novelty(split)) for _ in range(count)]
    tools = {tool.name: tool for tool in made}
    if split == "train" and rng.random() < 0.15:
        extra = rng.choice(everyday_tools())
        tools[extra.name] = extra
    offered = list(tools.values())
    rng.shuffle(offered)
    return offered


def _novelty(split: Set) -> Novelty:
    return "train" if split == "known" else split


def _outsider(rng: random.Random, split: Set, offered: list[DemoTool]) -> DemoTool:
    """A tool that none of the offered ones resembles in name."""
    taken = {word for tool in offered for word in tool.name.split("_")}
    while True:
        known = split == "known" or (split == "train" and rng.random() < 0.5)
        tool: DemoTool = rng.choice(everyday_tools()) if known else compose(rng, _novelty(split))
        if not taken & set(tool.name.split("_")):
            return tool


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _call(*calls: tuple[DemoTool, dict[str, Value]]) -> dict[str, Any]:
    tool_calls = [{"type": "function", "function": {"name": t.name, "arguments": v}} for t, v in calls]
    return {"role": "assistant", "content": "", "tool_calls": tool_calls}


def _result_and_answer(rng: random.Random, unseen: bool) -> list[dict[str, Any]]:
    """A tool's result and an answer in which every field of it is used."""
    names = rng.sample(list(RESULT_FIELDS), rng.randint(1, 3))
    result: dict[str, Value] = {}
    for name in names:
        kind = rng.choice(RESULT_FIELDS[name])
        result[name] = GENERATORS[kind](rng, unseen) if kind in GENERATORS else kind
    said = [f"the {name} is {spoken(value)}" for name, value in result.items()]
    answer = " and ".join(said)
    content = json.dumps(result, ensure_ascii=False, separators=(",", ":"))
    return [{"role": "tool", "content": content}, {"role": "assistant", "content": f"Done, {answer}."}]
