"""Who a teacher is and which tokens it speaks: the two hashes that keep a cache from being used for another."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mlxkd.errors import UserError
from mlxkd.files import file_hash


def teacher_identity(folder: Path) -> str:
    """SHA-256 over the config and every weight file of a model folder."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}:{file_hash(path)}\n".encode())
    return digest.hexdigest()


def vocabulary_of(tokenizer: Any) -> dict[str, int]:
    """Token strings to ids."""
    return dict(tokenizer.get_vocab())


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 over the vocabulary, ids included; equal for equal vocabularies in different file formats."""
    pairs = sorted(vocabulary_of(tokenizer).items(), key=lambda pair: (pair[1], pair[0]))
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def check_same_tokenizer(student: Any, teacher: Any, *, where: str = "teacher") -> None:
    """Refuse to compare distributions over different tokens, even when they are equally many.

    Raises:
        UserError: the two vocabularies disagree about an id.
    """
    ours, theirs = vocabulary_of(student), vocabulary_of(teacher)
    if ours == theirs:
        return
    if len(ours) != len(theirs):
        what = f"vocabulary mismatch: the teacher has {len(theirs)} tokens, the student {len(ours)}"
    else:
        token = min((t for t in ours if theirs.get(t) != ours[t]), key=lambda t: ours[t])
        other = next((t for t, i in theirs.items() if i == ours[token]), "nothing")
        difference = f"id {ours[token]} is {token!r} for the student, {other!r} for the teacher"
        what = f"equally many tokens but another tokenizer: {difference}"
    raise UserError(what, where=where, hint="use the teacher's tokenizer for the student, or the uld or gold loss")
