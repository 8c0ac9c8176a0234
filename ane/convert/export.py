"""From a model folder to a bundle: plan, build, write, rename."""

from __future__ import annotations

import errno
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ane.convert import families
from ane.convert.architecture import Architecture
from ane.convert.bundle import (
    CARD_FILE,
    EMBEDDING_FILE,
    FunctionEntry,
    Manifest,
    Model,
    Package,
    RotaryTable,
    Signature,
    Tensor,
    checksums,
    write_manifest,
)
from ane.convert.card import model_card
from ane.convert.choose import matrix_paths, settle
from ane.convert.constants import Constants, mil_types
from ane.convert.layout import Chunk, Sizes, caches, divide
from ane.convert.options import Options
from ane.convert.positions import MASK_VALUE
from ane.convert.program import FunctionBuilder, head_path, head_rows
from ane.convert.progress import Progress
from ane.convert.serialise import save_package
from ane.convert.source import Source, linear_paths
from mlxkd import compat
from mlxkd.errors import UserError
from mlxkd.files import atomic_folder
from mlxkd.runtime import artefact_metadata

ROWS_AT_ONCE = 8192
NEARLY_FULL = 1 << 24  # free bytes below which a failed write means a full disk


def export(
    model: str | Path, out: str | Path, options: Options | None = None, progress: Progress | None = None
) -> Manifest:
    """Convert an mlx-lm model folder to a Core ML bundle.

    Args:
        model: folder or Hugging Face repository.
        out: bundle folder, replaced whole when the conversion succeeds and left alone when not.
        options: see `Options`.
        progress: told of every stage and of the bytes written.

    Returns:
        the manifest that was written.

    Raises:
        UserError: a family, value, grid or size that does not convert, a context that the model was not made for, or
            a disk that is full.
    """
    progress = progress or Progress()
    folder = compat.resolve_model(model)
    arch = families.architecture(compat.load_config(folder))  # refuses a family before its weights are opened
    source = Source(folder)
    arch = replace(arch, tied=source.tied)
    options = (options or Options()).resolved(arch.max_positions)
    settle(source, arch, options)
    sizes = weight_sizes(source, arch, options)
    chunks = divide(sizes, options)
    total = sizes.total + (2 * arch.vocab * arch.hidden if options.embedding == "host" else 0)
    _check_space(Path(out), total)
    progress.start(total)
    with atomic_folder(out) as temporary, _disk_faults(temporary):
        packages = []
        for chunk in chunks:
            label = f"package {chunk.index + 1} of {len(chunks)}"
            packages.append(_package(temporary, chunk, arch, source, options, progress, label))
        if options.embedding == "host":
            _write_embedding(temporary, arch, source, progress)
        for name in (*compat.TOKENIZER_FILES, "config.json"):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, temporary / name)
        progress.stage("checksums")
        manifest = describe(str(model), arch, source, options, packages)
        (temporary / CARD_FILE).write_text(model_card(manifest), encoding="utf-8")
        manifest = manifest.model_copy(update={"files": checksums(temporary)})
        write_manifest(temporary, manifest)
    return manifest


