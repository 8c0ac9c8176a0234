"""Lark rules for llguidance: what the grammars of all tool-call dialects are made of.

The same writer writes two grammars. The *law* takes every spelling of a call: arguments in any order, JSON with white
space of its own. The *usual* grammar is one of these spellings, that of the model's chat template with arguments in the
order of the schema; it leaves less choice, so that most of a call can be proposed before the model has seen it.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from mlxkd.errors import UserError

Tool = dict[str, Any]
Schema = dict[str, Any]
ANY = "(?s:.)"
# Room for a line break and an indentation; without a bound a weak model may write white space for ever.
WHITE = r"[ \n\r\t]{1,16}"
# A character of a JSON string. llguidance's own strings take \uXXXX for control characters only.
PAIR = r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
SINGLE = r"\\u([0-9abcefABCEF][0-9a-fA-F]{3}|[dD][0-7][0-9a-fA-F]{2})"
CHAR = rf'([^"\\\x00-\x1f]|\\["\\\/bfnrt]|{SINGLE}|{PAIR})'
PYTHON_CHAR = rf"([^'\\\x00-\x1f]|\\['\"\\abfnrtv]|\\x[0-9a-fA-F]{{2}}|{SINGLE})"  # between single quotes
# What restricts a value in JSON Schema. Of these, any that is not handled is refused; other keys are notes.
KEYWORDS = frozenset((
    "type", "enum", "const", "allOf", "anyOf", "oneOf", "not", "if", "then", "else", "$ref", "$dynamicRef", "pattern",
    "format", "minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
    "properties", "required", "additionalProperties", "patternProperties", "propertyNames", "unevaluatedProperties",
    "minProperties", "maxProperties", "dependentRequired", "dependentSchemas", "dependencies", "items", "prefixItems",
    "additionalItems", "unevaluatedItems", "contains", "minContains", "maxContains", "uniqueItems", "minItems",
    "maxItems",
))  # fmt: skip
STRING_KEYS = frozenset(("type", "enum", "const", "minLength", "maxLength"))
OBJECT_KEYS = frozenset(("type", "properties", "required", "additionalProperties"))
ARRAY_KEYS = frozenset(("type", "items", "minItems", "maxItems"))
CHOICE_KEYS = frozenset(("type", "enum", "const"))
PYTHON_WORDS = {"boolean": '"True" | "False"', "null": '"None"'}
BITS = 64  # of llguidance's rule parameters: which arguments have been written


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
        usual: one spelling, that of the template and the schemas; else any.
    """

    tools: Sequence[Tool]
    layout: Layout
    split: Callable[[str], list[str]]
    usual: bool
    rules: list[str] = field(default_factory=lambda: [f"WHITE: /{WHITE}/"])
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def rule(self, expression: str, *, suffix: str = "", parameter: str = "") -> str:
        """Add a rule; returns its name."""
        name = self._name()
        attribute = f"[suffix={suffix}]" if suffix else ""
        self.rules.append(f"{name}{parameter}{attribute}: {expression}")
        return name

    def _name(self) -> str:
        return f"r{next(self._numbers)}"

    def mark(self, text: str) -> str:
        """A literal as Lark."""
        return " ".join(self.split(text))

    def space(self, usual: str) -> str:
        """White space that means nothing: ``usual``, or any."""
        return json.dumps(usual) if self.usual else "WHITE?"

    def any_tool(self, one: Callable[[Tool], str]) -> str:
        """A rule for the call of one of the tools."""
        return self.rule(" | ".join(self.rule(one(tool)) for tool in self.tools))

    def json(self, schema: Schema) -> str:
        """A rule for a JSON value: in the order of the schema and the layout's spacing, or in any.

        Objects that are composed (``allOf``, ``$ref``, ...) keep the order of the schema, and so do open ones that
        hold members which it does not declare.
        """
        if not self.usual:
            return self.rule(self._free(schema))
        spacing = {"item_separator": self.layout.item, "key_separator": self.layout.key, "whitespace_flexible": False}
        return self.rule(_guided(schema, spacing))

    def python(self, schema: Schema) -> str:
        """A rule for a JSON value, or for any spelling of it as JSON or as a Python literal."""
        literal = "" if self.usual else self._literal(schema)
        return self.rule(f"{self.json(schema)} | {literal}") if literal else self.json(schema)

    def _literal(self, schema: Schema) -> str:
        """The Python literals of a schema, those that are JSON too perhaps left out; "" where it has no others."""
        kind = schema.get("type")
        if choices := _choices(schema):
            return " | ".join(json.dumps(repr(choice)) for choice in choices) if _only(schema, CHOICE_KEYS) else ""
        if isinstance(kind, list):
            return " | ".join(filter(None, (self._literal({**schema, "type": one}) for one in kind)))
        if kind == "string":
            return f"/'{PYTHON_CHAR}{_length(schema)}'/" if _only(schema, STRING_KEYS) else ""
        if kind in PYTHON_WORDS:
            return PYTHON_WORDS[kind]
        if kind == "array" and "items" in schema and _only(schema, ARRAY_KEYS):
            return self.array(schema, self.python(schema["items"]), "WHITE?", 'WHITE? "," WHITE?')
        if not _has_order(schema):
            return ""
        if "anyOf" in schema:
            return " | ".join(map(self.python, schema["anyOf"]))
        return f'"{{" WHITE? {self._members(schema, self.python, python=True)} WHITE? "}}"'

    def _free(self, schema: Schema) -> str:
        guided = _guided(schema, {"whitespace_pattern": WHITE})
        if is_string(schema) and _only(schema, STRING_KEYS):
            choices = _choices(schema)
            return _either(choices) if choices else f'/"{CHAR}{_length(schema)}"/'
        if not _has_order(schema):
            return guided
        if "anyOf" in schema:
            return " | ".join(map(self.json, schema["anyOf"]))
        if schema["type"] == "array":
            return self.array(schema, self.json(schema["items"]), "WHITE?", 'WHITE? "," WHITE?')
        members = f'"{{" WHITE? {self._members(schema, self.json)} WHITE? "}}"'
        return members if schema.get("additionalProperties") is False else f"{members} | {guided}"

    def _members(self, schema: Schema, one: Callable[[Schema], str], *, python: bool = False) -> str:
        def pair(key: str, value: Schema) -> str:
            name = _either([key]) + (f" | {json.dumps(repr(key))}" if python else "")
            return f'({name}) WHITE? ":" WHITE? {one(value)}'

        return self._any_order(schema, pair, 'WHITE? "," WHITE?', '""')

    def array(self, schema: Schema, one: str, space: str, between: str) -> str:
        """A rule for a list in brackets.

        Args:
            schema: of the list.
            one: rule of an item.
            space: Lark of what may stand inside the brackets.
            between: Lark of the separator.
        """
        fewest, most = schema.get("minItems", 0), schema.get("maxItems")
        nothing = f'"[" {space} "]"'
        if most == 0:
            return self.rule(nothing)
        upper = "" if most is None else most - 1
        items = f'"[" {space} {one} ({between} {one}){{{max(0, fewest - 1)},{upper}}} {space} "]"'
        return self.rule(items + ("" if fewest else f" | {nothing}"))

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
        if choices := _choices(schema):
            misread = [choice for choice in choices if never and re.fullmatch(never[1:-1], choice)]
            if misread and not quoted:
                raise UserError(f"this dialect reads the choice {misread[0]!r} as something else", where=where)
            spelt = [json.dumps(choice) if choice in misread else choice for choice in choices]
            return f"({' | '.join(map(json.dumps, spelt))}) {self.mark(end)}"
        _refuse_others(schema, STRING_KEYS, "of a string cannot be enforced where strings stand raw", where)
        pattern = f"/{char}{_length(schema)}/"
        if never:
            pattern += f" & ~{never}"
        first, *rest = self.split(end)
        if first.startswith("<["):  # no text contains a special token
            written = " ".join([self.rule(pattern), first, *rest])
        else:
            written = " ".join([self.rule(pattern, suffix=first), *rest])
        return f"({written} | {self.json(schema)} {self.mark(end)})" if quoted else written

    def present(self, tool: Tool, pair: Callable[[str, Schema], str], between: str, nothing: str | None) -> str:
        """Arguments, optional ones present or not, with a separator between those present.

        Args:
            tool: whose arguments.
            pair: Lark of one argument, from its name and schema.
            between: Lark of the separator, "" for none.
            nothing: Lark of a call without arguments; None where it takes some other form.

        Raises:
            UserError: the schema asks for what this form cannot be held to.
        """
        schema = arguments(tool)
        _refuse_others(schema, OBJECT_KEYS, "of arguments cannot be enforced in this dialect", str(tool.get("name")))
        if not schema["properties"]:
            return nothing or ""
        order = self._any_order if not self.usual and len(schema["properties"]) <= BITS else self._schema_order
        return order(schema, pair, between, nothing)

    def _schema_order(
        self, schema: Schema, pair: Callable[[str, Schema], str], between: str, nothing: str | None
    ) -> str:
        # "after" follows an argument, "first" none; both are built from the end.
        after, first = '""', nothing
        for name, value in reversed(schema["properties"].items()):
            one, needed = self.rule(pair(name, value)), name in schema.get("required", [])
            begun = f"{one} {after}" if after != '""' else one
            first = self.rule(begun if needed or first is None else f"{begun} | {first}")
            more = self.rule(f"{between} {begun}" if needed else f"{between} {begun} | {after}")
            after = more
        return first or ""

    def _any_order(self, schema: Schema, pair: Callable[[str, Schema], str], between: str, nothing: str | None) -> str:
        """A rule with a bit for each argument that has been written, those of the required ones first."""
        needed = [name for name in schema["properties"] if name in schema.get("required", [])]
        names = needed + [name for name in schema["properties"] if name not in needed]
        pairs = [self.rule(pair(name, schema["properties"][name])) for name in names]
        more = self._name()
        further = [f"{between} {one} {more}::set_bit({bit}) %if bit_clear({bit})" for bit, one in enumerate(pairs)]
        end = f'"" %if is_ones([0:{len(needed)}])' if needed else '""'
        self.rules.append(f"{more}::_: {' | '.join([end, *further])}")
        begin = [f"{one} {more}::{1 << bit:#x}" for bit, one in enumerate(pairs)]
        return self.rule(" | ".join(begin if needed or nothing is None else [*begin, nothing]))


