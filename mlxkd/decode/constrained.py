"""Tool calls that always parse and fit their schema: a grammar per dialect, through llguidance.

Text is free until the tag that opens a call; from there the grammar leaves only what the offered tools
allow. What it leaves no choice about can be drafted without a drafter (``GrammarDrafter``).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from mlxkd import compat
from mlxkd.decode.dialects import DIALECTS
from mlxkd.decode.lark import Layout, Writer
from mlxkd.errors import UserError

Mode = Literal["auto", "required"]


class ToolGrammar:
    """A constraint: text and calls of the offered tools in the dialect of a tokenizer.

    Args:
        tokenizer: mlx-lm's wrapper, with a known tool parser.
        tools: in OpenAI form or bare function schemas.
        vocab_size: width of the model's head (padding tokens beyond the tokenizer are never allowed).
        mode: "auto" allows text without a call, "required" begins with a call.
        guide: from ``guidance_tokenizer``, when it is there already.

    Raises:
        UserError: no tools, a dialect without a grammar, or a schema with constraints that cannot be
            enforced (named); nothing is ignored silently.
    """

    def __init__(
        self,
        tokenizer: Any,
        tools: Sequence[dict[str, Any]],
        vocab_size: int,
        mode: Mode = "auto",
        guide: Any = None,
    ):
        import llguidance

        if not tools:
            raise UserError("constrained calls need at least one tool", hint="pass --tools FILE")
        plain = [tool.get("function", tool) for tool in tools]
        self._tokenizer = guide or guidance_tokenizer(tokenizer, vocab_size)
        self.source = tool_grammar(tokenizer, plain, self._tokenizer, mode)
        self.vocab_size = vocab_size
        usual = tool_grammar(tokenizer, plain, self._tokenizer, mode, usual=True)
        self._law, self._usual = (llguidance.grammar_from("lark", source) for source in (self.source, usual))
        fault = llguidance.LLMatcher.validate_grammar(self._law, self._tokenizer)
        if fault:
            raise UserError(f"these tools cannot be enforced: {fault}", hint="simplify the schema or drop --constrain")

    def matcher(self) -> GuidanceMatcher:
        """See ``Constraint.matcher``."""
        import llguidance

        law, usual = (llguidance.LLMatcher(self._tokenizer, grammar) for grammar in (self._law, self._usual))
        return GuidanceMatcher(law, usual, self.vocab_size)


class ToolGrammars:
    """Grammars of one tokenizer, one per set of tools, each compiled once and kept for the next request with it.

    Args:
        tokenizer, vocab_size, mode: see ``ToolGrammar``.
        kept: sets of tools at most; the one unused for longest goes first.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, mode: Mode = "auto", kept: int = 512):
        self._tokenizer, self._vocab_size, self._mode = tokenizer, vocab_size, mode
        self._guide: Any = None
        self._compiled = functools.lru_cache(maxsize=kept)(self._compile)

    def __call__(self, tools: Sequence[dict[str, Any]]) -> ToolGrammar | None:
        """The grammar for the tools on offer; None without tools, when there is nothing to constrain.

        Raises:
            UserError: see ``ToolGrammar``.
        """
        return self._compiled(json.dumps(list(tools))) if tools else None

    @property
    def compiled(self) -> int:
        """Grammars compiled so far."""
        return self._compiled.cache_info().misses

    def _compile(self, tools: str) -> ToolGrammar:
        if self._guide is None:
            self._guide = guidance_tokenizer(self._tokenizer, self._vocab_size)
        return ToolGrammar(self._tokenizer, json.loads(tools), self._vocab_size, self._mode, self._guide)


class GuidanceMatcher:
    """llguidance's matchers behind our protocol: the law decides, the usual spelling only proposes.

    Args:
        law: of all spellings.
        usual: of one of them, followed as long as the answer keeps to it.
        vocab_size: width of the masks.
    """

    def __init__(self, law: Any, usual: Any, vocab_size: int):
        self._law, self._usual, self._vocab_size = law, usual, vocab_size
        self._strayed = 0  # tokens since the answer left the usual spelling

    def mask(self) -> np.ndarray:
        """bool[V]."""
        packed = np.frombuffer(self._law.compute_bitmask(), dtype=np.uint8)
        bits = np.unpackbits(packed, bitorder="little")[: self._vocab_size].astype(bool)
        return bits if len(bits) == self._vocab_size else np.pad(bits, (0, self._vocab_size - len(bits)))

    def accepts(self, token: int) -> bool:
        """See ``Matcher.accepts``."""
        return bool(self._law.validate_tokens([token]) == 1)

    def consume(self, token: int) -> None:
        """See ``Matcher.consume``.

        Raises:
            ValueError: the grammar does not allow this token.
        """
        if not self._law.consume_token(token):
            raise ValueError(f"token {token} is outside the grammar: {self._law.get_error()[:200]}")
        if self._strayed or self._usual.validate_tokens([token]) != 1:
            self._strayed += 1
        else:
            self._usual.consume_token(token)

    def rollback(self, tokens: int) -> None:
        """See ``Matcher.rollback``."""
        if not tokens:
            return
        followed = max(0, tokens - self._strayed)
        self._strayed -= tokens - followed
        if not self._law.rollback(tokens) or (followed and not self._usual.rollback(followed)):
            raise ValueError(f"the grammar cannot go back: {self._law.get_error()[:200]}")

    def likely(self) -> list[int]:
        """See ``Matcher.likely``."""
        return list((self._law if self._strayed else self._usual).compute_ff_tokens())

    def finished(self) -> bool:
        """See ``Matcher.finished``."""
        return bool(self._law.is_stopped())


