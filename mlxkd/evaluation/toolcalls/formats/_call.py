"""A call as one JSON object: {"name": ..., "arguments": {...}}."""

from __future__ import annotations

from mlxkd.evaluation.toolcalls.formats._grammar import Malformed, Piece
from mlxkd.evaluation.toolcalls.formats._json import scan_members, scan_object, scan_value, string_end

ARGUMENTS = ("arguments", "parameters")


def scan_call(text: str, pos: int, out: list[Piece]) -> int:
    """Scan a call object at ``pos``, in either order of its members; returns the index behind it."""
    seen: set[str] = set()

    def member(key: str, start: int, value: int) -> int:
        seen.add(key)
        while value < len(text) and text[value].isspace():
            value += 1
        if key == "name":
            end = string_end(text, value)
            out.append(Piece(value + 1, end - 1, "name"))
            return end
        if key in ARGUMENTS and text.startswith("{", value):
            return scan_object(text, value, (), out)
        return scan_value(text, value, (), [])

    end = scan_members(text, pos, member)
    if "name" not in seen:
        raise Malformed
    return end
