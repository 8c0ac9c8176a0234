"""How models write tool calls, as Lark rules for llguidance: one body per tool parser of mlx-lm.

A body is what stands between the markers that open and close a call (or a block of calls). Strings stand raw where a
dialect writes them raw, up to their end marker; they exclude what the dialect's parser would read as something else.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from mlxkd.decode.lark import ANY, Schema, Tool, Writer, arguments, is_string
from mlxkd.errors import UserError

NULL = r"/\s*(?i:null)\s*/"
JSON_VALUE = r'/-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?|true|false|null|NaN|-?Infinity|["\[{](?s:.*)/'


def json_tools(w: Writer) -> str:
    """{"name": ..., "arguments": {...}} (Hermes, Qwen 2.5 and 3)."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool["name"]}, "arguments": arguments(tool)},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in w.tools
    ]
    return w.json({"anyOf": calls})


def mistral(w: Writer) -> str:
    """NAME[ARGS]{...}, without a closing marker (Mistral's form since its eleventh tokenizer)."""
    return w.any_tool(lambda tool: f"{w.mark(tool['name'] + '[ARGS]')} {w.json(arguments(tool))}")


def kimi_k2(w: Writer) -> str:
    """A section of functions.NAME:0 with JSON arguments."""

    def call(tool: Tool) -> str:
        name = json.dumps(f"functions.{tool['name']}:")
        head = f"{w.mark('<|tool_call_begin|>')} {name} /[0-9]+/ {w.mark('<|tool_call_argument_begin|>')}"
        return f"{head} {w.json(arguments(tool))} {w.mark('<|tool_call_end|>')}"

    return w.rule(f"{w.any_tool(call)}+")


def pythonic(w: Writer) -> str:
    """[NAME(KEY=VALUE, ...), ...], values as JSON or as Python literals (LFM2, Llama 4)."""
    comma = '", "' if w.usual else 'WHITE? "," WHITE?'

    def pair(key: str, value: Schema) -> str:
        return f"{json.dumps(key)} {w.space('')} {json.dumps('=')} {w.space('')} {w.python(value)}"

    def call(tool: Tool) -> str:
        given = w.present(tool, pair, comma, '""')
        return f"{json.dumps(tool['name'] + '(')} {w.space('')} {given} {w.space('')} {json.dumps(')')}"

    one = w.any_tool(call)
    return w.rule(f'"[" {w.space("")} {one} ({comma} {one})* {w.space("")} "]"')


KINDS = ("number", "integer", "boolean", "array", "object", "null")


@dataclass(frozen=True)
class Tags:
    """One block per argument, strings raw.

    Args:
        head, tail: around the arguments; ``{name}`` is the tool's, ``{n}`` any number.
        key, end: around a value; ``{key}`` is the argument's, ``{type}`` its JSON type.
        between: between the calls of a block; None where a block holds one.
        never: what a raw string may not be, for its parser would read something else.
        quoted: a string may also stand as JSON, and must where its raw form would be misread.
        cdata: a value may stand in ``<![CDATA[...]]>``, and must where it holds "<", "&" or a line break.
        empty: False where calls without arguments are written as JSON.
        block: markers around all arguments as one JSON object, which is another spelling.
    """

    head: str
    key: str
    end: str
    tail: str = ""
    between: str | None = None
    never: str = ""
    quoted: bool = False
    cdata: bool = False
    empty: bool = True
    block: tuple[str, str] | None = None

    def __call__(self, w: Writer) -> str:
        one = w.any_tool(lambda tool: self._call(w, tool))
        return one if self.between is None else w.rule(f"{one} ({w.mark(self.between)} {one})*")

    def _call(self, w: Writer, tool: Tool) -> str:
        given = w.present(
            tool, lambda key, value: self._argument(w, tool, key, value), "", '""' if self.empty else None
        )
        if self.block and not w.usual:
            opening, closing = map(w.mark, self.block)
            given = f"({given} | {opening} {w.json(arguments(tool))} {closing})"
        before, *after = self.head.format(name=tool["name"], n="\0").split("\0")
        head = " /[0-9]+/ ".join([w.mark(before), *map(w.mark, after)])
        written = f"{head} {given} {w.mark(self.tail)}"
        if self.empty or arguments(tool).get("required"):
            return written
        bare = w.json({"const": {"name": tool["name"], "arguments": {}}})
        return f"{w.rule(written)} | {bare}" if given else bare

    def _argument(self, w: Writer, tool: Tool, key: str, value: Schema) -> str:
        # What is not read as a string is read as JSON, whichever type the model names.
        kinds = [_json_type(value)] if w.usual or is_string(value) else KINDS
        opening = f"({' | '.join(dict.fromkeys(w.mark(self.key.format(key=key, type=kind)) for kind in kinds))})"
        if not is_string(value):
            return f"{opening} {w.json(value)} {w.mark(self.end)}"
        where = f"{tool['name']}.{key}"
        if not self.cdata or "enum" in value or "const" in value:
            return f"{opening} {w.raw(value, self.end, where, never=self.never, quoted=self.quoted)}"
        plain = w.raw(value, self.end, where, char="[^<&\\n]", never=self.never)
        wrapped = w.raw(value, f"]]>{self.end}", where)
        return f'{opening} ({plain} | "<![CDATA[" {wrapped})'


