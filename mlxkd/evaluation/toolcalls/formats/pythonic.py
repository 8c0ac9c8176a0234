"""``<|tool_call_start|>[name(key="value", n=2), ...]<|tool_call_end|>`` (LFM2, Llama 4 style)."""

from __future__ import annotations

import ast
import re

from mlxkd.evaluation.toolcalls.formats._grammar import Body, Malformed, Path, Piece, find

_QUOTES = re.compile(r"[rRbBuUfF]*('''|\"\"\"|'|\")")


class Pythonic:
    """A Python list of calls with keyword arguments; JSON's true, false and null are allowed."""

    open = "<|tool_call_start|>"
    close = final = "<|tool_call_end|>"

    def body(self, text: str, pos: int) -> Body | int:
        """See ``Grammar.body``."""
        end = find(text, self.close, pos)
        pieces = tuple(_Reader(text[pos:end], pos).pieces())
        return Body(pos, end, end + len(self.close), pieces)


class _Reader:
    def __init__(self, source: str, offset: int):
        lead = len(source) - len(source.lstrip())
        self.source, self.offset = source[lead:], offset + lead
        self.lines = [0]
        for line in self.source.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))
        self.out: list[Piece] = []

    def pieces(self) -> list[Piece]:
        try:
            tree = ast.parse(self.source, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise Malformed from error
        if not isinstance(tree, ast.List) or not tree.elts:
            raise Malformed
        for call in tree.elts:
            if not isinstance(call, ast.Call) or call.args:
                raise Malformed
            self._add(call.func, "name", ())
            for keyword in call.keywords:
                if keyword.arg is None:
                    raise Malformed
                start = self._index(keyword.lineno, keyword.col_offset)
                self.out.append(Piece(start, start + len(keyword.arg), "key", (keyword.arg,)))
                self._value(keyword.value, (keyword.arg,))
        return self.out

    def _value(self, node: ast.expr, path: Path) -> None:
        if isinstance(node, ast.List | ast.Tuple):
            for i, item in enumerate(node.elts):
                self._value(item, (*path, i))
        elif isinstance(node, ast.Dict):
            for key, item in zip(node.keys, node.values, strict=True):
                if not isinstance(key, ast.Constant):
                    raise Malformed
                inner = (*path, str(key.value))
                self._add(key, "key", inner)
                self._value(item, inner)
        else:
            self._add(node, "value", path)

    def _add(self, node: ast.expr, kind: str, path: Path) -> None:
        start = self._index(node.lineno, node.col_offset)
        end = self._index(node.end_lineno or node.lineno, node.end_col_offset or node.col_offset)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            quotes = _QUOTES.match(self.source, start - self.offset)
            if quotes:
                start, end = self.offset + quotes.end(), end - len(quotes[1])
        self.out.append(Piece(start, end, kind, path))

    def _index(self, line: int, column: int) -> int:
        """ast counts columns in UTF-8 bytes of a line."""
        first = self.lines[line - 1]
        text = self.source[first : self.lines[line]] if line < len(self.lines) else self.source[first:]
        return self.offset + first + len(text.encode()[:column].decode())


GRAMMAR = Pythonic()
