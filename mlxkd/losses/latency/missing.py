"""How long a student's sample goes on while required fields are missing.

Required are the calls of the teacher's turn, each complete and valid for its tool, and the facts that the turn copies
from tool results. What comes after the last of them costs nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlxkd.data.batching import Batch
from mlxkd.data.example import Example
from mlxkd.data.spans import Required
from mlxkd.decode.detokenize import Detokenizer, detokenizer_factory
from mlxkd.evaluation.toolcalls import schema
from mlxkd.evaluation.toolcalls.parsing import Cursor, Parser, parser_for


def tokens_missing(
    tokens: np.ndarray, required: Required, tools: Sequence[dict[str, Any]], parser: Parser, text_of: Detokenizer
) -> int | None:
    """Tokens of an answer up to and with the one that completes its required fields; None when they never are.

    Args:
        tokens: int [n], the answer.
        required: what it needs.
        tools: on offer.
        parser: of the tokenizer's calls.
        text_of: a fresh detokenizer.
    """
    cursor, left = Cursor(parser, tools), Counter(required.calls)
    for count, token in enumerate(tokens, 1):
        piece = text_of.add(int(token)) + (text_of.finish() if count == len(tokens) else "")
        left.subtract(
            call.name for item in cursor.feed(piece) for call in item.calls if schema.fault(call, tools) is None
        )
        if all(n <= 0 for n in left.values()) and all(fact in cursor.text for fact in required.evidence):
            return count
    return None


def of_batch(batch: Batch, examples: Sequence[Example], tokenizer: Any) -> dict[int, tuple[int, int]]:
    """For each row that the student has just written and that has required fields: (its tokens while they were missing,
    tokens of the teacher's turn without what stands before its call).

    A sample that never gets there counts as one that went on for the whole budget: stopping short is no way out.

    Args:
        batch: its ``rows`` index ``examples``.
        examples: those of the data, then the samples; a sample's ``meta["origin"]`` is the index of the example whose
            turn it answers anew, ``meta["prompt"]`` where it begins, ``meta["budget"]`` the most tokens it might have.
        tokenizer: mlx-lm's wrapper.
    """
    parser, new = parser_for(tokenizer), detokenizer_factory(tokenizer)
    found: dict[int, tuple[int, int]] = {}
    for row, index in enumerate(batch.rows):
        sample = examples[index]
        if "origin" not in sample.meta:
            continue
        source, start = examples[sample.meta["origin"]], sample.meta["prompt"]
        asked = _turn(source, start)
        if asked is None:
            continue
        required, reference = asked
        own = tokens_missing(sample.tokens[start:], required, source.meta["tools"], parser, new())
        found[row] = (sample.meta["budget"] if own is None else own, reference)
    return found


def _turn(source: Example, start: int) -> tuple[Required, int] | None:
    """What the turn that begins at a token requires, and the tokens that the teacher needs for it."""
    meta = source.meta
    if "required" not in meta:
        return None
    for (first, end), call, required in zip(meta["turns"], meta["calls"], meta["required"], strict=True):
        if first == start and (required.calls or required.evidence):
            return required, max(1, end - (call[0] if call else first))
    return None
