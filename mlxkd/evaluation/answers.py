"""Let a model answer held-out requests, and judge the tool calls it makes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxkd.data.render import prompt_text
from mlxkd.decode.draft_length import FixedLength
from mlxkd.decode.drafting import GrammarDrafter
from mlxkd.decode.engine import Engine
from mlxkd.decode.mlx_session import MlxSession
from mlxkd.decode.requests import Constraint, GenerateOptions, Request
from mlxkd.evaluation.toolcalls.parsing import parser_for
from mlxkd.evaluation.toolcalls.scoring import CallScore, score
from mlxkd.runtime import row_streams

FEW = 4  # beyond, the rows without a forced token pay more for the widest draft than it saves (measured)
GrammarOf = Callable[[Sequence[dict[str, Any]]], Constraint | None]
"""The constraint for the tools on offer; None where there are none."""
FORCED = 15  # tokens that a grammar forces are all accepted: a longer draft only saves model steps


@dataclass(frozen=True)
class Answer:
    """What a model wrote to one request.

    Args:
        messages: the conversation, ending in the expected answer.
        tools: the tools on offer.
        text: what the model wrote.
        score: how it compares with the expected answer.
    """

    messages: Sequence[dict[str, Any]]
    tools: Sequence[dict[str, Any]]
    text: str
    score: CallScore


def cut_to_answers(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One case per assistant turn: the conversation up to and including it."""
    turns = [i for i, message in enumerate(record["messages"]) if message["role"] == "assistant"]
    return [{**record, "messages": record["messages"][: i + 1]} for i in turns]


def engine_for(model: nn.Module, tokenizer: Any, rows: int, *, constrained: bool) -> Engine:
    """An engine that fast-forwards what a grammar forces, where that pays and the model can rewind."""
    session = MlxSession(model, batch_size=rows)
    if not (constrained and session.can_rewind and rows <= FEW):
        return Engine(session, tokenizer)
    return Engine(session, tokenizer, drafter=GrammarDrafter(), length=FixedLength(FORCED))


def write_all(
    model: nn.Module,
    tokenizer: Any,
    conversations: Sequence[dict[str, Any]],
    *,
    max_tokens: int,
    rows: int,
    grammar: GrammarOf | None = None,
    on_answer: Callable[[], None] | None = None,
) -> list[str]:
    """What a model writes, greedily, to every conversation; ``rows`` of them are decoded side by side.

    On a CPU each core takes a share of the rows: MLX's quantised kernels run on one.

    Args:
        model: float or packed.
        conversations: ``{"messages", "tools"}`` up to the answer, and "source" for faults.
        grammar: the constraint for the tools on offer; None leaves answers free.
        on_answer: called once per finished answer, by one thread at a time.

    Raises:
        UserError: a conversation that the chat template refuses, or tools that cannot be enforced.
    """
    if not conversations:
        return []
    requests = []
    for number, case in enumerate(conversations):
        text = prompt_text(list(case["messages"]), tokenizer, case["tools"], where=case.get("source", ""))
        tokens = tokenizer.encode(text, add_special_tokens=False)
        constraint = grammar(case["tools"]) if grammar else None
        options = GenerateOptions(max_tokens=max_tokens, stop_after_tool_call=False, constraint=constraint)
        requests.append(Request(tuple(tokens), options, name=str(number)))
    parts = min(len(row_streams()), rows, len(requests))
    texts = {request.name: "" for request in requests}
    turn, stopped = threading.Lock(), threading.Event()

    def decode(part: int) -> None:
        share = requests[part::parts]
        engine = engine_for(model, tokenizer, min(rows // parts, len(share)), constrained=grammar is not None)
        for event in engine.run(share):
            texts[event.request] += event.text
            if stopped.is_set():
                return
            if event.finish and on_answer:
                with turn:
                    on_answer()

    if parts == 1:
        decode(0)
        return list(texts.values())
    mx.eval(model.parameters())  # a thread has streams of its own and cannot compute what another has begun
    with ThreadPoolExecutor(parts) as pool:
        try:
            list(pool.map(decode, range(parts)))
        finally:
            stopped.set()  # a part that fails, or Ctrl-C, ends the others
    return list(texts.values())


def answer_all(
    model: nn.Module,
    tokenizer: Any,
    cases: Sequence[dict[str, Any]],
    *,
    max_tokens: int,
    rows: int,
    grammar: GrammarOf | None = None,
    on_answer: Callable[[], None] | None = None,
) -> list[Answer]:
    """``write_all`` for cases whose last message is the expected answer, and how each compares with it."""
    parser = parser_for(tokenizer)
    asked = [{**case, "messages": case["messages"][:-1]} for case in cases]
    texts = write_all(model, tokenizer, asked, max_tokens=max_tokens, rows=rows, grammar=grammar, on_answer=on_answer)
    return [
        Answer(case["messages"], case["tools"], text, score(case["messages"], case["tools"], text, parser))
        for case, text in zip(cases, texts, strict=True)
    ]