def weight_sizes(source: Source, arch: Architecture, options: Options) -> Sizes:
    """Bytes of weights of every part that `divide` places."""
    embedding = source.weight("model.embed_tokens").nbytes if options.embedding == "model" else 0
    layers = tuple(sum(source.weight(path).nbytes for path in linear_paths(i)) for i in range(len(arch.layers)))
    head = source.weight(head_path(arch)).nbytes
    splits = head_rows(arch.vocab, options.head_width or 0)
    return Sizes(embedding, layers, tuple(head * (stop - start) // arch.vocab for start, stop in splits))


def _check_space(out: Path, needed: int) -> None:
    """Refuse before work begins where the disk cannot take the bundle.

    Raises:
        UserError: naming what is needed and what is free.
    """
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(
            f"the bundle needs {needed / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free",
            where=str(out),
            hint="free space or choose another output folder",
        )


@contextmanager
def _disk_faults(folder: Path) -> Iterator[None]:
    """coremltools reports a full disk as a RuntimeError; say what it is."""
    try:
        yield
    except RuntimeError as error:
        if shutil.disk_usage(folder).free < NEARLY_FULL:
            raise OSError(errno.ENOSPC, str(error)) from error
        raise


def _package(
    folder: Path, chunk: Chunk, arch: Architecture, source: Source, options: Options, progress: Progress, label: str
) -> Package:
    """Build and write one package; ``label`` names it to the person who waits."""
    progress.stage(f"{label}: building")
    constants = Constants()
    functions = {
        name: FunctionBuilder(arch, source, constants, chunk, options, batch, query).build()
        for name, _, batch, query in options.functions()
    }
    signatures = {name: _signature(function) for name, function in functions.items()}
    progress.stage(f"{label}: writing")
    path = folder / chunk.name
    save_package(path, functions, constants, progress.advance)
    mx.clear_cache()  # the buffers of the weights that were read
    blob = path / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    return Package(
        file=chunk.name,
        start=chunk.start,
        stop=chunk.stop,
        head=bool(chunk.splits),
        weight_bytes=blob.stat().st_size if blob.is_file() else 0,
        caches=tuple(caches(arch, chunk, options)),
        functions=signatures,
    )


def _signature(function: Any) -> Signature:
    types = mil_types()

    def tensor(var: Any) -> Tensor:
        return Tensor(name=var.name, shape=var.shape, dtype="int32" if var.dtype == types.int32 else "float16")

    kinds: dict[bool, list[Tensor]] = {True: [], False: []}
    for var in function.inputs.values():
        kinds[types.is_state(var.sym_type)].append(tensor(var))
    outputs = tuple(tensor(var) for var in function.outputs)
    return Signature(inputs=tuple(kinds[False]), states=tuple(kinds[True]), outputs=outputs)


def _write_embedding(folder: Path, arch: Architecture, source: Source, progress: Progress) -> None:
    """The host's embedding, scaled, as float16 rows in NumPy's format; some rows in memory at a time."""
    progress.stage("embedding for the host")
    weight = source.weight("model.embed_tokens")
    header = {"descr": "<f2", "fortran_order": False, "shape": (arch.vocab, arch.hidden)}
    with (folder / EMBEDDING_FILE).open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for start in range(0, arch.vocab, ROWS_AT_ONCE):
            rows = weight.dense((start, min(start + ROWS_AT_ONCE, arch.vocab)))
            if arch.embedding_scale != 1.0:
                rows = (rows.astype(np.float32) * np.float32(arch.embedding_scale)).astype(np.float16)
            stream.write(rows.tobytes())
            progress.advance(rows.nbytes)


def describe(name: str, arch: Architecture, source: Source, options: Options, packages: list[Package]) -> Manifest:
    """The manifest of packages, without checksums."""
    paths = matrix_paths(arch, options)
    grids = Counter(source.grids[path].name if path in source.grids else "float16" for path in paths)
    return Manifest(
        model=Model(
            family=arch.family,
            hidden=arch.hidden,
            vocab=arch.vocab,
            layers=len(arch.layers),
            source=name,
            source_hash=source.digest(),
        ),
        profile=options.profile,
        target=options.target,
        specification_version={"iOS18": 9, "iOS26": 10}[options.target],
        context=options.tokens,
        kv=options.kv,
        positions=options.positions or "host",
        embedding=options.embedding or "host",
        head=options.head,
        head_rows=tuple(head_rows(arch.vocab, options.head_width or 0)),
        mask_value=MASK_VALUE,
        rotaries=tuple(RotaryTable(**asdict(table)) for table in arch.rotaries),
        functions=tuple(
            FunctionEntry(name=name, role=role, batch=batch, query=query)  # type: ignore[arg-type]
            for name, role, batch, query in options.functions()
        ),
        packages=tuple(packages),
        grids=dict(grids),
        expected_loss=source.expected_loss,
        options=options.to_json(),
        made_by=artefact_metadata(),
        files={},
    )
