"""Which grid each matrix is written on: the source's own codes, or new ones where somebody asked for them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from ane.convert.architecture import Architecture
from ane.convert.constants import Latest
from ane.convert.options import KEEP, Options
from ane.convert.program import head_path
from ane.convert.source import Source, linear_paths
from ane.convert.weights import Coded, Dense, Rows, Weight, part
from mlxkd import compat
from mlxkd.errors import UserError
from mlxkd.quant.grids import FLOAT, Codes, Grid, grid

ELEMENTS_AT_ONCE = 1 << 22  # of a float weight that is being encoded


def matrix_paths(arch: Architecture, options: Options) -> list[str]:
    """Every matrix that a package holds."""
    paths = [path for i in range(len(arch.layers)) for path in linear_paths(i)]
    return [*paths, *dict.fromkeys([head_path(arch), *(["model.embed_tokens"] * (options.embedding == "model"))])]


def settle(source: Source, arch: Architecture, options: Options) -> None:
    """Check the source's grids against the profile, or arrange the new grid that the options name.

    Nothing is quantised a second time unless ``options.weights`` says so; a layer that lies on the named grid
    already keeps its codes. What is quantised notes its relative error in ``source.expected_loss`` when written.

    Raises:
        UserError: codes that the profile cannot hold, a grid it cannot hold, or a master of another shape.
    """
    paths = matrix_paths(arch, options)
    if options.weights == KEEP:
        _refuse_foreign({path: source.grids[path] for path in paths if path in source.grids}, options, source)
        return
    if options.weights == FLOAT:
        for path in paths:
            source.override(path, _decoded(source, path))
        return
    wanted = grid(options.weights)
    if not _fits(wanted, options):
        raise UserError(
            f"the Neural Engine cannot hold {wanted.name}",
            where="--weights",
            hint="use an ane grid, or --profile gpu",
        )
    master = Source(compat.resolve_model(Path(options.master))) if options.master else source
    latest = Latest()
    for path in paths:
        if source.grids.get(path) is wanted or wanted.fault(source.weight(path).shape):
            continue
        if master.weight(path).shape != source.weight(path).shape:
            raise UserError(
                f"{path} has shape {master.weight(path).shape} in the master and {source.weight(path).shape} here",
                where="--master",
            )
        source.override(path, _encoded(source, path, wanted, master.weight(path), latest), wanted)


def _fits(found: Grid, options: Options) -> bool:
    """The Neural Engine takes palettes and per-channel scales only; those are the grids MLX cannot pack."""
    return options.profile == "gpu" or found.packing is None


def _refuse_foreign(grids: dict[str, Grid], options: Options, source: Source) -> None:
    foreign = Counter(found.name for found in grids.values() if not _fits(found, options))
    if foreign:
        listed = ", ".join(f"{count} on {name}" for name, count in sorted(foreign.items()))
        raise UserError(
            f"the Neural Engine miscomputes or refuses per-block scales: {listed} of {len(grids)} coded layers",
            where=str(source.folder),
            hint="keep the codes with --profile gpu, or quantise anew with --weights ane-lut4 and --master, the "
            "float model (the loss is printed)",
        )


def _decoded(source: Source, path: str) -> Weight:
    weight = source.weight(path)
    return Dense(path, weight.shape, lambda rows: mx.array(weight.dense(rows)))


def _encoded(source: Source, path: str, wanted: Grid, master: Weight, latest: Latest) -> Coded:
    def make() -> Codes:
        codes, source.expected_loss[path] = encode(master, wanted)
        return codes

    return Coded(path, master.shape, wanted, held(latest, path, master.shape[0], make))


def held(latest: Latest, path: str, out: int, make: Callable[[], Codes]) -> Callable[[Rows | None], Codes]:
    """Reads codes, or those of some of their ``out`` rows, that are made once and kept until others are asked for."""

    def fetch(rows: Rows | None) -> Codes:
        whole = latest.get(path, make)
        return {name: array[slice(*part(array.shape[0], out, rows, path))] for name, array in whole.items()}

    return fetch


def encode(master: Weight, wanted: Grid) -> tuple[Codes, float]:
    """(codes of a float weight, relative error |decoded - weight| / |weight|).

    Some rows at a time where the grid lets rows be encoded apart, so that the float numbers are never all in memory.
    """
    rows = master.shape[0]
    step = max(1, ELEMENTS_AT_ONCE // master.shape[1]) if wanted.rowwise else rows
    parts: list[Codes] = []
    lost = whole = 0.0
    for start in range(0, rows, step):
        dense = mx.array(master.dense((start, min(start + step, rows))))
        part, exact = wanted.encode(dense, mx.float16), dense.astype(mx.float32)
        error = wanted.decode(part, mx.float16).astype(mx.float32) - exact
        lost += float(mx.sum(mx.square(error)))
        whole += float(mx.sum(mx.square(exact)))
        mx.eval(part)
        parts.append(part)
    codes = {name: mx.concatenate([part[name] for part in parts]) for name in parts[0]}
    mx.eval(codes)
    return codes, math.sqrt(lost / max(whole, 1e-24))
