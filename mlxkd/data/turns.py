"""Find the assistant's turns in what a chat template rendered, whatever the template does.

First by prefixes: the text up to the turn (with its generation prompt) and up to its end usually begin the
text of the whole conversation. Templates that treat the last turn differently (dropping old thoughts, say) break
that; there the common part of the generation prompt counts, or a placeholder is rendered in the turn's stead and
the text around it is matched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlxkd.errors import UserError

Messages = list[dict[str, Any]]
Apply = Callable[[Messages, bool], str | None]
PLACEHOLDER = "placeholderforthisturn"


@dataclass(frozen=True)
class Turn:
    """An assistant message: ``text[start:end]``, from behind the generation prompt to behind the end of turn."""

    message: int
    start: int
    end: int


def find_turns(messages: Messages, apply: Apply, where: str = "") -> tuple[str, list[Turn]]:
    """Render a conversation and locate every assistant message in it.

    Args:
        messages: checked chat messages.
        apply: ``apply(messages, add_generation_prompt) -> text``, or None where the template refuses.

    Returns:
        The rendered text and its assistant turns, in order, disjoint.

    Raises:
        UserError: the template refuses the conversation, or a turn cannot be located.
    """
    text = apply(messages, False)
    if text is None:
        raise UserError("the chat template refuses this conversation", where=where or None)
    turns: list[Turn] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start, end = _locate(messages, index, text, apply)
        if start is None or end is None or start > end or (turns and start < turns[-1].end):
            raise UserError(
                f"messages[{index}] cannot be located in what the chat template renders",
                where=where or None,
                hint="split the conversation so that this is its last message",
            )
        turns.append(Turn(index, start, end))
    return text, turns


def _locate(messages: Messages, index: int, text: str, apply: Apply) -> tuple[int | None, int | None]:
    start = _start(messages, index, text, apply)
    whole = text if index == len(messages) - 1 else apply(messages[: index + 1], False)
    end = len(whole) if whole is not None and text.startswith(whole) else None
    if start is None or end is None:
        around = _around(messages, index, text, apply)
        start = around[0] if start is None else start
        end = around[1] if end is None else end
    return start, end


def _start(messages: Messages, index: int, text: str, apply: Apply) -> int | None:
    if index == 0:
        return None
    head = apply(messages[:index], True)
    if head is None or text.startswith(head):
        return None if head is None else len(head)
    shared = _common(head, text)
    # Do not stop inside a marker that both happen to begin with "<".
    while shared and head[shared - 1] not in "\n>]":
        shared -= 1
    base = apply(messages[:index], False)
    return shared if base is not None and text.startswith(base) and shared > len(base) else None


def _around(messages: Messages, index: int, text: str, apply: Apply) -> tuple[int | None, int | None]:
    stand_in = {"role": "assistant", "content": PLACEHOLDER}
    swapped = apply([*messages[:index], stand_in, *messages[index + 1 :]], False)
    if swapped is None or swapped.count(PLACEHOLDER) != 1:
        return None, None
    before, after = swapped.split(PLACEHOLDER)
    start = len(before) if text.startswith(before) else None
    if not text.endswith(after):
        return start, None
    if index == len(messages) - 1:
        return start, len(text)
    alone = apply([*messages[:index], stand_in], False)
    closing = _common(after, alone.split(PLACEHOLDER)[1]) if alone and alone.count(PLACEHOLDER) == 1 else 0
    return start, len(text) - len(after) + closing


def _common(a: str, b: str) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
