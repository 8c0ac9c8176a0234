"""One comparison of the suite on disk: a saved model, inputs, expected outputs and the suite's tolerance."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxkd.files import atomic_folder

Arrays = dict[str, np.ndarray]
Step = tuple[Arrays, Arrays]
MODEL, ARRAYS, FACTS = "model.mlpackage", "arrays.npz", "case.json"


@dataclass(frozen=True)
class Facts:
    """What is known about a case without reading its model.

    Args:
        test: pytest id of the test it came from.
        number: which comparison of that test, from 0.
        dtype: compute precision of the model, "fp32" or "fp16".
        atol, rtol: tolerance that the test itself asks for.
    """

    test: str
    number: int
    dtype: str
    atol: float
    rtol: float

    @property
    def key(self) -> str:
        """A short name for folders and records."""
        return hashlib.sha256(f"{self.test}#{self.number}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Case:
    """A stored case. ``steps`` are predictions in order, sharing one state where the model has any."""

    folder: Path
    facts: Facts
    steps: tuple[Step, ...]

    @property
    def model(self) -> Path:
        """The saved package."""
        return self.folder / MODEL


def cache_folder() -> Path:
    """Where harvested cases live: ``mlxkd/mil-conformance`` in the user's cache."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "mlxkd" / "mil-conformance"


def save(root: Path, facts: Facts, steps: tuple[Step, ...], write_model: Any) -> Path:
    """Store a case under ``root``; ``write_model(path)`` writes the package."""
    folder = root / facts.key[:2] / facts.key
    with atomic_folder(folder) as temporary:
        write_model(temporary / MODEL)
        arrays = {
            f"{i}/{side}/{name}": value
            for i, step in enumerate(steps)
            for side, values in zip(("in", "out"), step, strict=True)
            for name, value in values.items()
        }
        np.savez_compressed(temporary / ARRAYS, **arrays)  # type: ignore[arg-type]
        (temporary / FACTS).write_text(json.dumps(asdict(facts), indent=1), encoding="utf-8")
    return folder


def read(folder: Path) -> Case:
    """A case from its folder."""
    facts = Facts(**json.loads((folder / FACTS).read_text(encoding="utf-8")))
    steps: list[Step] = []
    with np.load(folder / ARRAYS) as stored:
        for key in stored.files:
            number, side, name = key.split("/", 2)
            while len(steps) <= int(number):
                steps.append(({}, {}))
            steps[int(number)][side == "out"][name] = stored[key]
    return Case(folder, facts, tuple(steps))


def stored(root: Path) -> Iterator[Path]:
    """Folders of all complete cases under ``root``, in a fixed order."""
    return (path.parent for path in sorted(root.glob(f"??/*/{FACTS}")))
