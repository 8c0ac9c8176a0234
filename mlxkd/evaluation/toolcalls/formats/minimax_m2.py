"""``<minimax:tool_call><invoke name="f"><parameter name="k">v</parameter></invoke>…</minimax:tool_call>``."""

from __future__ import annotations

from mlxkd.evaluation.toolcalls.formats._tags import Tags, pattern

GRAMMAR = Tags(
    open="<minimax:tool_call>",
    close="</minimax:tool_call>",
    head=pattern(r"<invoke name=[\"']?(?P<name>[^\s\"'<>]+)[\"']?>"),
    argument=pattern(r"<parameter name=[\"']?(?P<key>[^\"'<>]+?)[\"']?>"),
    value_end="</parameter>",
    call_end="</invoke>",
    many=True,
)
