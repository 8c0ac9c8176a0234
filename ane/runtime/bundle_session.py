"""A session on a bundle: positions, masks, padding and packages in sequence, whatever engine predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ane.convert.architecture import Rotary
from ane.convert.bundle import FunctionEntry, Manifest, Package, embedding_rows
from ane.runtime.kv import Cache, mask
from ane.runtime.stores import ExplicitStore, StateStore
from mlxkd.decode.session import CannotRewind, Snapshot, check_extend, check_restore, check_rewind


class Runner(Protocol):
    """One opened package of an engine. States are shared by the functions of one batch size."""

    def make_state(self, function: str) -> Any:
        """Fresh states of a function."""

    def predict(self, function: str, inputs: Mapping[str, np.ndarray], state: Any | None) -> Mapping[str, np.ndarray]:
        """Outputs by name; the state is updated in place."""

    def read_state(self, state: Any, name: str) -> np.ndarray:
        """A copy of a state, float16."""

    def write_state(self, state: Any, name: str, value: np.ndarray) -> None:
        """Replace a state."""


class BundleSession:
    """See ``mlxkd.decode.session.Session``.

    Args:
        bundle: the folder. manifest: its description.
        runners: one opened package per manifest entry.
        batch: rows, one of the manifest's batch sizes.

    A bundle exported with the argmax head gives logits that are minus infinity but for each split's best token.
    """

    can_rewind = True
    computes_all_rows = True
    takes_device_tokens = False

    def __init__(self, bundle: Path, manifest: Manifest, runners: Sequence[Runner], batch: int):
        self.manifest, self.batch_size = manifest, batch
        self.vocab_size, self.max_context = manifest.model.vocab, manifest.context
        entries = sorted((f for f in manifest.functions if f.batch == batch), key=lambda f: f.query)
        self._functions = {entry.query: entry for entry in entries}
        self.query_sizes: tuple[int, ...] | None = tuple(self._functions)
        self._packages = list(zip(manifest.packages, runners, strict=True))
        explicit = manifest.kv == "explicit"
        first = entries[0].name
        self._stores: list[StateStore | ExplicitStore] = [
            ExplicitStore(package, batch) if explicit else StateStore(runner, package, batch, first)
            for package, runner in self._packages
        ]
        self._caches: list[tuple[int, Cache]] = [
            (i, cache) for i, package in enumerate(manifest.packages) for cache in package.caches
        ]
        self._rotaries = [Rotary(t.inverse_frequencies, t.scale, t.interleaved) for t in manifest.rotaries]
        self._embedding = embedding_rows(bundle) if manifest.embedding == "host" else None
        self._lengths = np.zeros(batch, dtype=np.int64)
        self._written = np.zeros(batch, dtype=np.int64)  # slots up to here hold something, padding included

    @property
    def lengths(self) -> np.ndarray:
        """int64[B]: tokens each row has seen."""
        return self._lengths.copy()

    @property
    def layout(self) -> str:
        """Source, cache shapes and precision: the same for every engine and batch size."""
        caches = "+".join(f"{i}.{c.name}:{c.layers}x{c.slots}x{c.width}" for i, c in self._caches)
        return f"bundle:{self.manifest.model.source_hash[:16]}:{self.manifest.kv}:{caches}:float16"

    # Extending -------------------------------------------------------------------------------------------

    def extend(self, tokens: np.ndarray, counts: Sequence[int] | None = None) -> np.ndarray:
        """See ``Session.extend``; float32[B, q, V]."""
        tokens, valid = check_extend(tokens, counts, self._lengths, self.max_context, self.vocab_size)
        logits = np.zeros((*tokens.shape, self.vocab_size), np.float32)
        done = np.zeros_like(valid)
        while (done < valid).any():
            entry = self._choose(int((valid - done).max()))
            step = np.minimum(valid - done, entry.query)
            for _, cache in self._caches:
                step = np.minimum(step, [cache.span(int(start)) for start in self._lengths])
            padded = np.zeros((self.batch_size, entry.query), np.int32)
            for row, (begin, count) in enumerate(zip(done, step, strict=True)):
                padded[row, :count] = tokens[row, begin : begin + count]
            part = self._call(entry, padded, step)
            for row, (begin, count) in enumerate(zip(done, step, strict=True)):
                logits[row, begin : begin + count] = part[row, :count]
            self._lengths += step
            done += step
        return logits

    def wait(self) -> None:
        """See ``Session.wait``: ``extend`` computes at once."""

    def _choose(self, wanted: int) -> FunctionEntry:
        """The smallest function that takes ``wanted`` tokens, else the largest."""
        fitting = [size for size in self._functions if size >= wanted]
        return self._functions[min(fitting) if fitting else max(self._functions)]

    def _call(self, entry: FunctionEntry, tokens: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """One call of every package in turn; logits [B, query, V]."""
        starts, given = self._lengths.copy(), dict[str, np.ndarray]()
        shared = self._shared_inputs(entry, tokens, starts)
        for (package, runner), store in zip(self._packages, self._stores, strict=True):
            wanted = {t.name for t in package.functions[entry.name].inputs}
            offered = {**shared, **self._masks(package, entry, starts, wanted), **store.inputs}
            inputs = {name: value for name, value in offered.items() if name in wanted}
            outputs = dict(runner.predict(entry.name, inputs, store.state))
            store.accept(outputs, starts, counts)
            if "hidden_out" in outputs:
                shared["hidden"] = outputs["hidden_out"]
            if package.head:  # which may lie in several packages
                given |= outputs
        self._written = np.maximum(self._written, starts + entry.query)
        return self._logits(given)

    def _shared_inputs(self, entry: FunctionEntry, tokens: np.ndarray, starts: np.ndarray) -> dict[str, np.ndarray]:
        shared: dict[str, np.ndarray] = {"tokens": tokens, "position": starts.astype(np.int32)}
        if self._embedding is not None:
            shared["hidden"] = np.asarray(self._embedding[tokens])[:, None]
        rings = {cache.ring for _, cache in self._caches if cache.ring}
        if rings:
            shared["slot"] = (starts % rings.pop()).astype(np.int32)
        if self.manifest.positions == "host":
            positions = starts[:, None] + np.arange(entry.query)
            for number, rotary in enumerate(self._rotaries):
                cos, sin = rotary.table(positions)
                shared[f"cos_{number}"], shared[f"sin_{number}"] = cos[:, None], sin[:, None]
        return shared

    def _masks(
        self, package: Package, entry: FunctionEntry, starts: np.ndarray, wanted: set[str]
    ) -> dict[str, np.ndarray]:
        return {
            f"mask_{cache.name}": mask(cache, self.manifest.kv, starts, entry.query, self.manifest.mask_value)
            for cache in package.caches
            if f"mask_{cache.name}" in wanted
        }

    def _logits(self, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
        rows = self.manifest.head_rows
        if self.manifest.head == "logits":
            return np.concatenate([outputs[f"logits_{i}"] for i in range(len(rows))], axis=-1).astype(np.float32)
        best = np.stack([outputs[f"token_{i}"] + start for i, (start, _) in enumerate(rows)], axis=-1)
        score = np.stack([outputs[f"score_{i}"] for i in range(len(rows))], axis=-1)
        logits = np.full((*best.shape[:-1], self.vocab_size), -np.inf, np.float32)
        np.put_along_axis(logits, best.astype(np.int64), score.astype(np.float32), axis=-1)
        return logits

    # Going back ------------------------------------------------------------------------------------------

    def rewind(self, lengths: Sequence[int]) -> None:
        """See ``Session.rewind``; a sliding window goes back as far as the bundle's ``rewind`` option."""
        wanted = check_rewind(lengths, self._lengths, self.can_rewind)
        for row, length in enumerate(wanted):
            if not all(cache.intact(int(length), int(self._written[row])) for _, cache in self._caches):
                raise CannotRewind(
                    f"row {row} cannot go back from {self._lengths[row]} to {length} tokens: its sliding window "
                    "no longer holds them",
                    hint="export with a larger --rewind, or use snapshot and restore",
                )
        self._lengths = wanted.copy()
        self._written[wanted == 0] = 0

    def snapshot(self, row: int) -> Snapshot:
        """See ``Session.snapshot``. Windows are kept whole, so only models without them can cut a snapshot."""
        arrays: dict[str, np.ndarray] = {}
        axes: dict[str, int | None] = {}
        length = int(self._lengths[row])
        for i, cache in self._caches:
            held = self._stores[i].read(cache, row)
            name = f"{i}.{cache.name}"
            arrays[name] = held if cache.ring else held[..., :length, :].copy()
            axes[name] = None if cache.ring else -2
        if any(cache.ring for _, cache in self._caches):
            arrays["written"], axes["written"] = self._written[row : row + 1].copy(), None
        return Snapshot(length, arrays, axes, self.layout)

    def restore(self, row: int, snapshot: Snapshot) -> None:
        """See ``Session.restore``."""
        check_restore(snapshot, self.layout, self.max_context)
        for i, cache in self._caches:
            self._stores[i].write(cache, row, np.asarray(snapshot.arrays[f"{i}.{cache.name}"]))
        self._lengths[row] = snapshot.length
        self._written[row] = int(snapshot.arrays["written"][0]) if "written" in snapshot.arrays else snapshot.length
