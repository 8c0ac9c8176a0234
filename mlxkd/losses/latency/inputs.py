"""Per-position inputs of the latency losses, for ``batch.supervised``.

Coefficients are divided by the position's own loss weight, so that a recipe may give the preamble little weight
(and so stop imitating hesitation) without weakening the losses that act there. The weight must not be 0: such
positions are not computed at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlxkd.data.batching import Batch
from mlxkd.data.example import Example
from mlxkd.errors import UserError
from mlxkd.losses.distribution import softmax
from mlxkd.losses.latency import hazard
from mlxkd.losses.latency.bits import pack
from mlxkd.students.split import Split

Inputs = dict[str, np.ndarray]


class Automaton(Protocol):
    """A grammar along one answer; ``mlxkd.decode`` has them for tool calls."""

    def mask(self) -> np.ndarray | None: ...
    def consume(self, token: int) -> None: ...


AutomatonOf = Callable[[Sequence[dict[str, Any]]], Automaton | None]
"""A fresh grammar for the tools on offer."""


@dataclass(frozen=True)
class EarlyOptions:
    """Where ``early_call`` acts.

    Args:
        positions: only the first so many positions of a turn (25: distillation notes, section 0).
        decay: factor per position, 1 for none.
    """

    positions: int = 25
    decay: float = 0.95


@dataclass(frozen=True)
class _Turn:
    """A supervised turn of one row: flat indices of the positions that predict its tokens, and what they predict.

    Of a turn that a window cuts short only the first positions and tokens are here; its figures are the whole turn's.
    """

    example: Example
    at: np.ndarray
    tokens: np.ndarray
    length: int
    call: int | None  # tokens before the first call
    last: bool

    @property
    def hesitation(self) -> np.ndarray:
        """The positions before its call."""
        return self.at[: self.call or 0]


def opening_tokens(tokenizer: Any) -> tuple[int, ...]:
    """The token with which a call opens.

    Raises:
        UserError: mlx-lm knows no tool calls for this tokenizer.
    """
    tokens = getattr(tokenizer, "tool_call_start_tokens", None)
    if not tokens:
        raise UserError("the tokenizer has no tool calls, so no call can be early", where="loss.early_call")
    return (int(tokens[0]),)


def early_call(
    batch: Batch,
    examples: Sequence[Example],
    opening: Sequence[int],
    vocabulary: int,
    options: EarlyOptions | None = None,
    automaton: AutomatonOf | None = None,
) -> Inputs:
    """Inputs of ``early_call`` for one batch.

    Args:
        batch: its ``rows`` index ``examples``.
        examples: of the same ``Batches``.
        opening: tokens with which a call opens.
        vocabulary: token ids of the student's head.
        automaton: a fresh grammar for the tools on offer, beginning where a call opens; None restricts the
            grammar part to the opening.

    Returns:
        ``early_label`` int32 [N], ``early_prefix``, ``early_grammar``, ``early_avoid`` float32 [N] and
        ``early_allowed`` uint32 [N, ceil(vocabulary / 32)].
    """
    options = options or EarlyOptions()
    size = batch.inputs.size
    label = batch.labels.reshape(-1).astype(np.int32).copy()
    parts = {name: np.zeros(size, np.float32) for name in ("early_prefix", "early_grammar", "early_avoid")}
    start = np.zeros(vocabulary, dtype=bool)
    start[list(opening)] = True
    allowed = np.repeat(pack(start[None]), size, axis=0)
    for turn in _turns(batch, examples):
        tools = turn.example.meta.get("tools") or ()
        if not tools:
            continue
        count = min(options.positions, len(turn.at))
        at = turn.at[:count]
        strength = (options.decay ** np.arange(count) / batch.weights.reshape(-1)[at]).astype(np.float32)
        if turn.call is not None:
            parts["early_prefix"][at] = strength
            label[at[: turn.call]] = opening[0]
            _follow(allowed, turn, at, automaton(tools) if automaton else None)
            inside = len(at) if automaton else min(count, turn.call + 1)
            parts["early_grammar"][at[:inside]] = strength[:inside]
        elif turn.last and turn.example.meta.get("should_call"):
            parts["early_grammar"][at] = strength
        else:
            parts["early_avoid"][at] = strength
    chosen = batch.supervised
    return {"early_label": label[chosen], "early_allowed": allowed[chosen], **{k: v[chosen] for k, v in parts.items()}}


def _follow(allowed: np.ndarray, turn: _Turn, at: np.ndarray, automaton: Automaton | None) -> None:
    """Masks inside the call, as the automaton reads the teacher's tokens."""
    if automaton is None or turn.call is None:
        return
    for index in range(turn.call, len(at)):
        mask = automaton.mask()
        if mask is not None:
            allowed[at[index]] = pack(mask[None])[0]
            if not mask[turn.tokens[index]]:  # behind the call, or not canonical: nothing more to say
                allowed[at[index:]] = np.uint32(0xFFFFFFFF)
                return
        automaton.consume(int(turn.tokens[index]))


