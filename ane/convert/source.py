"""The model to convert: an mlx-lm folder, its float weights and its codes, read as they are needed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ane.convert.tensors import TensorFile
from ane.convert.weights import Coded, Dense, Rows, Weight, part
from mlxkd import compat
from mlxkd.errors import UserError
from mlxkd.quant.grids import Codes, Grid, grid

METADATA_FILE, CODES_FILE = "mlxkd.json", "codes.safetensors"


LINEARS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


def linear_paths(layer: int) -> list[str]:
    """Paths of a layer's matrices."""
    return [f"model.layers.{layer}.{name}" for name in LINEARS]


class Source:
    """Weights by their mlx-lm path, e.g. "model.layers.0.mlp.up_proj".

    Nothing read stays in memory once the caller lets go of it.

    Args:
        folder: an mlx-lm model folder, or a student of ours.

    Raises:
        UserError: no such model, an architecture mlx-lm does not have, or files that do not fit it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        model, self.config = compat.load_model(folder, lazy=True)
        parameters: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
        self._shapes = {name: tuple(value.shape) for name, value in parameters}
        self._files: dict[str, TensorFile] = {}
        for path in sorted(folder.glob("model*.safetensors")):
            file = TensorFile(path)
            self._files |= dict.fromkeys(file.shapes, file)
        lost = sorted(name for name in self._shapes if name not in self._files)
        if lost:
            raise UserError(
                f"{len(lost)} weights are not stored under their mlx-lm names, e.g. {lost[0]}",
                where=str(folder),
                hint="run `mlx_lm.convert` on the model first",
            )
        self.grids: dict[str, Grid] = _packed_grids(model) | _student_grids(folder)
        self._code_files = self._open_codes()
        self.expected_loss: dict[str, float] = {}
        self._weights: dict[str, Weight] = {}

    def _open_codes(self) -> dict[str, TensorFile]:
        """The file of a student's codes, by the name of each array."""
        path = self.folder / CODES_FILE
        if path.is_file():
            file = TensorFile(path)
            return dict.fromkeys(file.shapes, file)
        if any(found.packing is None for found in self.grids.values()):
            raise UserError(f"{CODES_FILE} is missing", where=str(self.folder), hint="pack the student again")
        return {}

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return not any(name.startswith("lm_head.") for name in self._shapes)

    def has(self, name: str) -> bool:
        """Whether a parameter exists."""
        return name in self._shapes

    def vector(self, name: str) -> np.ndarray:
        """A small float parameter, float32."""
        return np.array(self._files[name].read(name).astype(mx.float32))

    def weight(self, path: str) -> Weight:
        """The matrix of a linear layer or embedding."""
        if path not in self._weights:
            self._weights[path] = self._open(path)
        return self._weights[path]

    def override(self, path: str, weight: Weight, found: Grid | None = None) -> None:
        """Write another weight in place of the stored one; ``found`` is its grid, None for float."""
        self._weights[path] = weight
        self.grids.pop(path, None)
        if found is not None:
            self.grids[path] = found

    def _open(self, path: str) -> Weight:
        name = f"{path}.weight"
        shape = self._shapes[name]
        if path not in self.grids:
            return Dense(path, (shape[0], shape[1]), lambda rows: self._files[name].read(name, rows))
        found = self.grids[path]
        if found.packing is not None:
            width, file_of = shape[1] * 32 // found.bits, self._files
            names = {key: f"{path}.{key}" for key in ("weight", "scales", "biases") if f"{path}.{key}" in self._shapes}
        else:
            width, file_of = shape[1], self._code_files
            names = {name.rpartition(".")[2]: name for name in file_of if name.rpartition(".")[0] == path}
            if not names:
                raise UserError(f"{CODES_FILE} holds no codes of {path}", where=str(self.folder))

        def fetch(rows: Rows | None) -> Codes:
            def read(name: str) -> mx.array:
                file = file_of[name]
                return file.read(name, part(file.shapes[name][0], shape[0], rows, path))

            return {key: read(name) for key, name in names.items()}

        return Coded(path, (shape[0], width), found, fetch)

    def digest(self) -> str:
        """SHA-256 over the config and every weight file, as hex."""
        total = hashlib.sha256(json.dumps(self.config, sort_keys=True, default=str).encode())
        files = {file.path for file in (*self._files.values(), *self._code_files.values())}
        for path in sorted(files):
            with path.open("rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
        return total.hexdigest()


def _packed_grids(model: nn.Module) -> dict[str, Grid]:
    """Layers that mlx-lm holds packed, by path.

    Raises:
        UserError: a packed form that is no grid of ours.
    """
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            mode = getattr(module, "mode", "affine")
            name = f"mlx-affine{module.bits}-g{module.group_size}" if mode == "affine" else f"mlx-{mode}"
            found[path] = grid(name)
    return found


def _student_grids(folder: Path) -> dict[str, Grid]:
    """Layers whose codes a student of ours keeps beside the decoded weights."""
    if not (folder / METADATA_FILE).is_file():
        return {}
    document: dict[str, Any] = json.loads((folder / METADATA_FILE).read_text(encoding="utf-8"))
    grids = {path: grid(name) for path, name in document.get("grids", {}).items()}
    return {path: found for path, found in grids.items() if found.packing is None}
