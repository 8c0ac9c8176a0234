"""Calls written as tags: a head with the name, then arguments with key and raw value."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mlxkd.evaluation.toolcalls.formats._grammar import Body, Incomplete, Malformed, Piece, expect, find, skip_space


@dataclass(frozen=True)
class Tags:
    """A grammar of tags.

    Args:
        open, close: markers of the block.
        head: regular expression of what stands before the arguments, with a group "name".
        argument: what stands before a value, with a group "key".
        value_end: marker behind a value.
        call_end: marker behind the arguments of one call.
        many: the block holds several calls; its ``close`` then stands behind the last.
    """

    open: str
    close: str
    head: re.Pattern[str]
    argument: re.Pattern[str]
    value_end: str
    call_end: str
    many: bool = False

    @property
    def final(self) -> str:
        """Calls of a shared block are complete one by one, a lone call with its block."""
        return self.call_end if self.many else self.close

    def body(self, text: str, pos: int) -> Body | int:
        """See ``Grammar.body``."""
        start = skip_space(text, pos)
        if self.many and text.startswith(self.close, start):
            return start + len(self.close)
        head = self.head.match(text, start)
        if head is None:
            # Tags are closed by ">" or a marker; a call that was never closed cannot be told from one to come.
            raise Incomplete if text.find(self.call_end, start) < 0 else Malformed
        pieces = [Piece(*head.span("name"), "name")]
        end = self._arguments(text, head.end(), pieces)
        close = expect(text, end, self.call_end)
        if self.many:
            return Body(start, close, close, tuple(pieces), last=False)
        if self.call_end == self.close:
            return Body(pos, end, close, tuple(pieces))
        return Body(pos, close, expect(text, close, self.close), tuple(pieces))

    def _arguments(self, text: str, pos: int, pieces: list[Piece]) -> int:
        while argument := self.argument.match(text, pos):
            key = (argument["key"],)
            pieces.append(Piece(*argument.span("key"), "key", key))
            end = find(text, self.value_end, argument.end())
            start, stop = _without_newlines(text, argument.end(), end)
            pieces.append(Piece(start, stop, "value", key))
            pos = end + len(self.value_end)
        return pos


def _without_newlines(text: str, start: int, end: int) -> tuple[int, int]:
    # Templates put a value on lines of its own; those two newlines are not part of it.
    start += text.startswith("\n", start, end)
    return start, end - (end > start and text[end - 1] == "\n")


def pattern(expression: str) -> re.Pattern[str]:
    """Compile with white space allowed in front."""
    return re.compile(r"\s*" + expression, re.DOTALL)
