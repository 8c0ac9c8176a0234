"""Generation for a notebook cell or a command: one prompt in, a stream of events out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mlxkd.decode.engine import Drafter, DraftLength, Engine, Statistics
from mlxkd.decode.prefill import PrefixStore
from mlxkd.decode.requests import Event, Finish, GenerateOptions, Request
from mlxkd.decode.session import Session


@dataclass(frozen=True)
class Completion:
    """A whole answer.

    Args:
        text: its text, without the end-of-turn token.
        tokens: its tokens, end-of-turn included.
        finish: why it ended.
        statistics: what it took; None when several answers shared the engine.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Finish | None
    statistics: Statistics | None = None


def generate(
    session: Session,
    tokenizer: Any,
    prompt_tokens: Sequence[int],
    options: GenerateOptions | None = None,
    *,
    drafter: Drafter | None = None,
    length: DraftLength | None = None,
    cache: PrefixStore | None = None,
) -> Iterator[Event]:
    """Decode one request on a session of any backend; yields one event per token.

    Args:
        session: the worker; its first row is used and reset.
        tokenizer: mlx-lm's wrapper or a transformers tokenizer.
        prompt_tokens: at least one token.
        options: see ``GenerateOptions``.
        drafter, length: speculation, see ``mlxkd.decode.drafting``.
        cache: prompt cache of this worker.

    Raises:
        ContextOverflow: the prompt does not fit.
        UserError: an empty prompt, or a drafter on a session that cannot rewind.
    """
    engine = Engine(session, tokenizer, drafter=drafter, length=length, cache=cache)
    prompt = tuple(int(token) for token in prompt_tokens)
    yield from engine.run([Request(prompt, options or GenerateOptions())])


def collect(events: Iterable[Event], statistics: Statistics | None = None) -> dict[str, Completion]:
    """Join the events of one or more requests into completions, by request name."""
    found: dict[str, list[Event]] = {}
    for event in events:
        found.setdefault(event.request, []).append(event)
    return {
        name: Completion(
            "".join(e.text for e in own),
            tuple(e.token for e in own),
            tuple(e.logprob for e in own),
            own[-1].finish,
            statistics,
        )
        for name, own in found.items()
    }


def complete(engine: Engine, prompt_tokens: Sequence[int], options: GenerateOptions | None = None) -> Completion:
    """Decode one request to its end on an engine of one's own making."""
    request = Request(tuple(int(t) for t in prompt_tokens), options or GenerateOptions())
    return collect(engine.run([request]), engine.statistics)[request.name]
