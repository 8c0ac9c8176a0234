"""Java and JavaScript literals as JSON values, and back: BFCL's foreign categories pass arguments as source text.

Specification: ``java_type_converter.py`` and ``js_type_converter.py`` of bfcl-eval 2026.3.23, quirks included (elements
are split at every comma, a Java array of strings keeps their quotes); the tests compare verdicts with that checker.
What is no literal of the declared type stays the text it is: the name of a variable, usually.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

JAVA: dict[str, type] = {
    "byte": int,
    "short": int,
    "integer": int,
    "long": int,
    "float": float,
    "double": float,
    "boolean": bool,
    "char": str,
    "String": str,
    "any": str,
    "Array": list,
    "ArrayList": list,
    "HashMap": dict,
}
JAVASCRIPT: dict[str, type] = {
    "integer": int,
    "Bigint": int,
    "float": float,
    "Boolean": bool,
    "String": str,
    "any": str,
    "array": list,
    "dict": dict,
}
_NUMBER = r"-?\d+(\.\d+)?([eE][+-]?\d+)?"
_JAVA_NUMBERS = {
    "byte": r"-?\d+$",
    "short": r"-?\d+$",
    "integer": r"-?\d+$",
    "long": r"-?\d+[lL]$",
    "float": _NUMBER + r"[fF]$",
    "double": _NUMBER + "$",
}
_JAVASCRIPT_NUMBERS = {"integer": r"-?\d+$", "Bigint": r"-?\d+n$", "float": r"-?\d+(\.\d+)?$"}
_AS_LIST = re.compile(r"new\s+ArrayList<\w*>\(Arrays\.asList\((.+?)\)\)")
_ADDED = re.compile(r"new\s+ArrayList<\w*>\(\)\s*\{\{\s*(.+?)\s*\}\}", re.DOTALL)
_EMPTY_LIST = re.compile(r"new\s+ArrayList<\w*>\(\)")
_ARRAY = re.compile(r"new\s+\w+\[\]\s*\{(.*?)\}")
_MAP = re.compile(r"new\s+HashMap<.*?>\s*\(\)\s*\{\s*\{?\s*(.*?)\s*\}?\s*\}", re.DOTALL)
_EMPTY_MAP = re.compile(r"new\s+HashMap<.*?>\s*\(\)")
_ROWS = re.compile(r"\[\s*\[.*?\]\s*(,\s*\[.*?\]\s*)*\]|\bnew\s+Array\(\s*\[.*?\]\s*(,\s*\[.*?\]\s*)*\)")
_LIST = re.compile(r"\[(.*?)\]|\bnew\s+Array\((.*?)\)")
_OBJECT = re.compile(r"\{(.*?)\}")
_PAIR = re.compile(r"([^:]+):\s*(.*?)(?:,\s*(?=[^,]+:)|$)")


def java(text: str, declared: str, inner: str | None = None) -> Any:
    """The value of a Java expression of a declared type; ``inner`` is the type of an array's elements."""
    if declared in _JAVA_NUMBERS:
        return JAVA[declared](text.rstrip().rstrip("lLfF")) if re.match(_JAVA_NUMBERS[declared], text) else text
    if declared == "boolean":
        return text == "true" if text in ("true", "false") else text
    if declared == "ArrayList":
        return _java_list(text, inner)
    if declared == "Array":
        found = _ARRAY.search(text)
        return [_java_element(x, inner) for x in _parts(found[1]) if x] if found else text
    if declared == "HashMap":
        found = _MAP.search(text)
        if found:
            return {k: _untyped_java(v.strip()) for k, v in re.findall(r"put\(\"(.*?)\",\s*(.*?)\)", found[1])}
        return {} if _EMPTY_MAP.search(text) else text
    return text


def _java_list(text: str, inner: str | None) -> Any:
    given = _AS_LIST.search(text)
    if given:
        items = _parts(given[1])
    elif added := _ADDED.search(text):
        items = [item.strip() for item in re.findall(r"add\((.+?)\)", added[1])]
    else:
        return [] if _EMPTY_LIST.search(text) else text
    return [item[1:-1] if inner in ("char", "String") else _java_element(item, inner) for item in items]


