"""Dividing a model into packages: which layers go where, which caches each holds."""

from __future__ import annotations

from dataclasses import dataclass

from ane.convert.architecture import Architecture
from ane.convert.options import Options
from ane.runtime.kv import Cache, aligned
from mlxkd.errors import UserError


@dataclass(frozen=True)
class Chunk:
    """One package: layers ``start`` to ``stop``, with the embedding before or the head behind them."""

    index: int
    start: int
    stop: int
    first: bool
    head: bool

    @property
    def name(self) -> str:
        """File name of the package."""
        return f"chunk_{self.index:02d}.mlpackage"


def divide(embedding: int, layers: list[int], head: int, options: Options) -> list[Chunk]:
    """Packages for parts of these weight bytes, none above the limit, or exactly as many as asked for.

    Raises:
        UserError: one part alone exceeds the limit, or more packages than layers are asked for.
    """
    cuts = _even(layers, options.chunks) if options.chunks else _greedy(embedding, layers, head, options.chunk_bytes)
    edges = [0, *cuts]
    return [
        Chunk(i, edge, (edges[i + 1] if i + 1 < len(edges) else len(layers)), i == 0, i == len(edges) - 1)
        for i, edge in enumerate(edges)
    ]


def _even(layers: list[int], count: int) -> list[int]:
    if count > len(layers):
        raise UserError(f"{count} chunks of {len(layers)} layers", where="--chunks", hint="ask for fewer chunks")
    return [round(i * len(layers) / count) for i in range(1, count)]


def _greedy(embedding: int, layers: list[int], head: int, limit: int) -> list[int]:
    """Fill each package up to the limit; the head goes with the last layers or alone behind them."""
    names = ["the embedding", *(f"layer {i}" for i in range(len(layers))), "the head"]
    for name, size in zip(names, [embedding, *layers, head], strict=True):
        if size > limit:
            raise UserError(
                f"{name} alone holds {size} bytes of weights, over the chunk limit of {limit}",
                where="--chunk-bytes",
                hint="raise the limit, keep the embedding on the host (--embedding host) or choose a smaller grid",
            )
    cuts, filled = [], embedding
    for i, size in enumerate(layers):
        if filled + size > limit:
            cuts.append(i)
            filled = 0
        filled += size
    return [*cuts, len(layers)] if filled + head > limit else cuts


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
