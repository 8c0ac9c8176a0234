"""Calls written in every format with the freedom a model has: arguments in any order, JSON spaced as it likes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

Arguments = dict[str, Any]
Writer = Callable[[str, Arguments, random.Random], str]
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


def python_or_json(item: Any, rng: random.Random) -> str:
    """A Python literal or JSON."""
    return repr(item) if rng.random() < 0.5 else spaced(item, rng)


def _pythonic(name: str, given: Arguments, rng: random.Random) -> str:
    equals, comma = rng.choice(["=", " = "]), rng.choice([", ", ",", ",\n  "])
    written = comma.join(f"{key}{equals}{python_or_json(item, rng)}" for key, item in given.items())
    return f"<|tool_call_start|>[{name}({written})]<|tool_call_end|>"


def _tagged(head: str, tail: str, text: Callable[[str, Any, random.Random], str]) -> Writer:
    """Arguments one after the other between a head that names the tool and a tail."""

    def write(name: str, given: Arguments, rng: random.Random) -> str:
        head_of = head.replace("NAME", name).replace("INDEX", str(rng.randint(1, 9)))
        return head_of + "".join(text(key, item, rng) for key, item in given.items()) + tail

    return write


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


def _longcat(name: str, given: Arguments, rng: random.Random) -> str:
    if not given:
        return f'<longcat_tool_call>{{"name": "{name}", "arguments": {{}}}}</longcat_tool_call>'
    return _longcat_given(name, given, rng)


def _kimi_k2(name: str, given: Arguments, rng: random.Random) -> str:
    call = f"<|tool_call_begin|>functions.{name}:{rng.randint(0, 12)}<|tool_call_argument_begin|>{spaced(given, rng)}"
    return f"<|tool_calls_section_begin|>{call}<|tool_call_end|><|tool_calls_section_end|>"


_longcat_given = _tagged(
    "<longcat_tool_call>NAME\n",
    "</longcat_tool_call>",
    lambda k, v, r: f"<longcat_arg_key>{k}</longcat_arg_key>\n<longcat_arg_value>{raw(v, r)}</longcat_arg_value>\n",
)
_glm = _tagged(
    "<tool_call>NAME",
    "</tool_call>",
    lambda k, v, r: f"<arg_key>{k}</arg_key><arg_value>{raw(v, r)}</arg_value>",
)
WRITERS: dict[str, Writer] = {
    "json_tools": _json_tools,
    "mistral": lambda n, g, r: f"[TOOL_CALLS]{n}[ARGS]{spaced(g, r)}",
    "kimi_k2": _kimi_k2,
    "pythonic": _pythonic,
    "glm47": _glm,
    "laguna": _glm,
    "longcat": _longcat,
    "qwen3_coder": _tagged(
        "<tool_call>\n<function=NAME>\n",
        "</function>\n</tool_call>",
        lambda k, v, r: f"<parameter={k}>\n{raw(v, r)}\n</parameter>\n",
    ),
    "minicpm5": _tagged(
        '<function name="NAME">',
        "</function>",
        lambda k, v, r: f'<param name="{k}">{_cdata(v, r)}</param>',
    ),
    "minimax_m2": _tagged(
        '<minimax:tool_call>\n<invoke name="NAME">\n',
        "</invoke>\n</minimax:tool_call>",
        lambda k, v, r: f'<parameter name="{k}">{raw(v, r)}</parameter>\n',
    ),
    "muse_spark": _tagged(
        '<atem:function_calls>\n<atem:invoke name="NAME">\n',
        "</atem:invoke>\n</atem:function_calls>",
        lambda k, v, r: f'<atem:parameter name="{k}">{_muse(v, r)}</atem:parameter>\n',
    ),
    "kimi_k3": _tagged(
        '<|open|>tools<|sep|><|open|>call tool="NAME" index="INDEX"<|sep|>',
        "<|close|>call<|sep|><|close|>tools<|sep|>",
        lambda k, v, r: f'<|open|>argument key="{k}" type="{_kind(v)}"<|sep|>{raw(v, r)}<|close|>argument<|sep|>',
    ),
    "gemma4": lambda n, g, r: f"<|tool_call>call:{n}{_gemma(g, chr(60) + '|' + chr(34) + '|>')}<tool_call|>",
    "function_gemma": lambda n, g, r: f"<start_function_call>call:{n}{_gemma(g, '<escape>')}<end_function_call>",
}
