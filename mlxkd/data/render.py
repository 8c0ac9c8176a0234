"""Records to examples: the chat template, a loss weight for every token, and what the tokens are."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
import numpy as np

from mlxkd.data.example import Example, Span
from mlxkd.data.offsets import Tokenised, tokenise
from mlxkd.data.records import Record
from mlxkd.data.spans import Required, call_spans, evidence_ranges, evidence_spans, read_turn, weighted
from mlxkd.data.turns import Turn, find_turns
from mlxkd.errors import UserError
from mlxkd.evaluation.toolcalls.parsing import Found, Parser, parser_for


@dataclass(frozen=True)
class RenderOptions:
    """How records become examples.

    Args:
        turns: supervise "all" assistant turns, or only the "last".
        thinking: passed to templates that can open a thinking block (mlx-lm would default to True).
        weights: factors of the loss by kind of span (``mlxkd.data.spans.KINDS``), e.g. ``{"name": 2.0}``.
        direct_calls: share of the records whose calls are rendered without the text before them, so that a student
            which calls at once has seen calls that begin at once. Which records is a function of their source.
        template: further keyword arguments of the chat template.
    """

    turns: str = "all"
    thinking: bool = False
    weights: Mapping[str, float] = field(default_factory=dict)
    direct_calls: float = 0.0
    template: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.turns not in ("all", "last"):
            raise UserError(f"turns must be 'all' or 'last', not {self.turns!r}", where="data.turns")
        if not 0 <= self.direct_calls <= 1:
            raise UserError(f"direct_calls is a share, not {self.direct_calls}", where="data.direct_calls")


def render(record: Record, tokenizer: Any, options: RenderOptions | None = None) -> Example:
    """Render one record.

    Documents supervise every token but the first, and their end. Conversations supervise each assistant turn
    (from behind its generation prompt to its end-of-turn token, that token included); everything else has
    weight 0. A last turn that the template leaves open is closed with the tokenizer's end token: the student
    must learn to stop.

    Args:
        record: from ``load_records``.
        tokenizer: mlx-lm's TokenizerWrapper.

    Raises:
        UserError: no chat template, or a template that refuses the conversation; names the record's line.
    """
    options = options or RenderOptions()
    if record.kind == "text":
        return _document(record, tokenizer)
    if record.kind == "completion" and not tokenizer.has_chat_template:
        return _completion(record, tokenizer)
    return _conversation(record, tokenizer, options)


def render_all(records: Iterable[Record], tokenizer: Any, options: RenderOptions | None = None) -> list[Example]:
    """``render`` for each record, in order."""
    return [render(record, tokenizer, options) for record in records]


def prompt_text(
    messages: list[dict[str, Any]],
    tokenizer: Any,
    tools: Iterable[dict[str, Any]] = (),
    options: RenderOptions | None = None,
    where: str = "",
) -> str:
    """What the model reads before it answers ``messages``: the rendered conversation and the generation prompt."""
    return _apply(messages, True, tokenizer, list(tools), options or RenderOptions(), where)


def conversation(record: Record) -> list[dict[str, Any]]:
    """The messages of a record; a completion becomes a user and an assistant message."""
    if record.kind == "completion":
        return [
            {"role": "user", "content": record.prompt},
            {"role": "assistant", "content": record.completion},
        ]
    return [dict(message) for message in record.messages]


def _document(record: Record, tokenizer: Any) -> Example:
    encoded = tokenise(record.text, tokenizer, special=True, where=record.source)
    tokens = _closed(encoded.ids, tokenizer)
    return Example(tokens, _weights(len(tokens), [(1, len(tokens))]), source=record.source, meta={"kind": "text"})


def _completion(record: Record, tokenizer: Any) -> Example:
    encoded = tokenise(record.prompt + record.completion, tokenizer, special=True, where=record.source)
    start, _ = encoded.cover(len(record.prompt), len(record.prompt) + len(record.completion))
    tokens = _closed(encoded.ids, tokenizer)
    turns = [(max(start, 1), len(tokens))]
    meta = {"kind": "completion", "turns": turns}
    return Example(tokens, _weights(len(tokens), turns), source=record.source, meta=meta)


def _conversation(record: Record, tokenizer: Any, options: RenderOptions) -> Example:
    messages = conversation(record)
    if zlib.crc32(record.source.encode()) < options.direct_calls * 2**32:
        messages = [{**m, "content": ""} if m.get("tool_calls") else m for m in messages]
    tools = list(record.tools)
    if not tokenizer.has_chat_template:
        raise UserError(
            "the tokenizer has no chat template, and this record has messages",
            where=record.source,
            hint='use {"prompt", "completion"} or {"text"} records, or a model folder with a chat template',
        )

    def apply(part: list[dict[str, Any]], generation_prompt: bool) -> str | None:
        try:
            return _apply(part, generation_prompt, tokenizer, tools, options, record.source)
        except UserError:
            if part is messages:
                raise
            return None

    text, turns = find_turns(messages, apply, record.source)
    encoded = tokenise(text, tokenizer, special=False, where=record.source)
    ranges = [_supervised(turn, text, encoded, tokenizer) for turn in turns]
    tokens = encoded.ids
    if turns and turns[-1].message == len(messages) - 1 and not _ends_turn(tokens[slice(*ranges[-1])], tokenizer):
        tokens = _closed(tokens[: ranges[-1][1]], tokenizer)
        ranges[-1] = (ranges[-1][0], len(tokens))
    spans, first_calls, required = _turn_spans(record, messages, text, turns, encoded, parser_for(tokenizer), options)
    spans += [Span(start, end, "turn") for start, end in ranges]
    spans += [Span(e - 1, e, "stop") for s, e in ranges if _ends_turn(tokens[s:e], tokenizer)]
    spans.sort(key=lambda span: (span.start, -span.end))
    supervised = ranges if options.turns == "all" else ranges[-1:]
    weights = weighted(_weights(len(tokens), supervised), spans, options.weights)
    calls_last = bool(first_calls and first_calls[-1])
    meta = {
        "kind": record.kind,
        "turns": ranges,
        "calls": first_calls,
        "required": required,
        "tools": record.tools,
        "should_call": bool(record.extra.get("tool_should_be_used", calls_last)),
    }
    return Example(tokens, weights, tuple(spans), record.source, meta)


def _turn_spans(
    record: Record,
    messages: list[dict[str, Any]],
    text: str,
    turns: list[Turn],
    encoded: Tokenised,
    parser: Parser,
    options: RenderOptions,
) -> tuple[list[Span], list[tuple[int, int] | None], list[Required]]:
    """Spans inside the assistant turns, the token range of each turn's first call (None without one), and what each
    turn must hold."""
    spans: list[Span] = []
    first_calls: list[tuple[int, int] | None] = []
    required: list[Required] = []
    for turn in turns:
        part = text[turn.start : turn.end]
        found = read_turn(part, parser, record.tools)
        _check_calls(messages[turn.message], found, parser, record.source, required=bool(options.weights))
        spans += call_spans(part, turn.start, encoded, found)
        copied = evidence_ranges(part, found, messages[: turn.message])
        spans += evidence_spans(turn.start, encoded, copied)
        names = tuple(call.name for item in found for call in item.calls)
        required.append(Required(names, tuple(part[start:end] for start, end in copied)))
        whole = (turn.start + found[0].start, turn.start + found[0].end) if found else None
        first_calls.append(encoded.cover(*whole) if whole else None)
    return spans, first_calls, required


def _check_calls(
    message: dict[str, Any], found: Sequence[Found], parser: Parser, where: str, *, required: bool
) -> None:
    """Weights on spans that were not found would be no weights at all."""
    written = [call["function"]["name"] for call in message.get("tool_calls") or []]
    read = [call.name for item in found for call in item.calls]
    if required and written != read:
        raise UserError(
            f"the template's tool calls cannot be read as {parser.name!r}: wrote {written}, read {read}",
            where=where or None,
            hint="drop data.weights, or use a chat template whose calls mlx-lm can parse",
        )


def _apply(
    messages: list[dict[str, Any]],
    generation_prompt: bool,
    tokenizer: Any,
    tools: list[dict[str, Any]],
    options: RenderOptions,
    where: str,
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                messages,
                tools=tools or None,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                enable_thinking=options.thinking,
                **options.template,
            )
        )
    # Templates index into messages and call Python methods on them, so their own faults surface as these.
    except (jinja2.TemplateError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise UserError(f"the chat template refuses this conversation: {error}", where=where or None) from error


def _supervised(turn: Turn, text: str, encoded: Tokenised, tokenizer: Any) -> tuple[int, int]:
    """Token range of a turn that the model itself must write: up to its end token, not the template's newline."""
    first, last = encoded.cover(turn.start, turn.end)
    ends = frozenset(int(token) for token in tokenizer.eos_token_ids)
    for position in range(last - 1, first - 1, -1):
        if int(encoded.ids[position]) in ends:
            return max(first, 1), position + 1
    written = text[turn.start : turn.end].rstrip()
    return max(first, 1), encoded.cover(turn.start, turn.start + len(written))[1]


def _ends_turn(tokens: np.ndarray, tokenizer: Any) -> bool:
    return len(tokens) > 0 and int(tokens[-1]) in tokenizer.eos_token_ids


def _closed(tokens: np.ndarray, tokenizer: Any) -> np.ndarray:
    if _ends_turn(tokens, tokenizer) or tokenizer.eos_token_id is None:
        return tokens
    return np.append(tokens, np.int32(tokenizer.eos_token_id)).astype(np.int32)


def _weights(length: int, ranges: list[tuple[int, int]]) -> np.ndarray:
    weights = np.zeros(length, dtype=np.float32)
    for start, end in ranges:
        weights[start:end] = 1.0
    if length:
        weights[0] = 0.0
    return weights
