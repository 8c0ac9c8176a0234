"""Batches in a few fixed shapes, so that nothing recompiles; batch ``step`` depends on (seed, step) alone."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlxkd.data.example import Example, windows
from mlxkd.errors import UserError

Shape = tuple[int, int]


@dataclass(frozen=True)
class Batch:
    """B rows of S positions; shifted once, here: position s of ``inputs`` predicts ``labels[:, s]``.

    Args:
        inputs, labels: int32 [B, S], padded on the right.
        weights: float32 [B, S], the loss weight of each label; 0 on padding and context.
        rows: example index of each real row; rows beyond are padding.
        shape: (B, S).
    """

    inputs: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    rows: tuple[int, ...]
    shape: Shape

    @functools.cached_property
    def supervised(self) -> np.ndarray:
        """Flat indices (int64) into [B * S] whose label carries loss, ascending."""
        return np.flatnonzero(self.weights.reshape(-1) > 0).astype(np.int64)

    @functools.cached_property
    def visible(self) -> np.ndarray:
        """Flat indices (int64) into [B * S] of what supervised positions can see: in each row all up to its last."""
        beyond = np.cumsum(self.weights[:, ::-1] > 0, axis=1)[:, ::-1] == 0
        return np.flatnonzero(~beyond.reshape(-1)).astype(np.int64)


@dataclass
class Report:
    """What became of the examples; nothing is dropped without a line here."""

    examples: int = 0
    windows: int = 0
    truncated: int = 0
    supervised_tokens: int = 0
    lost_tokens: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    shapes: dict[Shape, int] = field(default_factory=dict)
    padding: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        shapes = {f"{b}x{s}": count for (b, s), count in self.shapes.items()}
        return {**vars(self), "skipped": dict(self.skipped), "shapes": shapes}

    def lines(self) -> list[str]:
        """For people."""
        out = [f"{self.examples} examples, {self.supervised_tokens} supervised tokens, {self.padding:.0%} padding"]
        if self.windows:
            out.append(f"{self.windows} windows cut from long documents, no token lost")
        if self.truncated:
            out.append(f"{self.truncated} examples truncated, {self.lost_tokens} supervised tokens lost")
        out += [f"{count} examples skipped: {reason}" for reason, count in sorted(self.skipped.items())]
        return out


class Batches:
    """An endless, seekable run of batches over examples.

    Args:
        examples: rendered records. Long documents (``meta["kind"] == "text"``) are split into windows.
        shapes: (rows, positions) of the compiled shapes; an example goes to the shortest that holds it.
        seed: of the shuffles; each epoch has its own.
        mix: share of the batches that each shape gets, in the order of ``shapes``. Without it shapes occur as
            often as the lengths do and every example once per epoch; with it an epoch keeps its number of
            batches and the examples of a shape recur as its share demands.
        too_long: "truncate" keeps the first positions of a conversation; "skip" leaves it out.
        pad: token id for padding (its weight is 0, its value never matters).

    Raises:
        UserError: no usable example, a shape that is no pair of positive numbers, shares that do not fit.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        shapes: Sequence[Shape],
        seed: int = 0,
        *,
        mix: Sequence[float] | None = None,
        too_long: str = "truncate",
        pad: int = 0,
    ):
        self.shapes = _checked_shapes(shapes, mix)
        self.seed, self.pad = seed, pad
        order = sorted(range(len(shapes)), key=lambda k: shapes[k][1])
        shares = [mix[k] for k in order] if mix is not None else None
        self.report = Report(examples=len(examples))
        self.examples = self._usable(examples, too_long)
        self._buckets = self._assign()
        self._counts = self._batches_per_epoch(shares)
        self._summarise()

    def __len__(self) -> int:
        """Batches per epoch."""
        return sum(self._counts)

    def batch(self, step: int) -> Batch:
        """Batch number ``step`` (0, 1, …) of the run; the same for equal seed, whatever came before."""
        epoch, position = divmod(step, len(self))
        bucket, index = self._schedule(epoch)[position]
        rows = self._rows(bucket, epoch * self._counts[bucket] + index)
        return build(self.examples, rows, self.shapes[bucket], self.pad)

    def _usable(self, examples: Sequence[Example], too_long: str) -> list[Example]:
        longest = self.shapes[-1][1]
        kept: list[Example] = []
        for example in examples:
            if len(example) > longest + 1 and example.meta.get("kind") == "text":
                pieces = windows(example, longest)
                self.report.windows += len(pieces)
                kept += pieces
                continue
            if len(example) > longest + 1:
                if too_long == "skip":
                    self.report.skipped[f"longer than {longest} positions"] += 1
                    continue
                example = self._truncated(example, longest)
            if not example.supervised:
                self.report.skipped["no supervised token"] += 1
                continue
            kept.append(example)
        if not kept:
            reasons = "; ".join(f"{n} {reason}" for reason, n in self.report.skipped.items()) or "there are none"
            raise UserError(f"no example can be used: {reasons}", where="data", hint="`mlxkd data inspect FILE`")
        return kept

    def _truncated(self, example: Example, longest: int) -> Example:
        short = windows(example, longest)[0]
        self.report.truncated += 1
        self.report.lost_tokens += example.supervised - short.supervised
        return short

    def _assign(self) -> list[np.ndarray]:
        lengths = np.array([s for _, s in self.shapes])
        needed = np.array([len(example) - 1 for example in self.examples])
        bucket = np.searchsorted(lengths, needed)
        return [np.flatnonzero(bucket == k) for k in range(len(lengths))]

    def _batches_per_epoch(self, shares: list[float] | None) -> list[int]:
        natural = [-(-len(rows) // b) for rows, (b, _) in zip(self._buckets, self.shapes, strict=True)]
        if shares is None:
            return natural
        for rows, share, (_, length) in zip(self._buckets, shares, self.shapes, strict=True):
            if share > 0 and not len(rows):
                raise UserError(
                    f"the mix gives {share:g} to length {length}, but no example has that length",
                    where="data.mix",
                    hint="`mlxkd data inspect FILE` shows the lengths",
                )
            if share == 0 and len(rows):
                self.report.skipped[f"length {length} has no share in the mix"] += len(rows)
        return _largest_remainder(max(sum(natural), sum(s > 0 for s in shares)), shares)

    @functools.lru_cache(maxsize=2)  # noqa: B019  one run owns one Batches
    def _schedule(self, epoch: int) -> list[tuple[int, int]]:
        batches = [(k, i) for k, count in enumerate(self._counts) for i in range(count)]
        order = np.random.default_rng([self.seed, 1, epoch]).permutation(len(batches))
        return [batches[i] for i in order]

    def _rows(self, bucket: int, number: int) -> list[int]:
        """Examples of the bucket's batch ``number``; a pass over the bucket ends in a short batch, then reshuffles."""
        size, rows = self.shapes[bucket][0], self._buckets[bucket]
        per_pass = -(-len(rows) // size)
        turn, index = divmod(number, per_pass)
        order = self._permutation(bucket, turn)
        return [int(rows[i]) for i in order[index * size : (index + 1) * size]]

    @functools.lru_cache(maxsize=16)  # noqa: B019
    def _permutation(self, bucket: int, turn: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 2, bucket, turn]).permutation(len(self._buckets[bucket]))

    def _summarise(self) -> None:
        self.report.supervised_tokens = sum(example.supervised for example in self.examples)
        self.report.shapes = dict(zip(self.shapes, self._counts, strict=True))
        places = sum(b * s * -(-len(rows) // b) for rows, (b, s) in zip(self._buckets, self.shapes, strict=True))
        used = sum(len(example) - 1 for example in self.examples)
        self.report.padding = 1 - used / places


def build(examples: Sequence[Example], rows: Sequence[int], shape: Shape, pad: int = 0) -> Batch:
    """The batch of these rows of ``examples``, each at most ``shape[1] + 1`` tokens long."""
    inputs = np.full(shape, pad, dtype=np.int32)
    labels = np.full(shape, pad, dtype=np.int32)
    weights = np.zeros(shape, dtype=np.float32)
    for r, index in enumerate(rows):
        example = examples[index]
        n = len(example) - 1
        inputs[r, :n], labels[r, :n], weights[r, :n] = example.tokens[:-1], example.tokens[1:], example.weights[1:]
    return Batch(inputs, labels, weights, tuple(rows), shape)


def _checked_shapes(shapes: Sequence[Shape], mix: Sequence[float] | None) -> list[Shape]:
    if not shapes or any(len(shape) != 2 or min(shape) < 1 for shape in shapes):
        raise UserError(f"shapes must be pairs (rows, positions), not {list(shapes)}", where="data.shapes")
    if len({s for _, s in shapes}) != len(shapes):
        raise UserError(f"two shapes have the same length: {list(shapes)}", where="data.shapes")
    if mix is not None and (len(mix) != len(shapes) or min(mix) < 0 or abs(sum(mix) - 1) > 1e-6):
        raise UserError(f"mix must give each of the {len(shapes)} shapes a share, adding to 1", where="data.mix")
    return sorted(((int(b), int(s)) for b, s in shapes), key=lambda shape: shape[1])


def _largest_remainder(total: int, shares: Sequence[float]) -> list[int]:
    exact = [share * total for share in shares]
    counts = [max(int(x), int(share > 0)) for x, share in zip(exact, shares, strict=True)]
    by_remainder = sorted(range(len(shares)), key=lambda k: int(exact[k]) - exact[k])
    for k in by_remainder[: max(0, total - sum(counts))]:
        counts[k] += 1
    return counts
