"""``<function name="f"><param name="k">v</param></function>`` without an outer block (MiniCPM5)."""

from __future__ import annotations

from mlxkd.evaluation.toolcalls.formats._tags import Tags, pattern

GRAMMAR = Tags(
    open="<function name=",
    close="</function>",
    head=pattern(r"[\"']?(?P<name>[^\s\"'<>]+)[\"']?\s*>"),
    argument=pattern(r"<param\s+name\s*=\s*[\"']?(?P<key>[^\"'<>]+?)[\"']?\s*>"),
    value_end="</param>",
    call_end="</function>",
)
