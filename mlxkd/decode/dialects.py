"""How models write tool calls, as Lark rules for llguidance: one body per tool parser of mlx-lm.

A body is what stands between the markers that open and close a call (or a block of calls). Arguments come in the
order of the schema, white space as in ``Layout``. Strings stand raw where a dialect writes them raw, up to their end
marker; they exclude what the dialect's parser would read as something else.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlxkd.errors import UserError

Tool = dict[str, Any]
Schema = dict[str, Any]
ANY = "(?s:.)"
LENGTHS = ("minLength", "maxLength")
# Schema keys that say nothing about a raw string; any other one would be ignored silently and is refused.
HARMLESS = ("type", "description", "title", "default", "examples", "enum", "const", *LENGTHS)
NULL = r"/\s*(?i:null)\s*/"
JSON_VALUE = r'/-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?|true|false|null|NaN|-?Infinity|["\[{](?s:.*)/'


@dataclass(frozen=True)
class Layout:
    """How a model writes a call, down to its white space; read from its own chat template.

    Args:
        opening, closing: markers around a call or a block of calls.
        before, after: white space inside the markers.
        item, key: separators of JSON.
    """

    opening: str
    closing: str
    before: str = ""
    after: str = ""
    item: str = ", "
    key: str = ": "


@dataclass
class Writer:
    """Writes the rules of one grammar.

    Args:
        tools: bare function schemas.
        layout: see ``Layout``.
        split: a literal as parts of Lark, its special tokens as tokens.
    """

    tools: Sequence[Tool]
    layout: Layout
    split: Callable[[str], list[str]]
    rules: list[str] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def rule(self, expression: str, *, suffix: str = "") -> str:
        """Add a rule; returns its name."""
        name = f"r{next(self._numbers)}"
        attribute = f"[suffix={suffix}]" if suffix else ""
        self.rules.append(f"{name}{attribute}: {expression}")
        return name

    def mark(self, text: str) -> str:
        """A literal as Lark."""
        return " ".join(self.split(text))

    def any_tool(self, one: Callable[[Tool], str]) -> str:
        """A rule for the call of one of the tools."""
        return self.rule(" | ".join(self.rule(one(tool)) for tool in self.tools))

    def json(self, schema: Schema) -> str:
        """A JSON value in the layout's spacing."""
        spacing = {
            "item_separator": self.layout.item,
            "key_separator": self.layout.key,
            "whitespace_flexible": False,
        }
        return f"%json {json.dumps({**schema, 'x-guidance': spacing})}"

    def raw(
        self, schema: Schema, end: str, where: str, *, char: str = ANY, never: str = "", quoted: bool = False
    ) -> str:
        """A raw string and the marker ``end`` behind it.

        Args:
            schema: of the string.
            end: the string does not contain it.
            where: the argument, for faults.
            char: regular expression of one character.
            never: regular expression, between slashes, of strings that would be misread.
            quoted: a string may also stand as JSON, and those that would be misread do.

        Raises:
            UserError: the schema asks for what raw strings cannot be held to.
        """
        if choices := schema.get("enum") or ([schema["const"]] if "const" in schema else []):
            misread = [choice for choice in choices if never and re.fullmatch(never[1:-1], choice)]
            if misread and not quoted:
                raise UserError(f"this dialect reads the choice {misread[0]!r} as something else", where=where)
            spelt = [json.dumps(choice) if choice in misread else choice for choice in choices]
            return f"({' | '.join(map(json.dumps, spelt))}) {self.mark(end)}"
        if strange := [key for key in schema if key not in HARMLESS and not key.startswith("x-")]:
            raise UserError(
                f"{', '.join(map(repr, strange))} of a string cannot be enforced where strings stand raw",
                where=where,
                hint="simplify the schema or drop --constrain",
            )
        shortest, longest = schema.get("minLength", 0), schema.get("maxLength", "")
        pattern = f"/{char}*/" if (shortest, longest) == (0, "") else f"/{char}{{{shortest},{longest}}}/"
        if never:
            pattern += f" & ~{never}"
        first, *rest = self.split(end)
        if first.startswith("<["):  # no text contains a special token
            written = " ".join([self.rule(pattern), first, *rest])
        else:
            written = " ".join([self.rule(pattern, suffix=first), *rest])
        return f"({written} | {self.rule(self.json(schema))} {self.mark(end)})" if quoted else written

    def present(self, tool: Tool, pair: Callable[[str, Schema], str], between: str, nothing: str | None) -> str:
        """Arguments in order, optional ones present or not, with a separator between those present.

        Args:
            tool: whose arguments.
            pair: Lark of one argument, from its name and schema.
            between: literal separator, "" for none.
            nothing: Lark of a call without arguments; None where it takes some other form.
        """
        schema = arguments(tool)
        given = list(schema["properties"].items())
        separator = f"{json.dumps(between)} " if between else ""
        # "after" follows an argument, "first" none; both are built from the end.
        after, first = '""', nothing
        for name, value in reversed(given):
            one, needed = self.rule(pair(name, value)), name in schema.get("required", [])
            begun = f"{one} {after}" if after != '""' else one
            first = self.rule(begun if needed or first is None else f"{begun} | {first}")
            more = self.rule(f"{separator}{begun}" if needed else f"{separator}{begun} | {after}")
            after = more
        return first if first is not None else ""


