"""Which grid each matrix is written on: the source's own codes, or new ones where somebody asked for them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import mlx.core as mx

from ane.convert.architecture import Architecture
from ane.convert.options import KEEP, Options
from ane.convert.program import head_path
from ane.convert.source import Source, linear_paths
from ane.convert.weights import Coded, Dense, Weight
from mlxkd import compat
from mlxkd.errors import UserError
from mlxkd.quant.grids import FLOAT, Codes, Grid, grid


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
    for path in paths:
        if source.grids.get(path) is wanted or wanted.fault(source.weight(path).shape):
            continue
        if master.weight(path).shape != source.weight(path).shape:
            raise UserError(
                f"{path} has shape {master.weight(path).shape} in the master and {source.weight(path).shape} here",
                where="--master",
            )
        source.override(path, _encoded(source, path, wanted, master.weight(path)), wanted)


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


def _encoded(source: Source, path: str, wanted: Grid, master: Weight) -> Coded:
    held: Codes = {}

    def fetch() -> Codes:
        if not held:
            dense = mx.array(master.dense())
            held.update(wanted.encode(dense, mx.float16))
            exact = dense.astype(mx.float32)
            error = wanted.decode(held, mx.float16).astype(mx.float32) - exact
            source.expected_loss[path] = float(mx.linalg.norm(error) / mx.maximum(mx.linalg.norm(exact), 1e-12))
        return held

    return Coded(path, master.shape, wanted, fetch, release=held.clear)
