"""The shipped tokenizer: SentencePiece is its oracle, and every text survives the round trip."""

from __future__ import annotations

import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxkd import compat
from mlxkd.demo import DEMO_TEACHER, world

TOKENIZER = compat.load_tokenizer(DEMO_TEACHER, {})
PIECES = sentencepiece.SentencePieceProcessor(model_file=str(DEMO_TEACHER / "tokenizer.model"))
# U+2581 is SentencePiece's own sign for a space and cannot be told from one.
MARKS = ("<|", "<tool_call>", "</tool_call>", "<unk>", "▁")


def _encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_any_text_survives(text: str) -> None:
    if not any(mark in text for mark in MARKS):
        assert TOKENIZER.decode(_encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_every_byte_has_a_piece_and_bytes_decode_to_their_text(text: str) -> None:
    ids = [PIECES.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
    assert all(PIECES.is_byte(i) for i in ids)
    assert TOKENIZER.decode(ids) == text == PIECES.decode(ids)


def test_it_encodes_as_sentencepiece_does() -> None:
    for record in world.conversations("known", 4, 100):
        text = TOKENIZER.apply_chat_template(record["messages"], tools=record["tools"], tokenize=False)
        assert _encode(text) == PIECES.encode(text)


def test_a_word_has_the_same_pieces_wherever_it_stands() -> None:
    for word in ("Ana", "reminder", "zorvik"):
        alone = _encode(word)
        for text in (f"call {word} now", f'{{"name":"{word}"}}', f"create_{word}(", f"{word}, and"):
            found = _encode(text)
            assert any(found[i : i + len(alone)] == alone for i in range(len(found)))


def test_mlx_lm_finds_the_tool_parser() -> None:
    assert TOKENIZER.has_tool_calling
    call = TOKENIZER.tool_parser('{"name":"f","arguments":{"a":1}}')
    assert call == {"name": "f", "arguments": {"a": 1}}
