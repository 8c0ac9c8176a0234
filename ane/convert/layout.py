"""Dividing a model into packages: which layers go where, which caches each holds."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from ane.convert.architecture import Architecture
from ane.convert.options import Options
from ane.runtime.kv import Cache, aligned
from mlxkd.errors import UserError


@dataclass(frozen=True)
class Chunk:
    """One package: layers ``start`` to ``stop``, with the embedding before or splits of the head behind them."""

    index: int
    start: int
    stop: int
    first: bool
    splits: range

    @property
    def name(self) -> str:
        """File name of the package."""
        return f"chunk_{self.index:02d}.mlpackage"


@dataclass(frozen=True)
class Sizes:
    """Bytes of weights: of the embedding in the program (0 where there is none), each layer, each split of the head."""

    embedding: int
    layers: tuple[int, ...]
    head: tuple[int, ...]

    @property
    def total(self) -> int:
        """Bytes of all packages."""
        return self.embedding + sum(self.layers) + sum(self.head)


def divide(sizes: Sizes, options: Options) -> list[Chunk]:
    """Packages for parts of these sizes, none above the limit, or exactly as many as asked for.

    Raises:
        UserError: one part alone exceeds the limit, or more packages than layers are asked for.
    """
    count, splits = len(sizes.layers), len(sizes.head)
    if options.chunks:
        cuts, heads = _even(count, options.chunks), [range(splits)]
    else:
        _check_limit(sizes, options.chunk_bytes)
        cuts, filled = _greedy(sizes, options.chunk_bytes)
        fits = filled + sum(sizes.head) <= options.chunk_bytes
        heads = [range(splits)] if fits else [range(0), *_fill_head(sizes.head, options.chunk_bytes)]
    edges = [0, *cuts, count]
    spans = [*itertools.pairwise(edges), *([(count, count)] * (len(heads) - 1))]
    behind = [range(0)] * (len(cuts)) + heads
    return [Chunk(i, *span, i == 0, part) for i, (span, part) in enumerate(zip(spans, behind, strict=True))]


def _even(layers: int, count: int) -> list[int]:
    if count > layers:
        raise UserError(f"{count} chunks of {layers} layers", where="--chunks", hint="ask for fewer chunks")
    return [round(i * layers / count) for i in range(1, count)]


def _check_limit(sizes: Sizes, limit: int) -> None:
    parts = [
        ("the embedding", sizes.embedding, "keep it on the host (--embedding host)"),
        *((f"layer {i}", size, "choose a smaller grid (--weights)") for i, size in enumerate(sizes.layers)),
        *((f"split {i} of the head", size, "lower --head-width") for i, size in enumerate(sizes.head)),
    ]
    for name, size, remedy in parts:
        if size > limit:
            raise UserError(
                f"{name} alone holds {size} bytes of weights, over the chunk limit of {limit}",
                where="--chunk-bytes",
                hint=f"raise the limit, or {remedy}",
            )


def _greedy(sizes: Sizes, limit: int) -> tuple[list[int], int]:
    """(layers at which a new package begins when each is filled up to the limit, bytes in the last)."""
    cuts, filled = [], sizes.embedding
    for i, size in enumerate(sizes.layers):
        if filled + size > limit:
            cuts.append(i)
            filled = 0
        filled += size
    return cuts, filled


def _fill_head(splits: tuple[int, ...], limit: int) -> list[range]:
    """Packages of the head alone: as many splits in each as the limit takes."""
    edges, filled = [0], 0
    for i, size in enumerate(splits):
        if filled + size > limit:
            edges.append(i)
            filled = 0
        filled += size
    return [range(*edge) for edge in itertools.pairwise([*edges, len(splits)])]


def caches(arch: Architecture, chunk: Chunk, options: Options) -> list[Cache]:
    """The caches of a chunk: full attention first, then the window."""
    layers = arch.layers[chunk.start : chunk.stop]
    windows = {layer.window for layer in layers if layer.window is not None}
    if len(windows) > 1:
        raise UserError(
            f"windows of {sorted(windows)} tokens in one chunk need more than two states",
            where="config.json: sliding_window",
            hint="the Neural Engine takes at most two states; use --chunks to separate the layers",
        )
    found = []
    if any(layer.window is None for layer in layers):
        found.append(_cache(arch, "kv_full", sum(layer.window is None for layer in layers), _slots(options)))
    for window in windows:
        ring, slots = _ring(window, options)
        count = sum(layer.window is not None for layer in layers)
        found.append(_cache(arch, "kv_window", count, slots, window, ring))
    return found


def _cache(
    arch: Architecture, name: str, layers: int, slots: int, window: int | None = None, ring: int | None = None
) -> Cache:
    return Cache(
        name=name,
        layers=layers,
        kv_heads=arch.kv_heads,
        head_dim=arch.head_dim,
        width=aligned(arch.head_dim),
        slots=slots,
        window=window,
        ring=ring,
    )


def _query(options: Options) -> int:
    return max(options.prefill, options.verify, 1)


def _slots(options: Options) -> int:
    """Slots of a cache that holds every token; a state also takes the padding of a call at its end."""
    return options.tokens + (aligned(_query(options)) if options.kv == "state" else 0)


def _ring(window: int, options: Options) -> tuple[int | None, int]:
    """Modulus and slots of a window's ring; no ring where the whole context is not larger.

    A call writes its padding too, so a ring holds the window, one call and what a rewind may take back; slots
    behind it receive the padding of a call that ends at its edge.
    """
    if options.kv == "explicit":
        ring = slots = aligned(window + options.rewind)
    else:
        ring = aligned(window + _query(options) + options.rewind)
        slots = ring + aligned(_query(options))
    return (ring, slots) if slots < _slots(options) else (None, _slots(options))
