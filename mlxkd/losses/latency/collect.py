"""What the latency terms of a recipe need for a batch; nothing, at no cost, when there are none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlxkd.data.batching import Batch
from mlxkd.data.example import Example
from mlxkd.decode.constrained import ToolGrammars
from mlxkd.losses.latency import inputs, missing
from mlxkd.losses.latency.inputs import Automaton, AutomatonOf, Inputs
from mlxkd.losses.term import Term
from mlxkd.students.split import Split


class LatencyInputs:
    """What the latency terms of a loss need, batch by batch.

    Args:
        terms: of the recipe; others are ignored.
        split: of the student; its values at the time of a call count.
        tokenizer: mlx-lm's wrapper.

    Raises:
        UserError: (when called) the tokenizer has no tool calls, a turn carries weight only in part, or tools whose
            schema cannot be followed in the tokenizer's dialect.
    """

    def __init__(self, terms: Sequence[Term], split: Split, tokenizer: Any):
        self._chosen = {term.name: term for term in terms}
        self._split, self._tokenizer = split, tokenizer
        early = self._chosen.get("early_call")
        follows = early is not None and early.options.schema
        self._automaton = required_calls(tokenizer, split.head.rows) if follows else None

    def __call__(self, batch: Batch, examples: Sequence[Example]) -> Inputs:
        """The ``inputs`` of ``loss_and_gradients``; ``batch.rows`` index ``examples``."""
        found: Inputs = {}
        split, tokenizer, chosen = self._split, self._tokenizer, self._chosen
        if "early_call" in chosen:
            opening = inputs.opening_tokens(tokenizer)
            found |= inputs.early_call(batch, examples, opening, split.head.rows, automaton=self._automaton)
        if "expected_length" in chosen:
            margin = chosen["expected_length"].options.margin
            found |= inputs.expected_length(batch, examples, split, inputs.opening_tokens(tokenizer), margin)
        if "rollout_length" in chosen:
            written = missing.of_batch(batch, examples, tokenizer)
            found |= inputs.rollout_length(batch, examples, written, chosen["rollout_length"].options.margin)
        return found


def required_calls(tokenizer: Any, vocabulary: int) -> AutomatonOf:
    """Automata for ``early_call``: the grammar of constrained decoding, beginning where a call opens.

    Compiled once per set of tools and kept.

    Args:
        vocabulary: token ids of the student's head.

    Raises:
        UserError: (when called) a dialect without a grammar or a schema that cannot be enforced.
    """

    grammars = ToolGrammars(tokenizer, vocabulary, "required")

    def automaton(tools: Sequence[dict[str, Any]]) -> Automaton | None:
        grammar = grammars(tools)
        return grammar.matcher() if grammar else None

    return automaton
