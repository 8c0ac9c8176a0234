"""Kimi K3: ``<|open|>call tool="f" index="1"<|sep|>`` with typed arguments, or one JSON object, in a section."""

from __future__ import annotations

from dataclasses import dataclass

from mlxkd.evaluation.toolcalls.formats._grammar import Piece, expect
from mlxkd.evaluation.toolcalls.formats._json import scan_object
from mlxkd.evaluation.toolcalls.formats._tags import Tags, pattern

_JSON = pattern(r"<\|open\|>json(?:(?!<\|sep\|>).)*<\|sep\|>")


@dataclass(frozen=True)
class KimiK3(Tags):
    """Tags whose arguments may also come as one JSON block."""

    def _arguments(self, text: str, pos: int, pieces: list[Piece]) -> int:
        block = _JSON.match(text, pos)
        if block is None:
            return super()._arguments(text, pos, pieces)
        return expect(text, scan_object(text, block.end(), (), pieces), "<|close|>json<|sep|>")


GRAMMAR = KimiK3(
    open="<|open|>tools<|sep|>",
    close="<|close|>tools<|sep|>",
    head=pattern(r"<\|open\|>call\b(?:(?!<\|sep\|>).)*?\btool=\"(?P<name>[^\"]+)\"(?:(?!<\|sep\|>).)*<\|sep\|>"),
    argument=pattern(r"<\|open\|>argument\b(?:(?!<\|sep\|>).)*?\bkey=\"(?P<key>[^\"]+)\"(?:(?!<\|sep\|>).)*<\|sep\|>"),
    value_end="<|close|>argument<|sep|>",
    call_end="<|close|>call<|sep|>",
    many=True,
)
