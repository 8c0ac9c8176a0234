"""Text in, tokens out: batch encoding and chat templates rendered once per conversation."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlxkd.compat import plain_tokenizer
from mlxkd.errors import UserError

RENDER_CACHE = 256
"""Rendered conversations kept, least recently used first out."""


class Prompts:
    """Prompts of one tokenizer.

    Args:
        tokenizer: mlx-lm's wrapper or a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._rendered: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        self.hits = 0

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer can render a conversation."""
        inner = self.tokenizer
        return bool(getattr(inner, "has_chat_template", getattr(inner, "chat_template", None)))

    def raw(self, text: str) -> tuple[int, ...]:
        """Tokens of plain text; the beginning-of-text token comes first where the tokenizer has one.

        Raises:
            UserError: an empty text for a tokenizer without that token.
        """
        bos = self.tokenizer.bos_token_id
        tokens = list(self.tokenizer.encode(text, add_special_tokens=False)) if text else []
        if bos is not None and tokens[:1] != [bos]:
            tokens.insert(0, bos)
        if not tokens:
            raise UserError("the prompt is empty and this tokenizer has no beginning-of-text token")
        return tuple(tokens)

    def raw_batch(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """``raw`` of many texts in one call of the tokenizer."""
        inner = plain_tokenizer(self.tokenizer)
        encoded = inner(list(texts), add_special_tokens=False)["input_ids"] if texts else []
        bos = self.tokenizer.bos_token_id
        found = []
        for tokens in encoded:
            needs = bos is not None and tokens[:1] != [bos]
            found.append((bos, *tokens) if needs else tuple(tokens))
        if any(not tokens for tokens in found):
            raise UserError("a prompt is empty and this tokenizer has no beginning-of-text token")
        return found

    def chat(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None
    ) -> tuple[int, ...]:
        """Tokens of a conversation, ready for the assistant's turn; thinking is off where the template has it.

        Raises:
            UserError: no chat template, or one that refuses these messages.
        """
        if not self.has_template:
            raise UserError("this tokenizer has no chat template", hint="pass --raw to decode plain text")
        key = json.dumps([messages, tools], sort_keys=True, ensure_ascii=False)
        if key in self._rendered:
            self.hits += 1
            self._rendered.move_to_end(key)
            return self._rendered[key]
        tokens = self._render(list(messages), list(tools) if tools else None)
        self._rendered[key] = tokens
        if len(self._rendered) > RENDER_CACHE:
            self._rendered.popitem(last=False)
        return tokens

    def _render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> tuple[int, ...]:
        from jinja2.exceptions import TemplateError

        try:
            rendered = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=True, add_generation_prompt=True, enable_thinking=False
            )
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"the chat template refuses these messages: {error}") from error
        tokens = rendered["input_ids"] if hasattr(rendered, "keys") else rendered
        return tuple(int(token) for token in tokens)


def read_tools(path: Path) -> list[dict[str, Any]]:
    """Tools from a JSON list, in OpenAI form; bare function schemas are wrapped.

    Raises:
        UserError: no JSON list, or an entry without a name; names the entry.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read as JSON: {error}", where=str(path)) from error
    if not isinstance(found, list):
        raise UserError("expected a JSON list of tools", where=str(path))
    return [_tool(entry, f"{path}[{i}]") for i, entry in enumerate(found)]


def _tool(entry: Any, where: str) -> dict[str, Any]:
    inner = entry.get("function", entry) if isinstance(entry, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise UserError("a tool needs a name", where=where, hint='{"name": ..., "parameters": {...}}')
    return {"type": "function", "function": inner}
