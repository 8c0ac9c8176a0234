"""``<tool_call>{"name": ..., "arguments": {...}}</tool_call>`` (Hermes, Qwen 2.5 and 3, and the demo)."""

from __future__ import annotations

from mlxkd.evaluation.toolcalls.formats._call import scan_call
from mlxkd.evaluation.toolcalls.formats._grammar import Body, Piece, expect


class JsonTools:
    """One JSON object between two markers."""

    open = "<tool_call>"
    close = final = "</tool_call>"

    def body(self, text: str, pos: int) -> Body | int:
        """See ``Grammar.body``."""
        pieces: list[Piece] = []
        end = scan_call(text, pos, pieces)
        return Body(pos, end, expect(text, end, self.close), tuple(pieces))


GRAMMAR = JsonTools()
