"""A teacher that has already spoken: targets read from a store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlxkd.data.batching import Batch
from mlxkd.data.example import Example
from mlxkd.errors import UserError
from mlxkd.teachers.store import Records, Store, key_of
from mlxkd.teachers.targets import SparseTargets


class CachedTeacher:
    """Answers from a store about batches of ``examples``.

    Args:
        folder: the store that ``teach`` wrote.
        examples: those that batches refer to by row (``Batches.examples``).
        tokenizer: hash of the student's vocabulary (``identity.tokenizer_hash``); None trusts the store.
        teacher: identity of the teacher that is meant; None accepts whoever made the store.
        form: how the known ids are compared: "bucket", "renormalised", or "sampled", which the store must hold then;
            None takes "sampled" for a sampled store and "bucket" for others.

    Raises:
        UserError: a store that is missing, stale (of another teacher), foreign (of another tokenizer) or of draws where
            likeliest ids are wanted, or the other way round.
    """

    def __init__(
        self,
        folder: Path,
        examples: Sequence[Example],
        *,
        tokenizer: str | None = None,
        teacher: str | None = None,
        form: str | None = None,
    ):
        self.store, self.examples = Store(folder), examples
        manifest = self.store.manifest
        self.form = form or manifest.form
        if (self.form == "sampled") != (manifest.form == "sampled"):
            raise UserError(
                f"this cache is {manifest.form}, and {self.form} is asked for",
                where=str(folder),
                hint=f"set teacher.form to {manifest.form}, or run `mlxkd teach` with that form into another folder",
            )
        if tokenizer is not None and tokenizer != manifest.tokenizer:
            raise UserError(
                "this cache belongs to another tokenizer", where=str(folder), hint="run `mlxkd teach` again"
            )
        if teacher is not None and teacher != manifest.teacher:
            raise UserError(
                "this cache is stale: it was made by another teacher", where=str(folder), hint="run `mlxkd teach` again"
            )
        self._keys: dict[int, str] = {}

    def check(self) -> None:
        """Refuse a cache that lacks texts, before the first step meets one of them.

        Raises:
            UserError: says how many are missing.
        """
        missing = sum(key_of(example.tokens) not in self.store for example in self.examples)
        if missing:
            raise UserError(
                f"{missing} of {len(self.examples)} texts are not in the teacher cache",
                where=str(self.store.folder),
                hint="run `mlxkd teach` with the same data, shapes and tokenizer; it adds only what is missing",
            )

    def targets(self, batch: Batch, positions: np.ndarray | None = None) -> SparseTargets:
        """What the teacher said at flat ``positions`` of the batch; its supervised ones by default."""
        at = batch.supervised if positions is None else positions
        length, parts = batch.shape[1], list[Records]()
        for row, index in enumerate(batch.rows):
            inside = at[(at >= row * length) & (at < (row + 1) * length)] - row * length
            if inside.size:
                parts.append(self.store.read(self._key(index), inside))
        ids, logprobs, tails = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "logprobs", "tails")
        )
        manifest = self.store.manifest
        return SparseTargets(ids, logprobs, tails, manifest.temperatures, manifest.vocabulary, self.form)

    def _key(self, index: int) -> str:
        if index not in self._keys:
            self._keys[index] = key_of(self.examples[index].tokens)
        return self._keys[index]
