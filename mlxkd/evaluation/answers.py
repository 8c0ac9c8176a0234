"""Let a model answer held-out requests, and judge the tool calls it makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from mlxkd.data.render import prompt_text
from mlxkd.decode.engine import Engine
from mlxkd.decode.mlx_session import MlxSession
from mlxkd.decode.requests import GenerateOptions, Request
from mlxkd.evaluation.toolcalls.parsing import parser_for
from mlxkd.evaluation.toolcalls.scoring import CallScore, score


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


def answer_all(
    model: nn.Module,
    tokenizer: Any,
    cases: Sequence[dict[str, Any]],
    *,
    max_tokens: int,
    rows: int,
    on_answer: Callable[[], None] | None = None,
) -> list[Answer]:
    """Greedy answers to every case, ``rows`` of them decoded side by side.

    Args:
        model: float or packed.
        cases: ``{"messages", "tools"}``; the last message is the expected answer.
        on_answer: called once per finished answer.
    """
    parser = parser_for(tokenizer)
    engine = Engine(MlxSession(model, batch_size=min(rows, len(cases))), tokenizer)
    options = GenerateOptions(max_tokens=max_tokens, stop_after_tool_call=False)
    requests = []
    for number, case in enumerate(cases):
        text = prompt_text(list(case["messages"][:-1]), tokenizer, case["tools"])
        tokens = tokenizer.encode(text, add_special_tokens=False)
        requests.append(Request(tuple(tokens), options, name=str(number)))
    texts = {request.name: "" for request in requests}
    for event in engine.run(requests):
        texts[event.request] += event.text
        if event.finish and on_answer:
            on_answer()
    return [
        Answer(
            case["messages"],
            case["tools"],
            texts[str(n)],
            score(case["messages"], case["tools"], texts[str(n)], parser),
        )
        for n, case in enumerate(cases)
    ]
