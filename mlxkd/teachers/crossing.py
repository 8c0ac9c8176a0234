"""A teacher with another tokenizer: it reads the student's tokens as text and answers in groups of tokens.

Both sides spell the same bytes. Between two borders that both have lies a group; the losses ``gold`` and ``uld``
compare the distributions of whole groups. Bytes, not characters or strings, because tokens may end inside a
character (TRL's text offsets broke there, trl#4392). Special tokens answer each other by role or by name; one
that the teacher lacks is read as its own text.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxkd.compat import plain_tokenizer
from mlxkd.data.batching import Batch
from mlxkd.data.example import Example
from mlxkd.decode.detokenize import token_bytes
from mlxkd.errors import UserError
from mlxkd.losses.cross import Cross, align
from mlxkd.losses.distribution import softmax
from mlxkd.losses.head import chunk_rows
from mlxkd.students.split import Head, Split

UNREADABLE = "mlxkd-one-mark-per-byte"


class Reading(NamedTuple):
    """One row of the student's tokens as the teacher reads it.

    Args:
        ids: int32 [m], the teacher's tokens.
        ends: int64 [m], where each ends, in bytes of the common text (a special token is one byte long).
        student_ends: int64 [n], where each of the student's tokens ends.
        broken: ascending positions of bytes that are no UTF-8, and stand as "?" in what the teacher reads.
    """

    ids: np.ndarray
    ends: np.ndarray
    student_ends: np.ndarray
    broken: np.ndarray


class Reader:
    """Turns the student's tokens into the teacher's.

    Args:
        student, teacher: tokenizers (mlx-lm's wrappers or Hugging Face's).

    Raises:
        UserError: a tokenizer whose tokens do not each stand for fixed bytes.
    """

    def __init__(self, student: Any, teacher: Any):
        self.teacher = plain_tokenizer(teacher)
        inner = plain_tokenizer(student)
        self.pieces, self.teacher_pieces = token_bytes(student), token_bytes(teacher)
        theirs = _specials(self.teacher)
        self.special = _specials(inner)
        named = {name: number for number, name in theirs.items()}
        self.answers = {number: named[name] for number, name in self.special.items() if name in named}
        for role in ("bos_token_id", "eos_token_id"):
            ours, other = getattr(inner, role, None), getattr(self.teacher, role, None)
            if ours is not None and other is not None:
                self.answers[ours] = other
        self.start = _start(self.teacher)

    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(student id, teacher id) of tokens that stand for the same bytes or the same special token."""
        ours, theirs = (
            {piece: i for i, piece in enumerate(pieces) if piece and i not in special}
            for pieces, special in ((self.pieces, self.special), (self.teacher_pieces, _specials(self.teacher)))
        )
        both = [(ours[piece], theirs[piece]) for piece in ours.keys() & theirs.keys()]
        return tuple(sorted([*both, *_one_to_one(self.answers)]))

    def read(self, tokens: np.ndarray) -> Reading:
        """The teacher's view of a row; ``ids`` begins with the teacher's start token where it uses one.

        Raises:
            UserError: the teacher's tokenizer rewrites the text.
        """
        ids, ends, broken = list[int](), list[int](), list[int]()
        lengths = [1 if token in self.answers else len(self._piece(token)) for token in tokens.tolist()]
        if self.start is not None and self.answers.get(int(tokens[0])) != self.start:
            ids, ends = [self.start], [0]
        position = 0
        for part in self._parts(tokens.tolist()):
            if isinstance(part, int):
                ids.append(part)
                position += 1
                ends.append(position)
                continue
            text, bad = _text(part)
            found = self.teacher.encode(text, add_special_tokens=False)
            ids += found
            ends += [position + end for end in self._ends(found, text.encode())]
            broken += [position + at for at in bad]
            position += len(part)
        return Reading(np.array(ids, np.int32), np.array(ends), np.cumsum(lengths), np.array(broken, np.int64))

    def _piece(self, token: int) -> bytes:
        return self.special[token].encode() if token in self.special else self.pieces[token]

    def _parts(self, tokens: list[int]) -> Iterator[bytes | int]:
        """Stretches of bytes, and the teacher's ids of special tokens between them."""
        run = bytearray()
        for token in tokens:
            if token not in self.answers:
                run += self._piece(token)
                continue
            if run:
                yield bytes(run)
                run = bytearray()
            yield self.answers[token]
        if run:
            yield bytes(run)

    def _ends(self, ids: list[int], text: bytes) -> list[int]:
        specials = _specials(self.teacher)
        pieces = [specials[i].encode() if i in specials else self.teacher_pieces[i] for i in ids]
        spelled = b"".join(pieces)
        added = len(spelled) - len(text)  # SentencePiece puts a space before the first word
        if spelled[max(added, 0) :] != text or added not in (0, 1):
            raise UserError(
                f"the teacher's tokenizer rewrites the text {text[:40]!r}",
                where="teacher",
                hint="gold and uld need a tokenizer that spells a text as it stands",
            )
        return [int(end) - added for end in np.cumsum([len(piece) for piece in pieces])]