def arguments(tool: Tool) -> Schema:
    """The schema of a tool's arguments, closed to further ones."""
    schema = tool.get("parameters") or {}
    return {"additionalProperties": False, "properties": {}, **schema, "type": "object"}


def is_string(schema: Schema) -> bool:
    """Whether values are strings and nothing else, which tagged dialects write raw."""
    return schema.get("type") == "string"


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
    return w.rule(w.json({"anyOf": calls}))


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
    """[NAME(KEY=VALUE, ...), ...], values as JSON, which the parsers of this form read (LFM2, Llama 4)."""

    def call(tool: Tool) -> str:
        given = w.present(tool, lambda key, value: f"{json.dumps(key + '=')} {w.json(value)}", ", ", '""')
        return f"{json.dumps(tool['name'] + '(')} {given} {json.dumps(')')}"

    one = w.any_tool(call)
    return w.rule(f'"[" {one} (", " {one})* "]"')


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
        empty: calls without arguments are written as JSON.
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

    def __call__(self, w: Writer) -> str:
        one = w.any_tool(lambda tool: self._call(w, tool))
        return one if self.between is None else w.rule(f"{one} ({w.mark(self.between)} {one})*")

    def _call(self, w: Writer, tool: Tool) -> str:
        given = w.present(
            tool, lambda key, value: self._argument(w, tool, key, value), "", '""' if self.empty else None
        )
        before, *after = self.head.format(name=tool["name"], n="\0").split("\0")
        head = " /[0-9]+/ ".join([w.mark(before), *map(w.mark, after)])
        written = f"{head} {given} {w.mark(self.tail)}"
        if self.empty or arguments(tool).get("required"):
            return written
        bare = w.json({"const": {"name": tool["name"], "arguments": {}}})
        return f"{w.rule(written)} | {w.rule(bare)}" if given else w.rule(bare)

    def _argument(self, w: Writer, tool: Tool, key: str, value: Schema) -> str:
        opening = w.mark(self.key.format(key=key, type=_json_type(value)))
        if not is_string(value):
            return f"{opening} {w.rule(w.json(value))} {w.mark(self.end)}"
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
        return f'"{{" {w.present(tool, pair, ",", chr(34) * 2)} "}}"'

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
            return w.rule(w.json(schema))
        raise UserError(
            f"a value of type {kind!r} cannot be enforced in this dialect",
            where=where,
            hint="simplify the schema or drop --constrain",
        )

    def _array(self, w: Writer, schema: Schema, where: str) -> str:
        one = w.rule(self._value(w, schema["items"], f"{where}[]"))
        fewest, most = schema.get("minItems", 0), schema.get("maxItems")
        if most == 0:
            return '"[" "]"'
        upper = "" if most is None else most - 1
        items = f'{one} ("," {one}){{{max(0, fewest - 1)},{upper}}}'
        return w.rule(f'"[" {items} "]"' + ("" if fewest else ' | "[" "]"'))


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
