"""The bundle on disk: packages, tokenizer, embedding, and the manifest that describes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from ane.runtime.kv import Cache
from mlxkd.errors import UserError
from mlxkd.files import file_hash

FORMAT = 1
MANIFEST_FILE = "manifest.json"
EMBEDDING_FILE = "embedding.npy"
CARD_FILE = "README.md"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Tensor(_Part):
    """An input, output or state."""

    name: str
    shape: tuple[int, ...]
    dtype: Literal["float16", "int32"]


class FunctionEntry(_Part):
    """A function of every package: its role, rows and tokens per call."""

    name: str
    role: Literal["prefill", "decode", "verify"]
    batch: int
    query: int


class Signature(_Part):
    """What one function of one package takes and gives."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    states: tuple[Tensor, ...]


class Package(_Part):
    """One .mlpackage: layers ``start`` to ``stop``; ``head`` where it gives logits or tokens, of all splits or some."""

    file: str
    start: int
    stop: int
    head: bool
    weight_bytes: int
    caches: tuple[Cache, ...]
    functions: dict[str, Signature]


class RotaryTable(_Part):
    """Angles of the host's cos and sin inputs ``cos_<i>`` and ``sin_<i>``; see ``Rotary.table`` for the layout."""

    inverse_frequencies: tuple[float, ...]
    scale: float
    interleaved: bool


class Model(_Part):
    """What was converted."""

    family: str
    hidden: int
    vocab: int
    layers: int
    source: str
    source_hash: str


class Manifest(_Part):
    """The published schema of manifest.json.

    Args:
        context: tokens a row can hold. kv: where keys and values live between calls.
        positions, embedding: "host" where the session fills them in, "model" where the program does.
        head: "logits" in ``logits_<i>``, or "argmax" in ``token_<i>`` and ``score_<i>``; ``head_rows`` are the
            vocabulary ranges of the splits.
        mask_value: what hidden keys get in the masks.
        grids: number of weights per grid name ("float16" for plain ones).
        expected_loss: relative error of every weight that was quantised on export, by path.
        files: SHA-256 of every other file, by path below the bundle.
    """

    format: Literal[1] = 1
    model: Model
    profile: Literal["ane", "gpu"]
    target: str
    specification_version: int
    context: int
    kv: Literal["state", "explicit"]
    positions: Literal["host", "model"]
    embedding: Literal["host", "model"]
    head: Literal["logits", "argmax"]
    head_rows: tuple[tuple[int, int], ...]
    mask_value: float
    rotaries: tuple[RotaryTable, ...]
    functions: tuple[FunctionEntry, ...]
    packages: tuple[Package, ...]
    grids: dict[str, int]
    expected_loss: dict[str, float]
    options: dict[str, Any]
    made_by: dict[str, Any]
    files: dict[str, str]

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes, ascending."""
        return tuple(sorted({f.batch for f in self.functions}))


def read_manifest(bundle: str | Path) -> Manifest:
    """The manifest of a bundle.

    Raises:
        UserError: no bundle, or a manifest of another format.
    """
    path = Path(bundle) / MANIFEST_FILE
    if not path.is_file():
        raise UserError(
            f"not a bundle: {MANIFEST_FILE} is missing", where=str(bundle), hint="mlxkd export MODEL --to coreml"
        )
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(f"manifest does not fit: {place}: {first['msg']}", where=str(path)) from error


def verify(bundle: str | Path) -> None:
    """Compare every file with its checksum.

    Raises:
        UserError: naming every file that is missing or differs.
    """
    bundle = Path(bundle)
    manifest = read_manifest(bundle)
    wrong = []
    for name, wanted in manifest.files.items():
        path = bundle / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif file_hash(path) != wanted:
            wrong.append(f"{name} differs")
    if wrong:
        raise UserError("; ".join(wrong), where=str(bundle), hint="export or copy the bundle again")


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder but the manifest."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST_FILE)
    return {str(p.relative_to(folder)): file_hash(p) for p in paths}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json into a folder under construction."""
    text = json.dumps(manifest.model_dump(mode="json"), indent=1, ensure_ascii=False)
    (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def embedding_rows(bundle: Path) -> np.ndarray:
    """The host's embedding, float16 [vocab, hidden], mapped from disk."""
    return np.load(bundle / EMBEDDING_FILE, mmap_mode="r")
