"""The one contract that every backend fulfils, and the errors it may raise.

A session holds ``batch_size`` rows. Each row is a sequence of tokens already seen by the model,
of its own length. ``extend`` appends tokens and returns the logits after each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mlxkd.errors import UserError

Array = Any
"""An ``mx.array`` or an ``np.ndarray``; engines convert only what they read on the host."""

Counts = Sequence[int] | np.ndarray
"""One integer per row."""


class SessionError(UserError):
    """A request that a session cannot fulfil; the session is unchanged."""


class ContextOverflow(SessionError):
    """More tokens than the context holds. Raised before anything is written."""


class CannotRewind(SessionError):
    """The state of this model keeps no history (recurrent layers, wrapped windows)."""


class SnapshotMismatch(SessionError):
    """A snapshot of another model, cache layout or precision."""


@dataclass(frozen=True)
class Snapshot:
    """The state of one row, detached from its session: it never changes afterwards.

    Args:
        length: tokens the row has seen.
        arrays: named state arrays of one row.
        token_axis: per array the axis that counts tokens, or None where the state cannot be cut.
        layout: names model family, cache kinds and precision; a session refuses any other layout.
        start: first token covered by ``arrays`` (above 0 only for a part made by ``cut``).
    """

    length: int
    arrays: dict[str, Array]
    token_axis: dict[str, int | None] = field(repr=False)
    layout: str
    start: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes held by the arrays."""
        return int(sum(array.nbytes for array in self.arrays.values()))

    @property
    def can_cut(self) -> bool:
        """Whether any prefix of the row can be taken from this snapshot."""
        return all(axis is not None for axis in self.token_axis.values())

    def cut(self, start: int, stop: int) -> Snapshot:
        """The part of the state that belongs to tokens ``start`` to ``stop``.

        Raises:
            CannotRewind: the state has no token axis.
            ValueError: the range is not covered.
        """
        if not self.can_cut:
            raise CannotRewind("this state cannot be cut at a token", where=self.layout)
        if not self.start <= start <= stop <= self.length:
            raise ValueError(f"tokens {start}..{stop} are outside {self.start}..{self.length}")
        arrays = {
            name: array[_slice(self.token_axis[name], start - self.start, stop - self.start)]
            for name, array in self.arrays.items()
        }
        return Snapshot(stop, arrays, self.token_axis, self.layout, start)


def _slice(axis: int | None, start: int, stop: int) -> tuple[Any, ...]:
    """Index of ``start:stop`` on a negative axis."""
    assert axis is not None and axis < 0
    return (..., slice(start, stop), *([slice(None)] * (-axis - 1)))


@runtime_checkable
class Session(Protocol):
    """A decoder with state; see the module docstring."""

    batch_size: int
    vocab_size: int
    max_context: int
    can_rewind: bool
    query_sizes: tuple[int, ...] | None
    """Compiled numbers of tokens per call, ascending; None where any number runs."""
    computes_all_rows: bool
    """Whether a call costs the same however many rows take part (compiled shapes)."""
    takes_device_tokens: bool
    """Whether ``extend`` accepts an ``mx.array`` of its own best tokens, so that nothing waits for the host."""

    @property
    def lengths(self) -> np.ndarray:
        """int64[B]: tokens each row has seen."""
        ...

    @property
    def layout(self) -> str:
        """What a snapshot must match to be restored here."""
        ...

    def extend(self, tokens: np.ndarray, counts: Counts | None = None) -> Array:
        """Append tokens and return logits.

        Args:
            tokens: int[B, q], right-padded with any valid id.
            counts: valid tokens of each row, 0 to q; None means q for all.

        Returns:
            float[B, q, V]; row b holds meaning in its first ``counts[b]`` positions only.

        Raises:
            ContextOverflow: a row would exceed ``max_context``; no row is changed.
        """
        ...

    def wait(self) -> None:
        """Return when the state after all tokens so far is there; what nobody reads may stay uncomputed else."""
        ...

    def rewind(self, lengths: Counts) -> None:
        """Forget tokens so that row b has seen exactly ``lengths[b]``.

        Raises:
            CannotRewind: the state keeps no history; rewinding to 0 always works.
            ValueError: a length above the present one.
        """
        ...

    def snapshot(self, row: int) -> Snapshot:
        """Detach the state of one row."""
        ...

    def restore(self, row: int, snapshot: Snapshot) -> None:
        """Put a row into the state of a snapshot, whatever it held.

        Raises:
            SnapshotMismatch: other layout, a part that does not start at 0.
            ContextOverflow: longer than ``max_context``.
        """
        ...


