"""``<longcat_tool_call>name<longcat_arg_key>k</longcat_arg_key><longcat_arg_value>v</longcat_arg_value>…``."""

from __future__ import annotations

from dataclasses import dataclass

from mlxkd.evaluation.toolcalls.formats._call import scan_call
from mlxkd.evaluation.toolcalls.formats._grammar import Body, Piece, expect, skip_space
from mlxkd.evaluation.toolcalls.formats._tags import Tags, pattern


@dataclass(frozen=True)
class Longcat(Tags):
    """Tags, or one JSON object (the only way to call without arguments that mlx-lm reads)."""

    def body(self, text: str, pos: int) -> Body | int:
        """See ``Grammar.body``."""
        if not text.startswith("{", skip_space(text, pos)):
            return super().body(text, pos)
        pieces: list[Piece] = []
        end = scan_call(text, pos, pieces)
        return Body(pos, end, expect(text, end, self.close), tuple(pieces))


GRAMMAR = Longcat(
    open="<longcat_tool_call>",
    close="</longcat_tool_call>",
    head=pattern(r"(?P<name>[^\s<>{]+)(?=\s*<(?:longcat_arg_key>|/longcat_tool_call>))"),
    argument=pattern(r"<longcat_arg_key>\s*(?P<key>[^<>]*?)\s*</longcat_arg_key>(?:\\n|\s)*<longcat_arg_value>"),
    value_end="</longcat_arg_value>",
    call_end="</longcat_tool_call>",
)