def arguments(tool: Tool) -> Schema:
    """The schema of a tool's arguments, closed to further ones."""
    schema = tool.get("parameters") or {}
    return {"additionalProperties": False, "properties": {}, **schema, "type": "object"}


def is_string(schema: Schema) -> bool:
    """Whether values are strings and nothing else, which tagged dialects write raw."""
    return schema.get("type") == "string"


def _guided(schema: Schema, spacing: dict[str, Any]) -> str:
    """A JSON value by llguidance's own rules."""
    return f"%json {json.dumps({**schema, 'x-guidance': spacing})}"


def _choices(schema: Schema) -> list[Any]:
    return list(schema.get("enum") or ([schema["const"]] if "const" in schema else []))


def _either(texts: Sequence[str]) -> str:
    """JSON strings, characters beyond ASCII as they are or escaped."""
    spelt = [json.dumps(text, ensure_ascii=escaped) for text in texts for escaped in (False, True)]
    return " | ".join(map(json.dumps, dict.fromkeys(spelt)))


def _length(schema: Schema) -> str:
    """The quantifier of a string's characters."""
    shortest, longest = schema.get("minLength", 0), schema.get("maxLength", "")
    return "*" if (shortest, longest) == (0, "") else f"{{{shortest},{longest}}}"


def _has_order(schema: Any) -> bool:
    """Whether a JSON value has members whose order these rules can free."""
    if not isinstance(schema, Mapping):
        return False
    if "anyOf" in schema:
        return _only(schema, {"anyOf"}) and any(map(_has_order, schema["anyOf"]))
    if schema.get("type") == "array":
        return _only(schema, ARRAY_KEYS) and _has_order(schema.get("items"))
    members = schema.get("properties")
    if schema.get("type") != "object" or not members or not _only(schema, OBJECT_KEYS) or len(members) > BITS:
        return False
    return set(schema.get("required", [])) <= set(members) and all(isinstance(v, Mapping) for v in members.values())


def _only(schema: Mapping[str, Any], handled: Set[str]) -> bool:
    return not _others(schema, handled)


def _others(schema: Mapping[str, Any], handled: Set[str]) -> list[str]:
    return [key for key in schema if key in KEYWORDS and key not in handled]


def _refuse_others(schema: Schema, handled: Set[str], why: str, where: str) -> None:
    if strange := _others(schema, handled):
        raise UserError(
            f"{', '.join(map(repr, strange))} {why}", where=where, hint="simplify the schema or drop --constrain"
        )
