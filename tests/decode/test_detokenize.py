"""Streamed text equals the tokenizer's own decoding of the whole sequence, whatever the tokens are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models
from tool_tokenizer import make
from transformers import PreTrainedTokenizerFast

from mlxkd.decode.detokenize import (
    ByteDetokenizer,
    FallbackDetokenizer,
    WindowDetokenizer,
    detokenizer_factory,
    full_decode,
)

TEXTS = ("plain words", "naïve 日本語 🦙👩‍👩‍👧 e\u0301", "\x00\ufffd tail ")


def byte_level(folder: Path) -> Any:
    return make(folder)


def byte_fallback(folder: Path) -> Any:
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "a", "b", "é", "本"]
    inner = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>")
    )
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def word_piece(folder: Path) -> Any:
    pieces = ["[UNK]", "play", "##ing", "##ed", "music", "日", "##本", ",", "."]
    inner = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    inner.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")


@pytest.mark.parametrize(
    ("built", "kind"),
    [(byte_level, ByteDetokenizer), (byte_fallback, FallbackDetokenizer), (word_piece, WindowDetokenizer)],
)
def test_streamed_pieces_join_to_the_full_decode(built: Callable[[Path], Any], kind: type, tmp_path: Path) -> None:
    tokenizer = built(tmp_path)
    factory = detokenizer_factory(tokenizer)
    assert isinstance(factory(), kind)
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, len(tokenizer), rng.integers(1, 40)).tolist() for _ in range(200)]
    for tokens in rows:
        stream = factory()
        assert "".join(stream.add(token) for token in tokens) + stream.finish() == full_decode(tokenizer, tokens)


@pytest.mark.parametrize("built", [byte_level, byte_fallback])
@pytest.mark.parametrize("text", TEXTS)
def test_characters_come_out_whole(built: Callable[[Path], Any], text: str, tmp_path: Path) -> None:
    tokenizer = built(tmp_path)
    stream = detokenizer_factory(tokenizer)()
    pieces = [stream.add(token) for token in tokenizer.encode(text, add_special_tokens=False)]
    assert all("\ufffd" not in piece for piece in pieces if "\ufffd" not in text)
    assert "".join(pieces) + stream.finish() == full_decode(tokenizer, tokenizer.encode(text, add_special_tokens=False))


def test_the_wrapper_and_what_it_wraps_decode_alike(tmp_path: Path) -> None:
    wrapped = make(tmp_path)
    tokens = wrapped.encode("日本 and more", add_special_tokens=False)
    assert full_decode(wrapped, tokens) == full_decode(wrapped._tokenizer, tokens) == "日本 and more"
