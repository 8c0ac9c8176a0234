"""What the tokens of an assistant turn are: preamble, name, key, value, structure, end of a call, evidence, stop.

The preamble is what is written before the first call of a turn (thinking aloud).

Spans are found in the rendered text, by the same grammars that watch generation, and carried to tokens by the
characters each token covers; a token on a border belongs to both sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxkd.data.example import Span
from mlxkd.data.offsets import Tokenised
from mlxkd.errors import unknown
from mlxkd.evaluation.toolcalls.evidence import mentions, tool_facts
from mlxkd.evaluation.toolcalls.parsing import Found, Parser


@dataclass(frozen=True)
class Required:
    """What an answer must hold: calls of these tools, in any order, and these facts, copied from tool results."""

    calls: tuple[str, ...] = ()
    evidence: tuple[str, ...] = ()


CALL_KINDS = ("name", "key", "value", "structure", "end")
KINDS = ("turn", "preamble", *CALL_KINDS, "evidence", "stop")


def call_spans(text: str, start: int, encoded: Tokenised, found: Sequence[Found]) -> list[Span]:
    """Spans of the calls that were read in ``text``, which begins at character ``start`` of the rendering."""
    pieces = [(start + piece.start, start + piece.end, piece.kind) for item in found for piece in item.pieces]
    # Only white space before the call is the template's, not the model's hesitation.
    if found and text[: found[0].start].strip():
        pieces.append((start, start + found[0].start, "preamble"))
    return _spans(encoded, pieces)


def evidence_ranges(text: str, found: Sequence[Found], before: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    """Characters of facts in the answer (outside calls) that stand in a tool result of the messages before."""
    ranges = sorted({r for fact in tool_facts(before) for r in mentions(fact, text)})
    return _merged([(s, e) for s, e in ranges if not any(item.start < e and s < item.end for item in found)])


def evidence_spans(start: int, encoded: Tokenised, ranges: Sequence[tuple[int, int]]) -> list[Span]:
    """Spans of such facts in an answer that begins at character ``start`` of the rendering."""
    return _spans(encoded, [(start + s, start + e, "evidence") for s, e in ranges])


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for start, end in ranges:
        if out and start < out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out


def _spans(encoded: Tokenised, ranges: list[tuple[int, int, str]]) -> list[Span]:
    covered = ((encoded.cover(start, end), kind) for start, end, kind in ranges)
    return [Span(first, last, kind) for (first, last), kind in covered if last > first]


def read_turn(text: str, parser: Parser, tools: Sequence[dict[str, Any]]) -> list[Found]:
    """The complete calls of one turn's text."""
    return parser.read(text, tools)[0]


def weighted(weights: np.ndarray, spans: Sequence[Span], factors: Mapping[str, float]) -> np.ndarray:
    """Multiply loss weights by the factor of their span's kind; a token of several kinds takes the largest.

    Args:
        weights: float32 [n].
        factors: by kind, e.g. ``{"name": 2.0, "value": 2.0, "evidence": 1.5}``; other tokens keep their weight.

    Raises:
        UserError: a kind that does not exist.
    """
    for kind in factors:
        if kind not in KINDS:
            raise unknown("span kind", kind, KINDS, where="data.weights")
    factor = np.full(weights.shape, -np.inf, dtype=np.float32)
    for span in spans:
        if span.kind in factors:
            part = factor[span.start : span.end]
            np.maximum(part, np.float32(factors[span.kind]), out=part)
    return (weights * np.where(np.isfinite(factor), factor, 1.0)).astype(np.float32)
