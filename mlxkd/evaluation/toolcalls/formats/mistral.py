"""Mistral: ``[TOOL_CALLS]name[ARGS]{...}`` repeated, or ``[TOOL_CALLS][{"name": ..., "arguments": ...}]``."""

from __future__ import annotations

import re

from mlxkd.evaluation.toolcalls.formats._call import scan_call
from mlxkd.evaluation.toolcalls.formats._grammar import Body, Incomplete, Malformed, Piece, skip_space
from mlxkd.evaluation.toolcalls.formats._json import scan_object

_HEADER = re.compile(r"(?:\[TOOL_CALLS\])?(?P<name>[\w-]+)\s*(?:\[CALL_ID\][\w-]*)?\[ARGS\]")
_HEADER_START = re.compile(r"(?:\[TOOL_CALLS\])?[\w-]*\s*(?:\[[\w-]*(?:\][\w-]*)?)?(?:\[\w*)?$")


class Mistral:
    """There is no closing marker: a call is complete with its JSON."""

    open = "[TOOL_CALLS]"
    close = ""
    final = "}"

    def body(self, text: str, pos: int) -> Body | int:
        """See ``Grammar.body``."""
        pos = skip_space(text, pos)
        if pos == len(text):
            raise Incomplete
        if text[pos] == "[" and not text.startswith(self.open[: len(text) - pos], pos):
            return self._list(text, pos)
        header = _HEADER.match(text, pos)
        if header is None:
            raise Incomplete if _HEADER_START.match(text, pos) else Malformed
        pieces = [Piece(header.start("name"), header.end("name"), "name")]
        end = scan_object(text, header.end(), (), pieces)
        return Body(header.start("name"), end, end, tuple(pieces), last=False)

    def _list(self, text: str, start: int) -> Body:
        pieces: list[Piece] = []
        pos = start
        while text[pos] != "]":
            pos = skip_space(text, scan_call(text, skip_space(text, pos + 1), pieces))
            if pos == len(text):
                raise Incomplete
            if text[pos] not in ",]":
                raise Malformed
        return Body(start, pos + 1, pos + 1, tuple(pieces))


GRAMMAR = Mistral()
