"""Tokens with the text each of them covers, for any tokenizer."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxkd.compat import plain_tokenizer
from mlxkd.errors import UserError

REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Tokenised:
    """Text as tokens.

    Args:
        ids: int32 [n].
        starts, ends: int64 [n]; token i covers characters ``[starts[i], ends[i])`` of the text. Bytes of one
            character that are split over several tokens all cover that character; a special token that stands
            for no text covers nothing.
    """

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def cover(self, start: int, end: int) -> tuple[int, int]:
        """Token range ``[first, last)`` that touches characters ``[start, end)``; empty ranges touch nothing."""
        if start >= end:
            position = bisect.bisect_left(self.ends, start + 1)
            return position, position
        first = bisect.bisect_right(self.ends, start)
        last = bisect.bisect_left(self.starts, end, lo=first)
        return first, max(first, last)


def tokenise(text: str, tokenizer: Any, *, special: bool, where: str = "") -> Tokenised:
    """Encode ``text`` and say which characters each token covers.

    Args:
        text: what to encode.
        tokenizer: mlx-lm's TokenizerWrapper, or anything with Hugging Face's encode and decode.
        special: let the tokenizer add its own beginning-of-text token (not after a chat template, which did).

    Raises:
        UserError: the tokens do not spell the text, so spans in it would lie.
    """
    inner = plain_tokenizer(tokenizer)
    if getattr(inner, "is_fast", False):
        # Text longer than the model is cut into rows later; Hugging Face would warn about it here.
        encoded = inner(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        offsets = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        return Tokenised(np.array(encoded["input_ids"], dtype=np.int32), *_monotone(offsets[:, 0], offsets[:, 1]))
    ids = list(inner.encode(text, add_special_tokens=special))
    starts, ends = _decoded_offsets(ids, text, inner, where)
    return Tokenised(np.array(ids, dtype=np.int32), *_monotone(starts, ends))


def _monotone(starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # A token without text (an added beginning or end) is reported as (0, 0); search needs rising borders.
    empty = (ends <= starts) & (ends == 0)
    ends = np.maximum.accumulate(np.where(empty, 0, ends))
    starts = np.where(empty, np.minimum(np.maximum.accumulate(np.where(empty, 0, starts)), ends), starts)
    return starts, ends


def _decoded_offsets(ids: list[int], text: str, tokenizer: Any, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Offsets by decoding a growing run of tokens and matching it with the text."""
    starts, ends = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64)
    position, anchor = 0, 0
    special = frozenset(_special_ids(tokenizer))
    for i, token in enumerate(ids):
        starts[i] = position
        # From the anchor on, the decoded run is `text[ends[anchor - 1]:...]`; an unfinished character decodes
        # to U+FFFD and keeps the run open.
        piece = _piece_text(tokenizer, ids, anchor, i + 1)
        begin = int(ends[anchor - 1]) if anchor else 0
        whole = piece.rstrip(REPLACEMENT) if not text.startswith(piece, begin) else piece
        if not text.startswith(whole, begin):
            if token not in special:
                raise UserError(f"token {i} ({piece!r}) does not spell the text it encodes", where=where or None)
            ends[i], anchor = begin, i + 1  # an added token, which stands for no text
            continue
        position = begin + len(whole)
        ends[i] = position if whole == piece else min(position + 1, len(text))
        if whole == piece:
            anchor = i + 1
    return starts, np.maximum.accumulate(ends)


def _piece_text(tokenizer: Any, ids: list[int], start: int, stop: int) -> str:
    """Text of tokens [start, stop), decoded behind a neighbour so that no leading space is lost."""
    if start == 0:
        return str(tokenizer.decode(ids[:stop]))
    before = str(tokenizer.decode(ids[start - 1 : start]))
    return str(tokenizer.decode(ids[start - 1 : stop]))[len(before) :]


def _special_ids(tokenizer: Any) -> Iterable[int]:
    return getattr(tokenizer, "all_special_ids", ()) or ()
