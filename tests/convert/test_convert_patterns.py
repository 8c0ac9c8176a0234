"""docs/coreml.md lists every form of operation that we emit, with or without precedent, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from toy_models import on_grid

from ane.convert.bundle import read_manifest
from ane.convert.export import export
from ane.convert.options import Options
from ane.mil.types import TensorType
from ane.residency.program import Op, bare, functions, is_constexpr
from mlxkd.quant.grids import FLOAT

DOCS = Path(__file__).parents[2] / "docs" / "coreml.md"
SHALLOW = {"num_hidden_layers": 2, "sliding_window_pattern": 2}
# (family, changes of its config, grid, options): together they reach every branch that emits an operation.
BUNDLES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "state, two rows": ("llama", {}, FLOAT, {"batch": (1, 2), "chunks": 2, "verify": 3, "head_width": 40}),
    "neighbouring pairs": ("llama", {"rope_traditional": True}, "ane-lut4", {"embedding": "model", "head": "argmax"}),
    "explicit": ("gemma2", {}, FLOAT, {"kv": "explicit"}),
    "a ring, positions in the model": ("gemma3_text", {}, "ane-int8", {"positions": "model", "rewind": 12}),
    "a ring": ("gemma3_text", {}, "ane-lut4-gc8", {"rewind": 12, "batch": (2,)}),
    "gpu": (
        "mistral",
        {"intermediate_size": 96, "hidden_size": 64},
        "mlx-affine4-g32",
        {"profile": "gpu", "chunks": 2},
    ),
    "gpu, explicit": ("gemma3_text", {}, FLOAT, {"profile": "gpu", "kv": "explicit", "rewind": 0, "batch": (2,)}),
}


def form(op: Op) -> str:
    """The operation's name and what makes a difference to whoever compiles it."""
    kinds = {t.dtype for t in op.outputs if isinstance(t, TensorType)}
    marks = []
    weight = op.operand("weight")
    if op.type == "conv" and weight and weight.tensor and weight.tensor.shape:
        marks.append("x".join(map(str, weight.tensor.shape[2:])))
    if op.type == "layer_norm":
        (axis,) = op.value("axes").ravel()  # type: ignore[union-attr]
        marks.append("over channels" if axis == 1 else "over the last axis")
    if op.type == "slice_by_index" and op.operand("stride") and op.value("stride").max() > 1:  # type: ignore[union-attr]
        marks.append("strided")
    if any(len(t.shape or ()) > 4 for t in op.results):
        marks.append("rank 5")
    if "int32" in kinds:
        marks.append("int32")
    return " ".join([op.type, *marks])


def decompressions(op: Op) -> set[str]:
    """The forms in which the operation's weights are held."""
    nodes = [o.producer for o in op.operands if o.producer is not None and is_constexpr(o.producer)]
    return {bare(node) + " with offset" * ("offset" in node.inputs) for node in nodes}


@pytest.fixture(scope="module")
def emitted(toy: Any, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Forms in all bundles."""
    found: set[str] = set()
    for family, changes, weights, choices in BUNDLES.values():
        root = tmp_path_factory.mktemp("patterns")
        folder = on_grid(toy(family, **SHALLOW, **changes), root / "source", weights)
        export(folder, root / "bundle", Options(**{"context": 96, "prefill": 8, **choices}))
        for package in read_manifest(root / "bundle").packages:
            for function in functions(root / "bundle" / package.file):
                found |= {form(op) for op in function.ops}.union(*map(decompressions, function.ops))
    return found


def documented() -> set[str]:
    """Forms named in the last column of the two tables of patterns."""
    text = DOCS.read_text(encoding="utf-8").partition("## Patterns we emit")[2].partition("\n## ")[0]
    rows = [line.strip().strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row[-1])}


def test_every_emitted_form_is_listed(emitted: set[str]) -> None:
    assert (sorted(emitted - documented()), sorted(documented() - emitted)) == ([], [])
