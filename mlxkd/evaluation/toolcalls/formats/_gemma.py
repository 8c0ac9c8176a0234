"""Gemma's calls: ``call:name{key:value,...}`` with bare keys and a marker around strings."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mlxkd.evaluation.toolcalls.formats._grammar import (
    Body,
    Incomplete,
    Malformed,
    Path,
    Piece,
    expect,
    find,
    skip_space,
)

_NAME = re.compile(r"(?P<name>[\w.-]+)\{")
_KEY = re.compile(r"\s*(?P<key>[^\s:{}\[\],]+):")
_SCALAR = re.compile(r"[^,{}\[\]<]+")


@dataclass(frozen=True)
class Gemma:
    """A block of calls between ``open`` and ``close``; ``quote`` stands on both sides of a string."""

    open: str
    close: str
    quote: str

    @property
    def final(self) -> str:
        """The closing marker completes a call."""
        return self.close

    def body(self, text: str, pos: int) -> Body | int:
        """See ``Grammar.body``."""
        start = pos
        pieces: list[Piece] = []
        while True:
            pos = expect(text, pos, "call:")
            head = _NAME.match(text, pos)
            if head is None:
                raise Incomplete if "{" not in text[pos:] else Malformed
            pieces.append(Piece(*head.span("name"), "name"))
            end = self._object(text, head.end(), (), pieces)
            pos = skip_space(text, end)
            if not text.startswith("call:", pos):
                return Body(start, end, expect(text, end, self.close), tuple(pieces))

    def _object(self, text: str, pos: int, path: Path, out: list[Piece]) -> int:
        if text.startswith("}", skip_space(text, pos)):
            return skip_space(text, pos) + 1
        while True:
            key = _KEY.match(text, pos)
            if key is None:
                raise Incomplete if re.fullmatch(r"\s*[^\s:{}\[\],]*", text[pos:]) else Malformed
            inner = (*path, key["key"])
            out.append(Piece(*key.span("key"), "key", inner))
            pos, closed = _separator(text, self._value(text, key.end(), inner, out), "}")
            if closed:
                return pos

    def _array(self, text: str, pos: int, path: Path, out: list[Piece]) -> int:
        if text.startswith("]", skip_space(text, pos)):
            return skip_space(text, pos) + 1
        index = 0
        while True:
            pos, closed = _separator(text, self._value(text, pos, (*path, index), out), "]")
            index += 1
            if closed:
                return pos

    def _value(self, text: str, pos: int, path: Path, out: list[Piece]) -> int:
        pos = skip_space(text, pos)
        if text.startswith(self.quote, pos):
            start = pos + len(self.quote)
            end = find(text, self.quote, start)
            out.append(Piece(start, end, "value", path))
            return end + len(self.quote)
        if text.startswith("{", pos):
            return self._object(text, pos + 1, path, out)
        if text.startswith("[", pos):
            return self._array(text, pos + 1, path, out)
        scalar = _SCALAR.match(text, pos)
        if scalar is None:
            raise Incomplete if self.quote.startswith(text[pos:]) else Malformed
        if scalar.end() == len(text):
            raise Incomplete
        out.append(Piece(*scalar.span(), "value", path))
        return scalar.end()


def _separator(text: str, pos: int, closing: str) -> tuple[int, bool]:
    pos = skip_space(text, pos)
    if pos == len(text):
        raise Incomplete
    if text[pos] not in ("," + closing):
        raise Malformed
    return pos + 1, text[pos] == closing
