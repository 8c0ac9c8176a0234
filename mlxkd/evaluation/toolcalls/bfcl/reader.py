"""Read BFCL v4 files: cases, possible answers, and schemas in plain JSON Schema."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
from jsonschema.exceptions import best_match

from mlxkd.errors import UserError, unknown
from mlxkd.evaluation.toolcalls.bfcl.categories import CATEGORIES, IRRELEVANCE, RELEVANCE, language
from mlxkd.evaluation.toolcalls.bfcl.literals import TYPES, WRITE
from mlxkd.evaluation.toolcalls.parsing import Call

PREFIX = "BFCL_v4_"
# BFCL writes Python-like types. Values of Java and JavaScript are strings of source text; their descriptions say so.
JSON_TYPES: dict[str, str | None] = {
    "string": "string",
    "integer": "integer",
    "float": "number",
    "number": "number",
    "boolean": "boolean",
    "array": "array",
    "tuple": "array",
    "dict": "object",
    "object": "object",
    "any": None,
}
FOREIGN = ("simple_java", "simple_javascript")
SYNTAX = {"python": "Python 3", "java": "Java 8 SDK", "javascript": "JavaScript"}
_ITEMS = {"type": "object", "required": ["type"], "properties": {"type": {"type": "string"}}}
_PARAMETER = {
    "type": "object",
    "required": ["type"],
    "properties": {"description": {"type": "string"}, "type": {"type": "string"}},
    "if": {"properties": {"type": {"enum": ["array", "tuple", "Array", "ArrayList"]}}},
    "then": {"required": ["items"], "properties": {"items": _ITEMS}},
}
_FUNCTION = {
    "type": "object",
    "required": ["name", "parameters"],
    "properties": {
        "name": {"type": "string"},
        "description": {"type": "string"},
        "parameters": {
            "type": "object",
            "required": ["properties"],
            "properties": {
                "properties": {"type": "object", "additionalProperties": _PARAMETER},
                "required": {"type": "array", "items": {"type": "string"}},
            },
        },
    },
}
CASE_SHAPE = {
    "type": "object",
    "required": ["id", "question", "function"],
    "properties": {
        "id": {"type": "string"},
        "question": {
            "type": "array",
            "minItems": 1,
            "items": {"type": "array", "items": {"type": "object", "required": ["role", "content"]}},
        },
        "function": {"type": "array", "items": _FUNCTION},
    },
}
# Each member of an allowed object lists its own allowed values (one case of the leaderboard's has a string there).
_OBJECT = {"if": {"type": "object"}, "then": {"additionalProperties": {"type": ["array", "string"]}}}
_ALLOWED = {"type": "array", "items": {**_OBJECT, "items": _OBJECT}}
ANSWER_SHAPE = {
    "type": "object",
    "required": ["id", "ground_truth"],
    "properties": {
        "id": {"type": "string"},
        "ground_truth": {
            "type": "array",
            "items": {
                "type": "object",
                "minProperties": 1,
                "maxProperties": 1,
                "additionalProperties": {"type": "object", "additionalProperties": _ALLOWED},
            },
        },
    },
}
LANGUAGES = {"java": "Java", "javascript": "JavaScript"}


@dataclass(frozen=True)
class Case:
    """One request.

    Args:
        id, category: BFCL's own.
        messages: chat messages of its only turn.
        functions: as in the file, with BFCL's types (the rules need them).
        tools: the same as OpenAI tools with JSON Schemas (templates and grammars need them).
        answers: possible answers, empty where the category has none.
    """

    id: str
    category: str
    messages: tuple[dict[str, Any], ...]
    functions: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...]
    answers: tuple[dict[str, Any], ...]


def categories_in(folder: str | Path) -> tuple[str, ...]:
    """Single-turn categories whose cases lie in a folder."""
    return tuple(c for c in CATEGORIES if (Path(folder) / f"{PREFIX}{c}.json").is_file())


def load_cases(folder: str | Path, category: str) -> list[Case]:
    """Read one category.

    Args:
        folder: holds ``BFCL_v4_<category>.json`` and the answers, either in ``possible_answer/`` under the same
            name (as in the leaderboard's repository) or as ``possible_answer_<category>.json``.
        category: a single-turn category.

    Raises:
        UserError: no such category or file, broken JSON, a case without answer, an unknown type; names file,
            line and field.
    """
    if category not in CATEGORIES:
        raise unknown("BFCL category", category, CATEGORIES)
    folder = Path(folder)
    file = folder / f"{PREFIX}{category}.json"
    answers = {} if category in (*IRRELEVANCE, *RELEVANCE) else _answers(folder, category)
    cases = []
    for where, item in _lines(file, CASE_SHAPE):
        if answers and item["id"] not in answers:
            raise UserError(f"case {item['id']!r} has no possible answer", where=where)
        functions = tuple(item["function"])
        _check_names(answers.get(item["id"], ()), functions, where)
        tools = tuple(as_tool(f, where, language(category)) for f in functions)
        cases.append(
            Case(item["id"], category, tuple(item["question"][0]), functions, tools, answers.get(item["id"], ()))
        )
    return cases


def _answers(folder: Path, category: str) -> dict[str, tuple[dict[str, Any], ...]]:
    beside = folder / f"possible_answer_{category}.json"
    file = beside if beside.is_file() else folder / "possible_answer" / f"{PREFIX}{category}.json"
    return {item["id"]: tuple(item["ground_truth"]) for _, item in _lines(file, ANSWER_SHAPE)}


def _check_names(answers: Sequence[dict[str, Any]], functions: Sequence[dict[str, Any]], where: str) -> None:
    """The rules look up the function of each answer."""
    names = {function["name"] for function in functions}
    for name in (next(iter(answer)) for answer in answers):
        if name not in names:
            raise UserError(f"the possible answer calls {name!r}, which this case does not offer", where=where)


def _lines(file: Path, shape: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    if not file.is_file():
        raise UserError("no such BFCL file", where=str(file))
    validator = jsonschema.Draft202012Validator(shape)
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"broken JSON at column {error.colno}: {error.msg}", where=where) from error
        error = best_match(validator.iter_errors(item))
        if error is not None:
            field = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in error.absolute_path).lstrip(".")
            raise UserError(f"{f'field {field!r}' if field else 'the line'}: {error.message[:200]}", where=where)
        yield where, item


def as_tool(function: dict[str, Any], where: str = "", language: str = "python") -> dict[str, Any]:
    """A BFCL function as an OpenAI tool with a JSON Schema and the leaderboard's remark on its language."""
    field, given = f"{function.get('name')}.parameters", function.get("parameters", {})
    if language in LANGUAGES and isinstance(given, dict):
        properties = given.get("properties", {})
        properties = {k: _as_source(v, f"{field}.{k}", where, language) for k, v in properties.items()}
        given = {**given, "properties": properties}
    parameters = _schema(given, field, where)
    described = {k: v for k, v in function.items() if k in ("name", "description")}
    if "description" in described:
        described["description"] += f" Note that the provided function is in {SYNTAX[language]} syntax."
    return {"type": "function", "function": {**described, "parameters": parameters}}


def _as_source(schema: dict[str, Any], field: str, where: str, language: str) -> dict[str, Any]:
    """A parameter whose value is a string of source text, described as the leaderboard does."""
    name, declared = LANGUAGES[language], schema.get("type")
    if declared not in TYPES[language]:
        raise unknown("type", str(declared), TYPES[language], where=f"{where}: {field}.type")
    text = f"{schema.get('description', '')} "
    if declared == "any":
        text += f"This parameter can be of any type of {name} object in string representation."
    else:
        text += f"This is {name} {declared} type parameter in string representation."
    if declared in ("Array", "ArrayList", "array"):
        text += f" The list elements are of type {schema['items']['type']}; they are not in string representation."
    if declared == "dict" and "properties" in schema:
        text += " The dictionary entries have the following schema; they are not in string representation. "
        text += json.dumps(schema["properties"])
    return {"type": "string", "description": text.lstrip()}


def _schema(schema: Any, field: str, where: str) -> dict[str, Any]:
    if not isinstance(schema, dict):
        raise UserError(f"field {field!r} must be an object", where=where or None)
    out = dict(schema)
    declared = out.pop("type", None)
    if declared is not None:
        if not isinstance(declared, str) or (declared not in JSON_TYPES and not declared[:1].isupper()):
            raise unknown("type", str(declared), JSON_TYPES, where=f"{where}: {field}.type")
        mapped = JSON_TYPES.get(declared, "string")
        out = {"type": mapped, **out} if mapped else out
    if isinstance(out.get("properties"), dict):
        out["properties"] = {k: _schema(v, f"{field}.{k}", where) for k, v in out["properties"].items()}
    if isinstance(out.get("items"), dict):
        out["items"] = _schema(out["items"], f"{field}.items", where)
    return out


def gold_calls(case: Case) -> list[Call]:
    """An answer the rules should accept: ``gold_values``, as source text in a foreign category."""
    return [as_source(case, call) for call in gold_values(case)]


def gold_values(case: Case) -> list[Call]:
    """The first allowed value of every parameter that has one."""
    calls = []
    for answer in case.answers:
        name, allowed = next(iter(answer.items()))
        calls.append(Call(name, {p: _first(values) for p, values in allowed.items() if _choices(values)}))
    return calls


def as_source(case: Case, call: Call) -> Call:
    """The call with its values as source text, where the case is of a foreign category."""
    if case.category not in FOREIGN:
        return call
    properties = case.functions[0]["parameters"]["properties"]
    write = WRITE[language(case.category)]

    def written(name: str, value: Any) -> str:
        schema = properties.get(name, {})
        return write(value, schema.get("type", "any"), schema.get("items", {}).get("type"))

    return Call(call.name, {name: written(name, value) for name, value in call.arguments.items()})


def _choices(values: list[Any]) -> list[Any]:
    return [value for value in values if value != ""]


def _first(values: list[Any]) -> Any:
    choice = _choices(values)[0]
    if isinstance(choice, list):
        return [_members(item) if isinstance(item, dict) else item for item in choice]
    return _members(choice) if isinstance(choice, dict) else choice


def _members(choice: dict[str, list[Any]]) -> dict[str, Any]:
    """Each member of an allowed object lists its own allowed values; anything deeper is literal."""
    return {k: _choices(v)[0] for k, v in choice.items() if _choices(v)}
