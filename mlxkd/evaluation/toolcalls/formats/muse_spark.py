"""``<atem:function_calls><atem:invoke name="f"><atem:parameter name="k">v</atem:parameter></atem:invoke>…``."""

from __future__ import annotations

from mlxkd.evaluation.toolcalls.formats._tags import Tags, pattern

GRAMMAR = Tags(
    open="<atem:function_calls>",
    close="</atem:function_calls>",
    head=pattern(r"<atem:invoke\b[^>]*?\bname=\"(?P<name>[^\"]+)\">"),
    argument=pattern(r"<atem:parameter\b[^>]*?\bname=\"(?P<key>[^\"]+)\"[^>]*?>"),
    value_end="</atem:parameter>",
    call_end="</atem:invoke>",
    many=True,
)
