"""``<tool_call><function=name><parameter=key>value</parameter></function></tool_call>`` (Qwen3-Coder, Qwen3.5)."""

from __future__ import annotations

from mlxkd.evaluation.toolcalls.formats._tags import Tags, pattern

GRAMMAR = Tags(
    open="<tool_call>",
    close="</tool_call>",
    head=pattern(r"<function=(?P<name>[^\s<>]+)>"),
    argument=pattern(r"<parameter=(?P<key>[^\s<>]+)>"),
    value_end="</parameter>",
    call_end="</function>",
)