def guidance_tokenizer(tokenizer: Any, vocab_size: int) -> Any:
    """llguidance's view of a tokenizer; building it takes up to a second, so share the grammar."""
    import llguidance

    inner = compat.plain_tokenizer(tokenizer)
    backend = getattr(inner, "backend_tokenizer", None)
    if backend is None:
        raise UserError("constrained decoding needs a fast tokenizer (tokenizer.json or tokenizer.model)")
    stops = sorted(getattr(tokenizer, "eos_token_ids", None) or {inner.eos_token_id})
    return llguidance.LLTokenizer(backend.to_str(), n_vocab=max(vocab_size, len(inner)), eos_token=stops)


def tool_grammar(
    tokenizer: Any, tools: Sequence[dict[str, Any]], guide: Any, mode: Mode, *, usual: bool = False
) -> str:
    """The Lark grammar of answers with calls of these tools, in any spelling or in the usual one.

    Raises:
        UserError: the tokenizer's tool parser has no grammar here, or a schema cannot be enforced in its dialect.
    """
    name = compat.tool_format(tokenizer)
    if name not in DIALECTS:
        raise UserError(
            f"no grammar for the tool dialect {name!r}",
            hint=f"known: {', '.join(sorted(DIALECTS))}; or drop --constrain",
        )
    body, space = DIALECTS[name]
    layout = call_layout(tokenizer, space)
    writer = Writer(tools, layout, lambda text: split(text, tokenizer, guide), usual)
    opening, closing = writer.mark(layout.opening), writer.mark(layout.closing)
    call = f"{writer.space(layout.before)} {body(writer)} {writer.space(layout.after)} {closing}"
    rules = "".join(f"{rule}\n" for rule in writer.rules)
    if mode == "required":
        return f"start: {opening} {call}\n{rules}"
    never = f"/(?s:.*)/ & ~/(?s:.*){_escaped(layout.opening)}(?s:.*)/"
    if opening.startswith("<["):
        return f"start: TEXT ({opening} {call} TEXT)*\nTEXT: {never}\n{rules}"
    return f"start: (pre {call})* TEXT\npre[suffix={opening}]: /(?s:.*)/\nTEXT: {never}\n{rules}"


def call_layout(tokenizer: Any, space: str) -> Layout:
    """Read the white space of calls from the chat template by rendering one; ``space`` where that tells nothing."""
    opening, closing = tokenizer.tool_call_start, tokenizer.tool_call_end
    call = {"type": "function", "function": {"name": "probe", "arguments": {"a": 1, "b": 2}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    text = ""
    if getattr(tokenizer, "has_chat_template", False):
        text = _rendered(tokenizer, messages)
    start, end = text.rfind(opening), text.rfind(closing) if closing else len(text)
    if start < 0 or end < start:
        return Layout(opening, closing, space, space)
    inside = text[start + len(opening) : end]
    spaces = inside[: len(inside) - len(inside.lstrip())], inside[len(inside.rstrip()) :]
    tight_key, tight_item = '"a":1' in inside, ',"b"' in inside
    return Layout(opening, closing, *spaces, "," if tight_item else ", ", ":" if tight_key else ": ")


def _rendered(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    from jinja2.exceptions import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False))
    except (TemplateError, ValueError, TypeError, KeyError):
        return ""  # the template has its own ideas about conversations; the defaults stand


def split(text: str, tokenizer: Any, guide: Any) -> list[str]:
    """A literal as Lark: special tokens as ``<[id]>``, which no text matches, the rest quoted."""
    known = compat.plain_tokenizer(tokenizer).get_added_vocab()
    special = {t: i for t, i in known.items() if t in text and i < guide.vocab_size and guide.is_special_token(i)}
    if not special:
        return [json.dumps(text)] if text else []
    parts = re.split("(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")", text)
    return [f"<[{special[part]}]>" if part in special else json.dumps(part) for part in parts if part]


def _escaped(text: str) -> str:
    """A literal inside a Lark regular expression."""
    return "".join(f"\\{char}" if char in "\\.+*?()|[]{}^$/&~" else char for char in text)