def _java_element(text: str, inner: str | None) -> Any:
    return java(text, inner) if inner else _untyped_java(text)


def _untyped_java(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    if text.startswith('"') and text.endswith('"'):
        return text[1:-1]
    for kind in ("long", "float"):
        if re.match(_JAVA_NUMBERS[kind], text):
            return java(text, kind)
    return _number(text)


def javascript(text: str, declared: str, inner: str | None = None) -> Any:
    """The value of a JavaScript expression of a declared type; ``inner`` is the type of an array's elements."""
    if declared in _JAVASCRIPT_NUMBERS:
        fits = re.match(_JAVASCRIPT_NUMBERS[declared], text)
        return JAVASCRIPT[declared](text.rstrip().rstrip("n")) if fits else text
    if declared == "Boolean":
        return text == "true" if text in ("true", "false") else text
    if declared == "String":
        return text[1:-1] if _quoted(text) else text
    if declared == "array":
        return _javascript_list(text.strip(), inner)
    if declared == "dict":
        return _javascript_object(text.strip())
    return text


def _javascript_list(text: str, inner: str | None) -> Any:
    rows = _ROWS.match(text)
    if rows:
        found = [row.strip() for row in re.findall(r"\[(.*?)\]", rows[0])]
        found[:1] = [found[0].removeprefix("[")]  # the outer bracket belongs to no row
        return [[_untyped_javascript(item) for item in row.split(",")] for row in found]
    one = _LIST.match(text)
    if one is None or (inner is not None and inner not in JAVASCRIPT):
        return text
    items = _parts(next(group for group in one.groups() if group is not None))
    items = [] if items == [""] else items
    return [javascript(item, inner) if inner else _untyped_javascript(item) for item in items]


def _javascript_object(text: str) -> Any:
    found = _OBJECT.match(text)
    if text == "{}" or found is None:
        return {} if text == "{}" else text
    made: dict[str, Any] = {}
    for key, value in _PAIR.findall(found[1]):
        value = value.strip()
        if value.startswith("[") and value.endswith("]"):
            made[key.strip().strip("'\"")] = _javascript_list(value, None)
        elif value.startswith("{") and value.endswith("}"):
            made[key.strip().strip("'\"")] = _javascript_object(value)
        else:
            made[key.strip().strip("'\"")] = _untyped_javascript(value.strip("'\""))
    return made


def _untyped_javascript(text: str) -> Any:
    text = text.strip()
    if text in ("true", "false"):
        return text == "true"
    return text[1:-1] if _quoted(text) else _number(text)


def _quoted(text: str) -> bool:
    return any(text.startswith(mark) and text.endswith(mark) for mark in ('"', "'"))


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:  # not of this kind; what is of neither stays text
            continue
    return text


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def java_source(value: Any, declared: str, inner: str | None = None) -> str:
    """Java source for a JSON value: what a model should write for it."""
    if isinstance(value, list):
        items = ", ".join(_java_item(item, inner) for item in value)
        return f"new ArrayList<>(Arrays.asList({items}))" if declared == "ArrayList" else f"new Object[]{{{items}}}"
    if isinstance(value, dict):
        puts = " ".join(f'put("{key}", {_java_item(item, None)});' for key, item in value.items())
        return f"new HashMap<String, Object>() {{{{ {puts} }}}}"
    suffix = {"long": "L", "float": "f"}.get(declared, "") if not isinstance(value, str | bool) else ""
    return (value if isinstance(value, str) else json.dumps(value)) + suffix


def _java_item(value: Any, inner: str | None) -> str:
    return json.dumps(value) if isinstance(value, str) else java_source(value, inner or "any")


def javascript_source(value: Any, declared: str, inner: str | None = None) -> str:
    """JavaScript source for a JSON value: what a model should write for it."""
    if declared == "Bigint" and isinstance(value, int):
        return f"{value}n"
    return value if isinstance(value, str) else json.dumps(value)


READ: dict[str, Callable[[str, str, str | None], Any]] = {"java": java, "javascript": javascript}
WRITE: dict[str, Callable[[Any, str, str | None], str]] = {"java": java_source, "javascript": javascript_source}
TYPES: dict[str, dict[str, type]] = {"java": JAVA, "javascript": JAVASCRIPT}
