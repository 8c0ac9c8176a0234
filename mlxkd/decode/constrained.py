"""Tool calls that always parse and fit their schema: a grammar per dialect, through llguidance.

Text is free until the tag that opens a call; from there the grammar leaves only what the offered tools
allow. What it leaves no choice about can be drafted without a drafter (``GrammarDrafter``).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mlxkd.errors import UserError

Mode = Literal["auto", "required"]


@dataclass(frozen=True)
class Layout:
    """How a model writes a call, down to its white space; read from its own chat template.

    Args:
        opening, closing: tags around a call.
        before, after: white space inside the tags.
        item, key: separators of JSON.
    """

    opening: str
    closing: str
    before: str = "\n"
    after: str = "\n"
    item: str = ", "
    key: str = ": "


Dialect = Callable[[Sequence[dict[str, Any]], Layout], str]
"""Lark rule ``body`` for what stands between the tags."""


def json_body(tools: Sequence[dict[str, Any]], layout: Layout) -> str:
    """{"name": ..., "arguments": {...}} for one of the tools; keys in the order of the schema."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool["name"]}, "arguments": _arguments(tool)},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    schema = {"anyOf": calls, "x-guidance": _json_options(layout)}
    return f"body: %json {json.dumps(schema)}\n"


def function_tag_body(tools: Sequence[dict[str, Any]], layout: Layout) -> str:
    """<function=NAME> with one <parameter=KEY> block per argument, values raw (Qwen3-Coder's form)."""
    return _tagged(tools, layout, "<function={name}>\n", "<parameter={key}>\n", "\n</parameter>\n", "</function>")


def mistral_body(tools: Sequence[dict[str, Any]], layout: Layout) -> str:
    """NAME[ARGS]{...}, without a closing tag (Mistral's form since its eleventh tokenizer)."""
    rules = [
        f"f{i}: {json.dumps(tool['name'] + '[ARGS]')} {_json_value(_arguments(tool), layout)}"
        for i, tool in enumerate(tools)
    ]
    return f"body: {_any('f', tools)}\n" + "\n".join(rules) + "\n"


def glm_body(tools: Sequence[dict[str, Any]], layout: Layout) -> str:
    """NAME with <arg_key>KEY</arg_key><arg_value>VALUE</arg_value> pairs, strings raw (GLM 4.7's form)."""
    return _tagged(tools, layout, "{name}", "<arg_key>{key}</arg_key><arg_value>", "</arg_value>", "")


def minimax_body(tools: Sequence[dict[str, Any]], layout: Layout) -> str:
    """<invoke name="NAME"> with <parameter name="KEY">VALUE</parameter> lines, strings raw (MiniMax M2's form)."""
    return _tagged(tools, layout, '<invoke name="{name}">\n', '<parameter name="{key}">', "</parameter>\n", "</invoke>")


def pythonic_body(tools: Sequence[dict[str, Any]], layout: Layout) -> str:
    """[NAME(KEY=VALUE, ...)], values as JSON, which the parsers of this form read (LFM2, Llama 4)."""
    rules = []
    for i, tool in enumerate(tools):
        schema = _arguments(tool)
        given = list(schema.get("properties", {}).items())
        rules.append(f"f{i}: {json.dumps('[' + tool['name'] + '(')} a{i}x0 {json.dumps(')]')}")
        # a: no argument yet; b: one has been written, the next one needs a comma.
        for j, (key, value) in enumerate(given):
            pair = f"{json.dumps(key + '=')} {_json_value(value, layout)} b{i}x{j + 1}"
            skip = key not in schema.get("required", [])
            rules.append(f"a{i}x{j}: {pair}" + (f" | a{i}x{j + 1}" if skip else ""))
            rules.append(f'b{i}x{j}: ", " {pair}' + (f" | b{i}x{j + 1}" if skip else ""))
        rules += [f'{letter}{i}x{len(given)}: ""' for letter in "ab"]
    return f"body: {_any('f', tools)}\n" + "\n".join(rules) + "\n"


def _any(letter: str, tools: Sequence[dict[str, Any]]) -> str:
    return " | ".join(f"{letter}{i}" for i in range(len(tools)))


def _tagged(tools: Sequence[dict[str, Any]], layout: Layout, head: str, key: str, value_end: str, tail: str) -> str:
    """Calls of one block per argument in the order of the schema; strings stand raw up to ``value_end``."""
    rules = []
    for i, tool in enumerate(tools):
        schema = _arguments(tool)
        parts = []
        for j, (name, value) in enumerate(schema.get("properties", {}).items()):
            rule = f"p{i}x{j}"
            parts.append(rule if name in schema.get("required", []) else f"{rule}?")
            opening = json.dumps(key.format(key=name))
            if value.get("type") == "string" and "enum" not in value:
                rules.append(f"{rule}: {opening} v{i}x{j}\nv{i}x{j}[suffix={json.dumps(value_end)}]: /(?s:.*)/")
            else:
                rules.append(
                    f"{rule}: {opening} v{i}x{j} {json.dumps(value_end)}\nv{i}x{j}: {_raw_value(value, layout)}"
                )
        closing = f" {json.dumps(tail)}" if tail else ""
        rules.append(f"f{i}: {json.dumps(head.format(name=tool['name']))} {' '.join(parts)}{closing}")
    return f"body: {_any('f', tools)}\n" + "\n".join(rules) + "\n"


