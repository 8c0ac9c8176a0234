"""Kimi K2: a section of ``functions.name:0`` with JSON arguments, each call with markers of its own."""

from __future__ import annotations

import re

from mlxkd.evaluation.toolcalls.formats._grammar import Body, Malformed, Piece, expect, find
from mlxkd.evaluation.toolcalls.formats._json import scan_object

_NAME = re.compile(r"\s*(?:functions\.)?(?P<name>.+?):\d+\s*$", re.DOTALL)


class KimiK2:
    """Calls between ``<|tool_call_begin|>`` and ``<|tool_call_end|>`` inside a section."""

    open = "<|tool_calls_section_begin|>"
    close = "<|tool_calls_section_end|>"
    final = "<|tool_call_end|>"

    def body(self, text: str, pos: int) -> Body | int:
        """See ``Grammar.body``."""
        try:
            return expect(text, pos, self.close)
        except Malformed:
            start = expect(text, pos, "<|tool_call_begin|>")
        marker = "<|tool_call_argument_begin|>"
        header_end = find(text, marker, start)
        name = _NAME.match(text[start:header_end])
        if name is None:
            raise Malformed
        pieces = [Piece(start + name.start("name"), start + name.end("name"), "name")]
        end = scan_object(text, header_end + len(marker), (), pieces)
        return Body(start, end, expect(text, end, self.final), tuple(pieces), last=False)


GRAMMAR = KimiK2()
