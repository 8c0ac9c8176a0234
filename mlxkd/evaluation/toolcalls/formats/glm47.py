"""``<tool_call>name<arg_key>k</arg_key><arg_value>v</arg_value></tool_call>`` (GLM 4.5 to 4.7)."""

from __future__ import annotations

from mlxkd.evaluation.toolcalls.formats._tags import Tags, pattern

GRAMMAR = Tags(
    open="<tool_call>",
    close="</tool_call>",
    head=pattern(r"(?P<name>[^\s<>]+)(?=\s*<(?:arg_key>|/tool_call>))"),
    argument=pattern(r"<arg_key>\s*(?P<key>[^<>]*?)\s*</arg_key>(?:\\n|\s)*<arg_value>"),
    value_end="</arg_value>",
    call_end="</tool_call>",
)
