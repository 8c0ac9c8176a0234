"""What every grammar has in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

Path = tuple[str | int, ...]


class Incomplete(Exception):
    """The text ends before the call does."""


class Malformed(Exception):
    """No continuation can turn this text into a call of the grammar."""


@dataclass(frozen=True)
class Piece:
    """Characters ``[start, end)`` of one kind: "name", "key", "value", "structure" or "end".

    ``path`` says which argument a key or value belongs to, e.g. ``("stops", 0, "city")``.
    """

    start: int
    end: int
    kind: str
    path: Path = ()


@dataclass(frozen=True)
class Body:
    """One complete call (or one list of calls) in the text.

    Args:
        start, end: the characters that mlx-lm's parser is given.
        close: index behind the marker that completes the call.
        pieces: its names, keys and values, in order, without structure.
        last: nothing more of this block follows.
    """

    start: int
    end: int
    close: int
    pieces: tuple[Piece, ...]
    last: bool = True


class Grammar(Protocol):
    """How calls are written.

    Attributes:
        open: the marker that opens a block of calls.
        close: the marker that closes it; "" where the format has none.
        final: what a call ends in; no call is complete before it appears.
    """

    @property
    def open(self) -> str: ...
    @property
    def close(self) -> str: ...
    @property
    def final(self) -> str: ...

    def body(self, text: str, pos: int) -> Body | int:
        """The next call at ``pos`` (behind the opening marker or the call before), or where the block ends.

        Raises:
            Incomplete: the text ends first.
            Malformed: this is no call.
        """
        ...


def expect(text: str, pos: int, marker: str) -> int:
    """The index behind ``marker``, which must stand at ``pos`` after white space."""
    pos = skip_space(text, pos)
    if text.startswith(marker, pos):
        return pos + len(marker)
    raise Incomplete if marker.startswith(text[pos:]) else Malformed


def skip_space(text: str, pos: int) -> int:
    """The index of the next character that is no white space."""
    while pos < len(text) and text[pos].isspace():
        pos += 1
    return pos


def find(text: str, marker: str, pos: int) -> int:
    """The index of ``marker`` at or behind ``pos``; raises Incomplete when it has not come yet."""
    found = text.find(marker, pos)
    if found < 0:
        raise Incomplete
    return found


def with_structure(pieces: tuple[Piece, ...], start: int, end: int, close: int) -> tuple[Piece, ...]:
    """Fill the gaps in ``[start, end)`` with structure; ``[end, close)`` is the end of the call."""
    filled: list[Piece] = []
    for piece in sorted(pieces, key=lambda p: (p.start, p.end)):
        if piece.start > start:
            filled.append(Piece(start, piece.start, "structure"))
        if piece.end > piece.start:
            filled.append(piece)
        start = max(start, piece.end)
    if end > start:
        filled.append(Piece(start, end, "structure"))
    if close > max(start, end):
        filled.append(Piece(max(start, end), close, "end"))
    return tuple(filled)