def _json_type(schema: Schema) -> str:
    """Kimi K3 names the type of every argument, integers as numbers."""
    declared = schema.get("type", "object")
    return "number" if declared == "integer" else declared if isinstance(declared, str) else "object"


@dataclass(frozen=True)
class Gemma:
    """call:NAME{KEY:VALUE,...} with bare keys and a marker around strings.

    Args:
        quote: on both sides of a string.
        flat: mlx-lm's parser reads neither lists nor objects, nor a "}" within a string.
    """

    quote: str
    flat: bool = False

    def __call__(self, w: Writer) -> str:
        return w.any_tool(
            lambda tool: f"{json.dumps('call:' + tool['name'])} {self._object(w, arguments(tool), tool['name'])}"
        )

    def _object(self, w: Writer, schema: Schema, where: str) -> str:
        tool = {"parameters": schema}
        pair = lambda key, value: f"{json.dumps(key + ':')} {self._value(w, value, f'{where}.{key}')}"  # noqa: E731
        given = w.present(tool, pair, '","', '""')
        return f'"{{" {given} "}}"'

    def _value(self, w: Writer, schema: Schema, where: str) -> str:
        if is_string(schema):
            raw = w.raw(schema, self.quote, where, char="[^}]" if self.flat else ANY)
            return f"{w.mark(self.quote)} {raw}"
        kind = schema.get("type")
        if kind == "object" and "properties" in schema and not self.flat:
            return w.rule(self._object(w, schema, where))
        if kind == "array" and "items" in schema and not self.flat:
            return self._array(w, schema, where)
        if kind in ("integer", "number", "boolean", "null"):
            return w.json(schema)
        raise UserError(
            f"a value of type {kind!r} cannot be enforced in this dialect",
            where=where,
            hint="simplify the schema or drop --constrain",
        )

    def _array(self, w: Writer, schema: Schema, where: str) -> str:
        one = w.rule(self._value(w, schema["items"], f"{where}[]"))
        return w.array(schema, one, "", '","')


GLM = Tags("{name}", "<arg_key>{key}</arg_key><arg_value>", "</arg_value>")
K3_ARGUMENT = '<|open|>argument key="{key}" type="{type}"<|sep|>'
DIALECTS: dict[str, tuple[Callable[[Writer], str], str]] = {
    "function_gemma": (Gemma("<escape>", flat=True), ""),
    "gemma4": (Gemma('<|"|>'), ""),
    "glm47": (GLM, ""),
    "json_tools": (json_tools, "\n"),
    "kimi_k2": (kimi_k2, ""),
    "kimi_k3": (
        Tags(
            '<|open|>call tool="{name}" index="{n}"<|sep|>',
            K3_ARGUMENT,
            "<|close|>argument<|sep|>",
            "<|close|>call<|sep|>",
            between="",
            block=('<|open|>json type="object"<|sep|>', "<|close|>json<|sep|>"),
        ),
        "",
    ),
    "laguna": (GLM, ""),
    "longcat": (
        Tags(
            "{name}\n",
            "<longcat_arg_key>{key}</longcat_arg_key>\n<longcat_arg_value>",
            "</longcat_arg_value>\n",
            empty=False,
        ),
        "",
    ),
    "minicpm5": (Tags('"{name}">', '<param name="{key}">', "</param>", never=NULL, cdata=True), ""),
    "minimax_m2": (
        Tags(
            '<invoke name="{name}">\n',
            '<parameter name="{key}">',
            "</parameter>\n",
            "</invoke>",
            between="\n",
            never=NULL,
        ),
        "\n",
    ),
    "mistral": (mistral, ""),
    "muse_spark": (
        Tags(
            '<atem:invoke name="{name}">\n',
            '<atem:parameter name="{key}">',
            "</atem:parameter>\n",
            "</atem:invoke>",
            between="\n",
            never=JSON_VALUE,
            quoted=True,
        ),
        "\n",
    ),
    "pythonic": (pythonic, ""),
    "qwen3_coder": (
        Tags("<function={name}>\n", "<parameter={key}>\n", "\n</parameter>\n", "</function>", never=NULL),
        "\n",
    ),
}
"""By the name of mlx-lm's tool parser: the body, and the white space inside the markers where no template tells."""
