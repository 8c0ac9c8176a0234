"""Equal width is not the same tokenizer."""

from __future__ import annotations

import pytest

from mlxkd.errors import UserError
from mlxkd.teachers.identity import check_same_tokenizer, teacher_identity, tokenizer_hash


class Words:
    def __init__(self, *words: str):
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}


def test_same_width_but_other_tokens() -> None:
    check_same_tokenizer(Words("a", "b"), Words("a", "b"))
    with pytest.raises(UserError, match="another tokenizer: id 1 is 'b' for the student, 'c' for the teacher"):
        check_same_tokenizer(Words("a", "b"), Words("a", "c"))
    with pytest.raises(UserError, match="vocabulary mismatch: the teacher has 3 tokens, the student 2"):
        check_same_tokenizer(Words("a", "b"), Words("a", "b", "c"))
    assert tokenizer_hash(Words("a", "b")) != tokenizer_hash(Words("b", "a"))


def test_identity_follows_the_weights(tmp_path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    first = teacher_identity(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert teacher_identity(tmp_path) != first
