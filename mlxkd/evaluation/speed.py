"""Answer requests under the clock: the engine's own tokens, on the kernels the model was loaded with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxkd.data.render import prompt_text
from mlxkd.decode.engine import Engine
from mlxkd.decode.mlx_session import MlxSession
from mlxkd.decode.requests import GenerateOptions, Request
from mlxkd.evaluation.clocks import RequestClock, Timing
from mlxkd.evaluation.toolcalls.parsing import parser_for
from mlxkd.evaluation.toolcalls.scoring import expected_calls


def time_answers(
    model: nn.Module,
    tokenizer: Any,
    cases: Sequence[dict[str, Any]],
    *,
    max_tokens: int,
    rows: int = 1,
    options: GenerateOptions | None = None,
) -> list[tuple[Timing, str]]:
    """Greedy answers with their timings, in the order of the cases.

    Args:
        model: float or packed; packed ones run on their quantised kernels.
        cases: ``{"messages", "tools"}``; the last message is the expected answer and is not shown.
        max_tokens: new tokens at most.
        rows: requests decoded together. Latencies describe a lone request only with 1; counts of tokens and
            steps do not depend on it.
        options: replaces the greedy default; ``max_tokens`` is taken from here then.
    """
    engine = Engine(MlxSession(model, batch_size=min(rows, max(1, len(cases)))), tokenizer)
    options = options or GenerateOptions(max_tokens=max_tokens, stop_after_tool_call=False)
    parser = parser_for(tokenizer)
    clocks: dict[str, RequestClock] = {}
    texts = [""] * len(cases)
    waiting = list(range(len(cases)))
    while waiting or engine.rows:
        while waiting and engine.free_rows:
            number = waiting.pop(0)
            case = cases[number]
            should_call = bool(expected_calls(case["messages"][-1]))
            clock = clocks[str(number)] = RequestClock(parser, case["tools"], should_call=should_call)
            text = prompt_text(list(case["messages"][:-1]), tokenizer, case["tools"])
            prompt = tuple(tokenizer.encode(text, add_special_tokens=False))
            clock.mark("tokenize")
            engine.admit(Request(prompt, options, name=str(number)))
            mx.synchronize()  # the prompt's work is only queued when admit returns
            clock.mark("prefill")
        for event in engine.step():
            clocks[event.request].token(event.token, event.text, step=event.forward, at=event.time_ns * 1e-9)
            texts[int(event.request)] += event.text
    return [(clocks[str(number)].finish(), text) for number, text in enumerate(texts)]
