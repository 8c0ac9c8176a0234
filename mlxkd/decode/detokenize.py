"""Streaming text in linear time: the pieces joined equal one full decode, for any token sequence.

How tokens become text is read from the tokenizer's own decoder description. Bytes are held back only
while they may still belong to an unfinished character.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol

from mlxkd.compat import plain_tokenizer
from mlxkd.errors import UserError

REPLACEMENT = "\ufffd"
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Detokenizer(Protocol):
    """Turns tokens into text pieces."""

    def add(self, token: int) -> str:
        """The text that became certain with this token."""
        ...

    def finish(self) -> str:
        """What was held back."""
        ...


def detokenizer_factory(tokenizer: Any) -> Callable[[], Detokenizer]:
    """A maker of fresh detokenizers for a tokenizer (mlx-lm's wrapper or a transformers tokenizer).

    The per-token table is built once, here.
    """
    inner = plain_tokenizer(tokenizer)
    backend = getattr(inner, "backend_tokenizer", None)
    decoder = json.loads(backend.to_str()).get("decoder") if backend is not None else None
    plan = _plan(decoder)
    if backend is None or plan is None:
        return lambda: WindowDetokenizer(inner)
    size = len(inner)
    strings = [backend.id_to_token(i) for i in range(size)]
    if plan["kind"] == "bytes":
        table = [_level_bytes(text or "") for text in strings]
        return lambda: ByteDetokenizer(table)
    pieces = [_fallback_piece(text or "", plan["space"]) for text in strings]
    return lambda: FallbackDetokenizer(pieces, plan["strip"])


def token_bytes(tokenizer: Any) -> list[bytes]:
    """The bytes that each token id stands for, a leading space of SentencePiece included.

    Raises:
        UserError: a decoder that gives a token no bytes of its own.
    """
    inner = plain_tokenizer(tokenizer)
    backend = getattr(inner, "backend_tokenizer", None)
    plan = _plan(json.loads(backend.to_str()).get("decoder")) if backend is not None else None
    if backend is None or plan is None:
        raise UserError(
            "the tokens of this tokenizer do not stand for fixed bytes", where=str(getattr(inner, "name_or_path", ""))
        )
    strings = [backend.id_to_token(i) or "" for i in range(len(inner))]
    if plan["kind"] == "bytes":
        return [_level_bytes(text) for text in strings]
    pieces = [_fallback_piece(text, plan["space"]) for text in strings]
    return [bytes([piece]) if isinstance(piece, int) else piece.encode() for piece in pieces]


def full_decode(tokenizer: Any, tokens: list[int]) -> str:
    """The tokenizer's own decoding of a whole sequence, special tokens included, nothing tidied."""
    return _decode(plain_tokenizer(tokenizer), tokens)


def _decode(tokenizer: Any, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class ByteDetokenizer:
    """Byte-level vocabularies: every token is a byte string."""

    def __init__(self, table: list[bytes]):
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        return self._decoder.decode(self._table[token]) if 0 <= token < len(self._table) else ""

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class FallbackDetokenizer:
    """SentencePiece vocabularies with byte tokens.

    A run of byte tokens is text only if the whole run is valid UTF-8, otherwise every byte of it is one
    replacement character (the ``ByteFallback`` decoder of the tokenizers library); so a run waits for
    its end.
    """

    def __init__(self, pieces: list[str | int], strip: int):
        self._pieces, self._strip = pieces, strip
        self._run = bytearray()

    def add(self, token: int) -> str:
        piece = self._pieces[token] if 0 <= token < len(self._pieces) else ""
        if isinstance(piece, int):
            self._run.append(piece)
            return ""
        return self._stripped(self._flush() + piece)

    def finish(self) -> str:
        return self._stripped(self._flush())

    def _flush(self) -> str:
        run, self._run = bytes(self._run), bytearray()
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return REPLACEMENT * len(run)

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            if text[0] != " ":
                self._strip = 0
                break
            text, self._strip = text[1:], self._strip - 1
        return text


class WindowDetokenizer:
    """Any other decoder: decodes a window of the last tokens twice and emits the difference.

    The window restarts whenever its text ends in a whole character, so the cost stays linear; a decoder
    that looks further back than one window may differ from the full decode.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._settled = 0
        self._text = ""

    def add(self, token: int) -> str:
        self._tokens.append(token)
        text = _decode(self._tokenizer, self._tokens)
        if text.endswith(REPLACEMENT):
            return ""
        piece = text[len(self._text) :]
        self._tokens = self._tokens[self._settled :]
        self._settled = len(self._tokens)
        self._text = _decode(self._tokenizer, self._tokens)
        return piece

    def finish(self) -> str:
        return _decode(self._tokenizer, self._tokens)[len(self._text) :] if self._tokens else ""


def _plan(decoder: dict[str, Any] | None) -> dict[str, Any] | None:
    """How to decode, or None for a decoder that has no table form."""
    if decoder is None:
        return None
    if decoder["type"] == "ByteLevel":
        return {"kind": "bytes"}
    parts = decoder.get("decoders", [])
    kinds = [part["type"] for part in parts]
    if kinds[:3] != ["Replace", "ByteFallback", "Fuse"] or kinds[3:] not in ([], ["Strip"]):
        return None
    strip = parts[3] if len(parts) == 4 else {"start": 0, "stop": 0, "content": " "}
    known = parts[0]["content"] == " " and strip["stop"] == 0 and strip["content"] == " "
    space = parts[0]["pattern"].get("String")
    return {"kind": "fallback", "space": space, "strip": strip["start"]} if known and space else None


def _fallback_piece(text: str, space: str) -> str | int:
    match = BYTE_TOKEN.fullmatch(text)
    return int(match[1], 16) if match else text.replace(space, " ")


@lru_cache(maxsize=1)
def _byte_of_char() -> dict[str, int]:
    """The printable alphabet of byte-level BPE (GPT-2): printable Latin-1 is itself, the rest starts at 256."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _level_bytes(text: str) -> bytes:
    """Bytes of one token; an added token with characters outside the alphabet is its own UTF-8."""
    alphabet = _byte_of_char()
    if all(char in alphabet for char in text):
        return bytes(alphabet[char] for char in text)
    return text.encode("utf-8")