def _specials(tokenizer: Any) -> dict[int, str]:
    """Special tokens: id -> name."""
    return dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def _start(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts before every text of its own accord."""
    found = tokenizer.encode("", add_special_tokens=True)
    return int(found[0]) if found and found[0] == getattr(tokenizer, "bos_token_id", None) else None


def _one_to_one(answers: dict[int, int]) -> list[tuple[int, int]]:
    """No id twice on the teacher's side; the first of the student's keeps it."""
    taken: dict[int, int] = {}
    for ours, theirs in sorted(answers.items()):
        taken.setdefault(theirs, ours)
    return [(ours, theirs) for theirs, ours in taken.items()]


def _text(part: bytes) -> tuple[str, list[int]]:
    """UTF-8 text of equal length in bytes, with the positions that were no UTF-8 and became question marks."""
    bad: list[int] = []

    def mark(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeDecodeError)
        bad.extend(range(error.start, error.end))
        return "?" * (error.end - error.start), error.end

    codecs.register_error(UNREADABLE, mark)
    return part.decode("utf-8", UNREADABLE), bad


@dataclass(frozen=True)
class CrossTargets:
    """What a teacher with another tokenizer says about a batch's supervised positions.

    Args:
        hidden: [N, Dt], its states before the last token of each position's group (others: unused).
        head: [n, Dt] to logits [n, Vt].
        scale: float32 [N], log-probability of the group's earlier teacher tokens at ``temperature``.
        last: int32 [N], index of the last position of each position's group.
        labels: int32 [N], the student's tokens.
        weights: float32 [N], 0 where no whole group is known; else what gives the whole group its last weight.
        form: the pairing of the vocabularies.
        vocabulary: ids of the teacher.
        temperature: that of ``scale``.
    """

    hidden: mx.array
    head: Head
    scale: np.ndarray
    last: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    form: Cross
    vocabulary: int
    temperature: float

    @property
    def count(self) -> int:
        return len(self.last)

    @property
    def borders(self) -> np.ndarray:
        """Where the positions may be cut without cutting a group."""
        return np.unique(self.last) + 1

    def check(self, temperatures: Sequence[float]) -> None:
        """Raises UserError for a temperature other than that of the merged probabilities."""
        for wanted in temperatures:
            if wanted != self.temperature:
                raise UserError(f"these targets were merged at {self.temperature:g}, not at {wanted:g}", where="loss")

    def chunk(self, start: int, stop: int) -> dict[str, mx.array]:
        part = slice(start, stop)
        return {
            "logits": self.head(self.hidden[part])[:, : self.vocabulary],
            "scale": mx.array(self.scale[part]),
            "last": mx.array(self.last[part] - start),
            "labels": mx.array(self.labels[part]),
            "weights": mx.array(self.weights[part]),
        }


class CrossTeacher:
    """A loaded model with a tokenizer of its own.

    Args:
        model: loaded with ``mlxkd.compat.load_model``; it is frozen.
        teacher, student: the two tokenizers.
        student_size: ids of the student's head.
        examples: those that batches refer to by row.
        temperature: of the ``gold`` and ``uld`` terms that read it.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: Any,
        student: Any,
        student_size: int,
        examples: Sequence[Example],
        temperature: float = 1.0,
    ):
        model.freeze()
        model.eval()
        self.split, self.examples, self.temperature = Split(model), examples, temperature
        self.reader = Reader(student, teacher)
        self.vocabulary = min(self.split.head.rows, len(self.reader.teacher_pieces))
        self.form = Cross(self.reader.pairs(), student_size)

    def check(self) -> None:
        """Read every example once, before the first step meets one that cannot be read.

        Raises:
            UserError: the teacher's tokenizer rewrites a text.
        """
        for example in self.examples:
            self.reader.read(example.tokens)

    def targets(self, batch: Batch) -> CrossTargets:
        """What the teacher says at the supervised positions; a group counts where all of it is supervised."""
        readings = [self.reader.read(self.examples[index].tokens) for index in batch.rows]
        at, count = batch.supervised, len(batch.supervised)
        labels, given = batch.labels.reshape(-1)[at], batch.weights.reshape(-1)[at]
        last, weights = np.arange(count, dtype=np.int32), np.zeros(count, np.float32)
        heads, earlier = list[tuple[int, int, int]](), list[tuple[int, int, int, int]]()
        for row, reading in enumerate(readings):
            base = row * batch.shape[1]
            for ours, theirs in _groups(reading):
                places = np.searchsorted(at, base + ours - 1)
                if places[-1] >= count or not np.array_equal(at[places], base + ours - 1):
                    continue
                end = int(places[-1])
                last[places], weights[places] = end, given[end] / given[places]
                heads.append((end, row, int(theirs[-1]) - 1))
                earlier += [(end, row, int(t) - 1, int(reading.ids[t])) for t in theirs[:-1]]
        states = self._states(readings)
        source = np.zeros((2, count), np.int32)
        for end, row, position in heads:
            source[:, end] = row, position
        hidden = states[mx.array(source[0]), mx.array(source[1])]
        scale = self._scale(states, earlier, count)
        mx.eval(hidden)
        return CrossTargets(
            hidden, self.split.head, scale, last, labels, weights, self.form, self.vocabulary, self.temperature
        )

    def _states(self, readings: Sequence[Reading]) -> mx.array:
        width = max(len(reading.ids) for reading in readings)
        rows = np.zeros((len(readings), width), np.int32)
        for row, reading in zip(rows, readings, strict=True):
            row[: len(reading.ids)] = reading.ids
        return self.split.hidden(mx.array(rows))

    def _scale(self, states: mx.array, earlier: list[tuple[int, int, int, int]], count: int) -> np.ndarray:
        """Per group the log-probability of its teacher tokens but the last."""
        scale = np.zeros(count, np.float32)
        size = chunk_rows(len(earlier), self.vocabulary) if earlier else 1
        for start in range(0, len(earlier), size):
            ends, rows, positions, tokens = np.array(earlier[start : start + size], dtype=np.int32).T
            logits = self.split.head(states[mx.array(rows), mx.array(positions)])[:, : self.vocabulary]
            log = softmax(logits, self.temperature).log
            picked = mx.take_along_axis(log, mx.array(tokens)[:, None], axis=-1)[:, 0]
            np.add.at(scale, ends, np.array(picked))
        return scale


def _groups(reading: Reading) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Token numbers of both sides of each whole group that both sides predict (nothing predicts a first token)."""
    ours, theirs = align(reading.student_ends, reading.ends)
    begin = 0
    for group in range(ours.max(initial=-1) + 1):
        left, right = np.flatnonzero(ours == group), np.flatnonzero(theirs == group)
        end = int(reading.student_ends[left[-1]]) if left.size else begin
        whole = left.size and right.size and left[0] > 0 and right[0] > 0
        clean = not np.any((reading.broken >= begin) & (reading.broken < end))
        begin = end
        if whole and clean:
            yield left, right
