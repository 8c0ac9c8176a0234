"""JSON with positions: where the keys and leaf values of an object stand."""

from __future__ import annotations

import re
from collections.abc import Callable

from mlxkd.evaluation.toolcalls.formats._grammar import Incomplete, Malformed, Path, Piece, skip_space

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_SCALAR = re.compile(r"-?[0-9][0-9.eE+-]*|true|false|null")
_SCALAR_START = re.compile(r"-|[0-9]|t|f|n")


def scan_value(text: str, pos: int, path: Path, out: list[Piece]) -> int:
    """Scan one JSON value at ``pos``; appends its keys and leaves to ``out`` and returns the index behind it.

    Strings are without their quotes. Raises Incomplete or Malformed (RFC 8259, bar the inside of numbers).
    """
    pos = skip_space(text, pos)
    opening = _at(text, pos)
    if opening == "{":
        return scan_object(text, pos, path, out)
    if opening == "[":
        return _array(text, pos, path, out)
    if opening == '"':
        end = string_end(text, pos)
        out.append(Piece(pos + 1, end - 1, "value", path))
        return end
    match = _SCALAR.match(text, pos)
    if match is None:
        raise Incomplete if _SCALAR_START.match(text, pos) and len(text) - pos < len("false") else Malformed
    if match.end() == len(text) and text[pos] not in "tfn":
        raise Incomplete  # a number may go on
    out.append(Piece(pos, match.end(), "value", path))
    return match.end()


def scan_object(text: str, pos: int, path: Path, out: list[Piece]) -> int:
    """Scan an object whose "{" stands at ``pos``; returns the index behind its "}"."""

    def member(key: str, start: int, value: int) -> int:
        out.append(Piece(start, start + len(key), "key", (*path, key)))
        return scan_value(text, value, (*path, key), out)

    return scan_members(text, pos, member)


def scan_members(text: str, pos: int, member: Callable[[str, int, int], int]) -> int:
    """Walk an object at ``pos``: ``member(key, key start, value start)`` scans a value and returns its end."""
    pos = skip_space(text, pos)
    if _at(text, pos) != "{":
        raise Malformed
    pos = skip_space(text, pos + 1)
    if _at(text, pos) == "}":
        return pos + 1
    while True:
        pos = skip_space(text, pos)
        if _at(text, pos) != '"':
            raise Malformed
        end = string_end(text, pos)
        key, key_start = text[pos + 1 : end - 1], pos + 1
        pos = skip_space(text, end)
        if _at(text, pos) != ":":
            raise Malformed
        pos = skip_space(text, member(key, key_start, pos + 1))
        closing = _at(text, pos)
        pos += 1
        if closing == "}":
            return pos
        if closing != ",":
            raise Malformed


def string_end(text: str, pos: int) -> int:
    """The index behind the string whose opening quote stands at ``pos``."""
    match = _STRING.match(text, pos)
    if match is None:
        raise Incomplete if _at(text, pos) == '"' else Malformed
    return match.end()


def _array(text: str, pos: int, path: Path, out: list[Piece]) -> int:
    pos = skip_space(text, pos + 1)
    if _at(text, pos) == "]":
        return pos + 1
    index = 0
    while True:
        pos = skip_space(text, scan_value(text, pos, (*path, index), out))
        closing = _at(text, pos)
        pos, index = pos + 1, index + 1
        if closing == "]":
            return pos
        if closing != ",":
            raise Malformed


def _at(text: str, pos: int) -> str:
    if pos >= len(text):
        raise Incomplete
    return text[pos]
