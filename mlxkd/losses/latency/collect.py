"""What the latency terms of a recipe need for a batch; nothing, at no cost, when there are none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlxkd.data.batching import Batch
from mlxkd.data.example import Example
from mlxkd.decode.constrained import ToolGrammars
from mlxkd.losses.latency import inputs
from mlxkd.losses.latency.inputs import Automaton, AutomatonOf, Inputs
from mlxkd.losses.term import Term
from mlxkd.students.split import Split


def inputs_for(
    terms: Sequence[Term],
    batch: Batch,
    examples: Sequence[Example],
    split: Split,
    tokenizer: Any,
    automaton: AutomatonOf | None = None,
) -> Inputs:
    """The ``inputs`` of ``loss_and_gradients`` for the terms ``early_call`` and ``expected_length``.

    Args:
        terms: of the recipe; others are ignored.
        batch: its ``rows`` index ``examples``.
        examples: ``Batches.examples``.
        split: of the student, as it is now.
        tokenizer: mlx-lm's wrapper.
        automaton: see ``mlxkd.losses.latency.inputs.early_call``.

    Raises:
        UserError: the tokenizer has no tool calls, or a turn carries weight only in part.
    """
    chosen = {term.name: term for term in terms}
    found: Inputs = {}
    if "early_call" in chosen:
        opening = inputs.opening_tokens(tokenizer)
        found |= inputs.early_call(batch, examples, opening, split.head.rows, automaton=automaton)
    if "expected_length" in chosen:
        margin = chosen["expected_length"].options.margin
        opening = inputs.opening_tokens(tokenizer)
        found |= inputs.expected_length(batch, examples, split, opening, margin)
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