DIALECTS: dict[str, Dialect] = {
    "glm47": glm_body,
    "json_tools": json_body,
    "longcat": json_body,
    "minimax_m2": minimax_body,
    "mistral": mistral_body,
    "pythonic": pythonic_body,
    "qwen3_coder": function_tag_body,
}
"""By the name of mlx-lm's tool parser."""


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
        self._grammar = llguidance.grammar_from("lark", self.source)
        fault = llguidance.LLMatcher.validate_grammar(self._grammar, self._tokenizer)
        if fault:
            raise UserError(f"these tools cannot be enforced: {fault}", hint="simplify the schema or drop --constrain")

    def matcher(self) -> GuidanceMatcher:
        """See ``Constraint.matcher``."""
        import llguidance

        return GuidanceMatcher(llguidance.LLMatcher(self._tokenizer, self._grammar), self.vocab_size)


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
    """llguidance's matcher behind our protocol."""

    def __init__(self, inner: Any, vocab_size: int):
        self._inner, self._vocab_size = inner, vocab_size

    def mask(self) -> np.ndarray:
        """bool[V]."""
        packed = np.frombuffer(self._inner.compute_bitmask(), dtype=np.uint8)
        bits = np.unpackbits(packed, bitorder="little")[: self._vocab_size].astype(bool)
        return bits if len(bits) == self._vocab_size else np.pad(bits, (0, self._vocab_size - len(bits)))

    def accepts(self, token: int) -> bool:
        """See ``Matcher.accepts``."""
        return bool(self._inner.validate_tokens([token]) == 1)

    def consume(self, token: int) -> None:
        """See ``Matcher.consume``.

        Raises:
            ValueError: the grammar does not allow this token.
        """
        if not self._inner.consume_token(token):
            raise ValueError(f"token {token} is outside the grammar: {self._inner.get_error()[:200]}")

    def rollback(self, tokens: int) -> None:
        """See ``Matcher.rollback``."""
        if tokens and not self._inner.rollback(tokens):
            raise ValueError(f"the grammar cannot go back: {self._inner.get_error()[:200]}")

    def forced(self) -> list[int]:
        """See ``Matcher.forced``."""
        return list(self._inner.compute_ff_tokens())

    def finished(self) -> bool:
        """See ``Matcher.finished``."""
        return bool(self._inner.is_stopped())


def guidance_tokenizer(tokenizer: Any, vocab_size: int) -> Any:
    """llguidance's view of a tokenizer; building it takes up to a second, so share the grammar."""
    import llguidance

    inner = getattr(tokenizer, "_tokenizer", tokenizer)
    backend = getattr(inner, "backend_tokenizer", None)
    if backend is None:
        raise UserError("constrained decoding needs a fast tokenizer (tokenizer.json or tokenizer.model)")
    stops = sorted(getattr(tokenizer, "eos_token_ids", None) or {inner.eos_token_id})
    return llguidance.LLTokenizer(backend.to_str(), n_vocab=max(vocab_size, len(inner)), eos_token=stops)


def tool_grammar(tokenizer: Any, tools: Sequence[dict[str, Any]], guide: Any, mode: Mode) -> str:
    """The Lark grammar of answers with calls of these tools.

    Raises:
        UserError: the tokenizer's tool parser has no grammar here.
    """
    name = (getattr(tokenizer, "init_kwargs", None) or {}).get("tool_parser_type")
    if name not in DIALECTS:
        raise UserError(
            f"no grammar for the tool dialect {name!r}",
            hint=f"known: {', '.join(sorted(DIALECTS))}; or drop --constrain",
        )
    layout = call_layout(tokenizer)
    opening = _tag(layout.opening, tokenizer, guide)
    closing = f"{json.dumps(layout.after)} {_tag(layout.closing, tokenizer, guide)}" if layout.closing else ""
    call = f"{json.dumps(layout.before)} body {closing}"
    rules = DIALECTS[name](tools, layout)
    if mode == "required":
        return f"start: {opening} {call}\n{rules}"
    never = f"/(?s:.*)/ & ~/(?s:.*){_escaped(layout.opening)}(?s:.*)/"
    if opening.startswith("<["):
        return f"start: TEXT ({opening} {call} TEXT)*\nTEXT: {never}\n{rules}"
    return f"start: (pre {call})* TEXT\npre[suffix={opening}]: /(?s:.*)/\nTEXT: {never}\n{rules}"


def call_layout(tokenizer: Any) -> Layout:
    """Read the white space of calls from the chat template by rendering one."""
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
        return Layout(opening, closing, *(("\n", "\n") if closing else ("", "")))
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


def _tag(tag: str, tokenizer: Any, guide: Any) -> str:
    """A tag as a special token where the vocabulary has it, else as text."""
    token = getattr(tokenizer, "_tokenizer", tokenizer).convert_tokens_to_ids(tag)
    if isinstance(token, int) and token < guide.vocab_size and guide.is_special_token(token):
        return f"<[{token}]>"
    return json.dumps(tag)


def _escaped(text: str) -> str:
    """A literal inside a Lark regular expression."""
    return "".join(f"\\{char}" if char in "\\.+*?()|[]{}^$/&~" else char for char in text)


def _arguments(tool: dict[str, Any]) -> dict[str, Any]:
    schema = tool.get("parameters") or {"type": "object", "properties": {}}
    return {"additionalProperties": False, **schema, "type": "object"}


def _json_options(layout: Layout) -> dict[str, Any]:
    return {"item_separator": layout.item, "key_separator": layout.key, "whitespace_flexible": False}


def _raw_value(schema: dict[str, Any], layout: Layout) -> str:
    if schema.get("type") == "string":
        return " | ".join(json.dumps(str(value)) for value in schema["enum"])
    return _json_value(schema, layout)


def _json_value(schema: dict[str, Any], layout: Layout) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': _json_options(layout)})}"
