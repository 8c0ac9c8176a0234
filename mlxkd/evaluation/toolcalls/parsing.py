"""Tool calls in generated text, complete or still being written."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlxkd import compat, registry
from mlxkd.evaluation.toolcalls import formats
from mlxkd.evaluation.toolcalls.formats._grammar import (
    Body,
    Grammar,
    Incomplete,
    Malformed,
    Piece,
    with_structure,
)

Tools = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Call:
    """A tool's name and its arguments."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Found:
    """A call (or one list of calls) that stands in the text.

    Args:
        start, end: its characters, markers included; ``end`` is where it became complete.
        calls: what mlx-lm's parser read; empty when it could not.
        fault: why it could not, or None.
        pieces: names, keys, values, structure and end marker; empty where the grammar did not fit.
    """

    start: int
    end: int
    calls: tuple[Call, ...]
    fault: str | None = None
    pieces: tuple[Piece, ...] = ()


@dataclass(frozen=True)
class Parser:
    """Reads the calls of one format: a grammar of ours for where, mlx-lm's parser for what."""

    name: str
    grammar: Grammar

    def read(self, text: str, tools: Tools = ()) -> tuple[list[Found], int | None]:
        """All complete calls of a text, and where an unfinished one opens (None when nothing is open)."""
        cursor = Cursor(self, tools)
        return cursor.feed(text), cursor.pending

    def parse(self, body: str, tools: Tools) -> tuple[tuple[Call, ...], str | None]:
        """mlx-lm's reading of a finished body: calls, or why there are none."""
        try:
            parsed = compat.tool_parser(self.name)(body, list(tools) or None)
        # The parsers index into whatever the model wrote; all of these mean "not a call".
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, SyntaxError, RecursionError) as error:
            return (), f"unreadable: {error}"
        items = parsed if isinstance(parsed, list) else [parsed]
        calls = tuple(call for item in items if (call := _call(item)) is not None)
        return (calls, None) if calls and len(calls) == len(items) else ((), "no object with a name and arguments")


def _call(item: Any) -> Call | None:
    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        return None
    arguments = item.get("arguments", item.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            return None
    return Call(item["name"], arguments) if isinstance(arguments, dict) else None


class Cursor:
    """Reads a growing text and reports each call at the feed that completes it.

    Attributes:
        text: everything fed so far.
        opened: where the first call opened, or None.
        inside: a block of calls is open.
        complete: the open block holds a complete call, so nothing in it is unfinished yet.
    """

    def __init__(self, parser: Parser, tools: Tools = ()):
        self.parser, self.tools = parser, tools
        self.text = ""
        self.opened: int | None = None
        self.inside = False
        self.complete = False
        self._block = 0  # where the open block, or the search for one, begins
        self._position = 0  # behind the last call read in it
        self._seen = 0

    def feed(self, text: str) -> list[Found]:
        """Append text; returns the calls that it completes."""
        self._seen = len(self.text)
        self.text += text
        found: list[Found] = []
        while self._step(found):
            pass
        return found

    @property
    def pending(self) -> int | None:
        """Where an unfinished call opens; None when nothing is open."""
        return self._block if self.inside and not self.complete else None

    def _step(self, found: list[Found]) -> bool:
        grammar = self.parser.grammar
        if not self.inside:
            return self._open(grammar)
        if not self._may_complete(grammar):
            return False
        try:
            body = grammar.body(self.text, self._position)
        except Incomplete:
            return False
        except Malformed:
            return self._malformed(grammar, found)
        if isinstance(body, int):
            self._leave(body)
            return True
        found.append(self._read(body, grammar))
        self._position, self.complete = body.close, True
        if body.last:
            self._leave(body.close)
        return True

    def _may_complete(self, grammar: Grammar) -> bool:
        """Nothing completes before its last marker has come: only new text with one is worth a scan."""
        markers = (grammar.final, grammar.close) if grammar.close else ("}", "]")
        since = self._seen - max(map(len, markers))
        return any(self.text.find(marker, max(self._position, since)) >= 0 for marker in markers)

    def _open(self, grammar: Grammar) -> bool:
        start = self.text.find(grammar.open, self._block)
        if start < 0:
            self._block = max(self._block, len(self.text) - len(grammar.open) + 1)
            return False
        self.inside, self.complete = True, False
        self._block, self._position = start, start + len(grammar.open)
        self._seen = min(self._seen, self._position)
        if self.opened is None:
            self.opened = start
        return True

    def _leave(self, position: int) -> None:
        self.inside, self.complete = False, False
        self._block = self._position = position

    def _read(self, body: Body, grammar: Grammar) -> Found:
        start = self._block if not self.complete else self._position
        calls, fault = self.parser.parse(self.text[body.start : body.end], self.tools)
        end = body.end if body.end < body.close else body.close - len(grammar.final) * bool(grammar.close)
        pieces = with_structure(body.pieces, start, end, body.close)
        return Found(start, body.close, calls, fault, pieces)

    def _malformed(self, grammar: Grammar, found: list[Found]) -> bool:
        """Text that does not fit still goes to mlx-lm's parser, which may be more lenient, once the block closes."""
        if not grammar.close and self.complete:  # plain text behind a call ends the block
            self._leave(self._position)
            return True
        end = self.text.find(grammar.close, self._position) if grammar.close else len(self.text)
        if end < 0:
            return False
        calls, fault = self.parser.parse(self.text[self._position : end], self.tools)
        found.append(Found(self._block, end + len(grammar.close), calls, fault))
        self._leave(end + len(grammar.close))
        return True


@functools.cache
def parser_named(name: str) -> Parser:
    """The parser of a format, by mlx-lm's name for it.

    Raises:
        UserError: no such format; names the nearest.
    """
    return Parser(name, registry.member(formats, name, kind="tool-call format").GRAMMAR)


def parser_for(tokenizer: Any) -> Parser:
    """The parser of a tokenizer's calls; JSON between ``<tool_call>`` tags where mlx-lm knows none."""
    return parser_named(compat.tool_format(tokenizer) or "json_tools")
