"""Calls written in every format with the freedom a model has: arguments in any order, JSON spaced as it likes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

Arguments = dict[str, Any]
STRINGS = ("Oslo", "São", "a b", "", "<b>", "x\ny", '"q"', "null", "3", "a&b", "}", "]", "'", "\\", "true")


def value(schema: dict[str, Any], rng: random.Random) -> Any:
    """A random value that satisfies a schema of the kinds that the tests use; members of objects shuffled."""
    if "enum" in schema:
        return rng.choice(schema["enum"])
    if "anyOf" in schema:
        return value(rng.choice(schema["anyOf"]), rng)
    kind = schema["type"]
    if kind == "string":
        low, high = schema.get("minLength", 0), schema.get("maxLength", 9)
        return rng.choice([text for text in STRINGS if low <= len(text) <= high])
    if kind == "integer":
        return rng.randint(schema.get("minimum", -99), schema.get("maximum", 99))
    if kind == "number":
        return rng.choice([0.5, -3, 1e3, 12.25])
    if kind == "boolean":
        return rng.random() < 0.5
    if kind == "array":
        count = rng.randint(schema.get("minItems", 0), schema.get("maxItems", 3))
        return [value(schema["items"], rng) for _ in range(count)]
    return arguments(schema, rng)


def arguments(schema: dict[str, Any], rng: random.Random) -> Arguments:
    """Random members of an object schema: all required ones, some others, in any order."""
    needed = schema.get("required", ())
    names = [name for name in schema["properties"] if name in needed or rng.random() < 0.5]
    rng.shuffle(names)
    return {name: value(schema["properties"][name], rng) for name in names}


def spaced(item: Any, rng: random.Random) -> str:
    """JSON, compact, usual or indented."""
    style: dict[str, Any] = rng.choice([{}, {"separators": (",", ":")}, {"indent": 2}, {"separators": (" ,", " :\t")}])
    return json.dumps(item, ensure_ascii=rng.random() < 0.5, **style)


def raw(item: Any, rng: random.Random) -> str:
    """A string as it is, other values as JSON."""
    return item if isinstance(item, str) else spaced(item, rng)


def _json_tools(name: str, given: Arguments, rng: random.Random) -> str:
    call = [("name", name), ("arguments", given)]
    rng.shuffle(call)
    return f"<tool_call>{rng.choice(['', chr(10), ' '])}{spaced(dict(call), rng)}\n</tool_call>"


def _gemma(item: Any, quote: str) -> str:
    if isinstance(item, str):
        return f"{quote}{item}{quote}"
    if isinstance(item, list):
        return "[" + ",".join(_gemma(part, quote) for part in item) + "]"
    if isinstance(item, dict):
        return "{" + ",".join(f"{key}:{_gemma(part, quote)}" for key, part in item.items()) + "}"
    return json.dumps(item)


def _muse(item: Any, rng: random.Random) -> str:
    return json.dumps(item) if isinstance(item, str) and item in ("null", "3", "true", '"q"') else raw(item, rng)


def _cdata(item: Any, rng: random.Random) -> str:
    text = raw(item, rng)
    return f"<![CDATA[{text}]]>" if isinstance(item, str) and set(text) & set("<&\n") else text


def _kind(item: Any) -> str:
    names = ((bool, "boolean"), (int | float, "number"), (str, "string"), (list, "array"))
    return next((name for kind, name in names if isinstance(item, kind)), "object")


def _each(given: Arguments, text: Callable[[str, Any], str], between: str = "") -> str:
    return between.join(text(key, item) for key, item in given.items())


WRITERS: dict[str, Callable[[str, Arguments, random.Random], str]] = {
    "json_tools": _json_tools,
    "mistral": lambda n, g, r: f"[TOOL_CALLS]{n}[ARGS]{spaced(g, r)}",
    "kimi_k2": lambda n, g, r: (
        f"<|tool_calls_section_begin|><|tool_call_begin|>functions.{n}:{r.randint(0, 12)}<|tool_call_argument_begin|>"
        f"{spaced(g, r)}<|tool_call_end|><|tool_calls_section_end|>"
    ),
    "pythonic": lambda n, g, r: (
        f"<|tool_call_start|>[{n}({_each(g, lambda k, v: f'{k}={spaced(v, r)}', ', ')})]<|tool_call_end|>"
    ),
    "qwen3_coder": lambda n, g, r: (
        f"<tool_call>\n<function={n}>\n"
        + _each(g, lambda k, v: f"<parameter={k}>\n{raw(v, r)}\n</parameter>\n")
        + "</function>\n</tool_call>"
    ),
    "glm47": lambda n, g, r: (
        f"<tool_call>{n}"
        + _each(g, lambda k, v: f"<arg_key>{k}</arg_key><arg_value>{raw(v, r)}</arg_value>")
        + "</tool_call>"
    ),
    "longcat": lambda n, g, r: (
        f"<longcat_tool_call>{n}\n"
        + _each(
            g,
            lambda k, v: (
                f"<longcat_arg_key>{k}</longcat_arg_key>\n<longcat_arg_value>{raw(v, r)}</longcat_arg_value>\n"
            ),
        )
        + "</longcat_tool_call>"
        if g
        else f'<longcat_tool_call>{{"name": "{n}", "arguments": {{}}}}</longcat_tool_call>'
    ),
    "minicpm5": lambda n, g, r: (
        f'<function name="{n}">' + _each(g, lambda k, v: f'<param name="{k}">{_cdata(v, r)}</param>') + "</function>"
    ),
    "minimax_m2": lambda n, g, r: (
        f'<minimax:tool_call>\n<invoke name="{n}">\n'
        + _each(g, lambda k, v: f'<parameter name="{k}">{raw(v, r)}</parameter>\n')
        + "</invoke>\n</minimax:tool_call>"
    ),
    "muse_spark": lambda n, g, r: (
        f'<atem:function_calls>\n<atem:invoke name="{n}">\n'
        + _each(g, lambda k, v: f'<atem:parameter name="{k}">{_muse(v, r)}</atem:parameter>\n')
        + "</atem:invoke>\n</atem:function_calls>"
    ),
    "kimi_k3": lambda n, g, r: (
        f'<|open|>tools<|sep|><|open|>call tool="{n}" index="{r.randint(1, 9)}"<|sep|>'
        + _each(
            g,
            lambda k, v: f'<|open|>argument key="{k}" type="{_kind(v)}"<|sep|>{raw(v, r)}<|close|>argument<|sep|>',
        )
        + "<|close|>call<|sep|><|close|>tools<|sep|>"
    ),
    "gemma4": lambda n, g, r: f"<|tool_call>call:{n}{_gemma(g, chr(60) + '|' + chr(34) + '|>')}<tool_call|>",
    "function_gemma": lambda n, g, r: f"<start_function_call>call:{n}{_gemma(g, '<escape>')}<end_function_call>",
}
WRITERS["laguna"] = WRITERS["glm47"]