def expected_length(
    batch: Batch, examples: Sequence[Example], split: Split, opening: Sequence[int], margin: float = 0.15
) -> Inputs:
    """Inputs of ``expected_length`` for one batch; costs a forward pass where a turn hesitates before its call.

    Required fields are missing as long as the call has not opened: only that stretch counts. The reference is the
    teacher's own call, so a turn that opens with its call is never penalised.

    Returns:
        ``length_value``, ``length_slope`` float32 [N] and ``length_event`` uint32 [N, W].
    """
    vocabulary = split.head.rows
    value, slope = (np.zeros(batch.inputs.size, np.float32) for _ in range(2))
    weights = batch.weights.reshape(-1)
    slow = [turn for turn in _turns(batch, examples) if turn.call]
    if slow:
        probability = event_probability(split, batch, np.concatenate([t.hesitation for t in slow]), opening)
        ends = np.cumsum([len(t.hesitation) for t in slow])
        for turn, h in zip(slow, np.split(probability, ends[:-1]), strict=True):
            at, reference = turn.hesitation, max(1, turn.length - (turn.call or 0))
            loss, rate = hazard.hinge(hazard.expected_positions(h), reference, margin)
            value[at[0]] = loss / weights[at[0]]
            slope[at] = rate * hazard.expected_slope(h) / weights[at]
    event = np.zeros((1, vocabulary), dtype=bool)
    event[0, list(opening)] = True
    chosen = batch.supervised
    words = np.repeat(pack(event), len(chosen), axis=0)
    return {"length_value": value[chosen], "length_slope": slope[chosen], "length_event": words}


def event_probability(split: Split, batch: Batch, at: np.ndarray, event: Sequence[int], rows: int = 256) -> np.ndarray:
    """float32 [len(at)], the student's probability of one of the tokens at flat positions, ``rows`` at a time."""
    states = split.hidden(mx.array(batch.inputs))
    states = states.reshape(-1, states.shape[-1])[mx.array(at)]
    tokens = mx.array(list(event))
    found = []
    for start in range(0, len(at), rows):
        p = softmax(split.head(states[start : start + rows])).p
        found.append(np.array(mx.sum(p[:, tokens], axis=-1)))
    return np.concatenate(found)


def rollout_length(
    batch: Batch, examples: Sequence[Example], missing: Mapping[int, tuple[int, int]], margin: float = 0.15
) -> Inputs:
    """Inputs of ``rollout_length`` for a batch with samples of the student as it is now.

    Args:
        batch: its ``rows`` index ``examples``.
        examples: ``meta["prompt"]`` of a sample says where the student began to write.
        missing: by row, (tokens written while required fields were missing, the teacher's length); see
            ``mlxkd.losses.latency.missing``. Other rows cost nothing.
        margin: tolerated excess, as a share of the teacher's length.

    Returns:
        ``length_advantage`` float32 [N]: the row's hinge minus the mean of the other such rows (leave-one-out, so the
        gradient stays unbiased), on the tokens up to completion; later ones have no part in the cost.
    """
    cost = {row: hazard.hinge(own - teacher, teacher, margin)[0] for row, (own, teacher) in missing.items()}
    total = sum(cost.values())
    advantage = np.zeros(batch.inputs.size, np.float32)
    weights, length = batch.weights.reshape(-1), batch.shape[1]
    for row, (own, _) in missing.items():
        start = examples[batch.rows[row]].meta["prompt"]
        at = row * length + np.arange(start - 1, min(start - 1 + own, length))
        at = at[weights[at] > 0]
        others = (total - cost[row]) / (len(cost) - 1) if len(cost) > 1 else 0.0
        advantage[at] = (cost[row] - others) / weights[at]
    return {"length_advantage": advantage[batch.supervised]}


def _turns(batch: Batch, examples: Sequence[Example]) -> Iterator[_Turn]:
    """The supervised turns that begin in each row; of one that began in an earlier window the losses know nothing.

    Raises:
        UserError: a turn of which only a part carries weight: the losses could not act on the rest.
    """
    length = batch.shape[1]
    for row, index in enumerate(batch.rows):
        example = examples[index]
        if "calls" not in example.meta:
            continue
        turns = list(zip(example.meta["turns"], example.meta["calls"], strict=True))
        for number, ((start, end), call) in enumerate(turns):
            if start < 1:
                continue
            here = min(end, len(example))
            at = row * length + np.arange(start - 1, here - 1)
            carried = batch.weights.reshape(-1)[at] > 0
            if not carried.any():
                continue
            if not carried.all():
                raise UserError(
                    "a part of this turn has weight 0, so the latency losses cannot act on it",
                    where=example.source or None,
                    hint="give it a small weight, such as data.weights.preamble=0.05",
                )
            before = call[0] - start if call is not None else None
            yield _Turn(example, at, example.tokens[start:here], end - start, before, number == len(turns) - 1)