def check_extend(
    tokens: np.ndarray,
    counts: Counts | None,
    lengths: np.ndarray,
    max_context: int,
    vocab_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Validate the arguments of ``extend`` for any backend; returns (int32[B, q], int64[B] counts).

    Raises:
        ContextOverflow: a row would exceed ``max_context``.
        ValueError: shapes, counts or token ids out of range.
    """
    tokens = np.asarray(tokens)
    valid = check_counts(tokens.shape, counts, lengths, max_context)
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ValueError(f"token ids must lie in 0..{vocab_size - 1}")
    return tokens.astype(np.int32), valid


def check_counts(shape: tuple[int, ...], counts: Counts | None, lengths: np.ndarray, max_context: int) -> np.ndarray:
    """Validate ``extend`` but for the ids, which may still be on the device; returns int64[B] counts.

    Raises:
        ContextOverflow: a row would exceed ``max_context``.
        ValueError: shapes or counts out of range.
    """
    if len(shape) != 2 or shape[0] != len(lengths) or shape[1] == 0:
        raise ValueError(f"tokens have shape {shape}, expected ({len(lengths)}, at least 1)")
    width = shape[1]
    valid = np.full(len(lengths), width) if counts is None else np.asarray(counts, dtype=np.int64)
    if valid.shape != lengths.shape or (valid < 0).any() or (valid > width).any():
        raise ValueError(f"counts {valid.tolist()} do not fit tokens of shape {shape}")
    after = lengths + valid
    if (after > max_context).any():
        row = int(np.argmax(after))
        raise ContextOverflow(
            f"row {row} holds {lengths[row]} tokens and {valid[row]} more do not fit into {max_context}",
            hint="shorten the prompt, lower --max-tokens or open a session with a larger context",
        )
    return valid


def check_rewind(lengths: Counts, present: np.ndarray, can_rewind: bool) -> np.ndarray:
    """Validate the arguments of ``rewind``; returns int64[B].

    Raises:
        CannotRewind: a row would go back to a length other than 0 on a state without history.
        ValueError: a negative or larger length.
    """
    wanted = np.asarray(lengths, dtype=np.int64)
    if wanted.shape != present.shape or (wanted < 0).any() or (wanted > present).any():
        raise ValueError(f"cannot rewind rows of {present.tolist()} tokens to {wanted.tolist()}")
    if not can_rewind and ((wanted != present) & (wanted != 0)).any():
        raise CannotRewind(
            "the state of this model keeps no history, so it cannot rewind",
            hint="use snapshot and restore, or decode without speculation",
        )
    return wanted


def check_restore(snapshot: Snapshot, layout: str, max_context: int) -> None:
    """Validate a snapshot before a restore.

    Raises:
        SnapshotMismatch: another layout, or a part that does not start at 0.
        ContextOverflow: longer than ``max_context``.
    """
    if snapshot.layout != layout:
        raise SnapshotMismatch(f"the snapshot was taken from {snapshot.layout!r}", where=f"session {layout!r}")
    if snapshot.start != 0:
        raise SnapshotMismatch(f"the snapshot covers tokens {snapshot.start}..{snapshot.length} only")
    if snapshot.length > max_context:
        raise ContextOverflow(f"a snapshot of {snapshot.length} tokens does not fit into {max_context}")
