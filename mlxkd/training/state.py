"""What a run needs to go on: weights, optimiser, random state, position. One folder, swapped in whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_unflatten

from mlxkd.data.example import Example
from mlxkd.errors import UserError
from mlxkd.files import atomic_folder
from mlxkd.trees import leaves

Optimizer = optim.Optimizer | optim.MultiOptimizer
ARRAYS, FACTS = "arrays.safetensors", "state.json"


@dataclass(frozen=True)
class Position:
    """Where a run stands.

    Args:
        step: updates done; also the data position, since batch ``step`` is a pure function of the seed.
        recipe: identity of the recipe, so that another one is not continued by mistake.
        data: hash of the training examples.
        best: lowest validation loss so far (nats/token), None before the first one that counts.
        tokens: supervised tokens seen.
        rate_factor: what the stability limits have made of the learning rate.
        interventions: how often they have acted.
    """

    step: int
    recipe: str
    data: str
    best: float | None = None
    tokens: float = 0.0
    rate_factor: float = 1.0
    interventions: int = 0


def data_hash(examples: Sequence[Example]) -> str:
    """A hash of token ids and weights, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.tokens.tobytes())
        digest.update(example.weights.tobytes())
    return digest.hexdigest()[:16]


def save(
    folder: Path,
    position: Position,
    model: nn.Module,
    optimizer: Optimizer,
    extra: Mapping[str, mx.array] | None = None,
) -> None:
    """Write a checkpoint, with ``extra`` arrays if any; the previous one stays until the new one is whole."""
    arrays = {f"model.{k}": v for k, v in leaves(model.parameters())}
    arrays |= {f"optimizer.{k}": v for k, v in leaves(optimizer.state)}
    arrays |= {f"extra.{k}": v for k, v in (extra or {}).items()}
    arrays["random"] = random_key()
    with atomic_folder(folder) as temporary:
        try:
            mx.save_safetensors(str(temporary / ARRAYS), arrays)
        except RuntimeError as error:  # how mlx reports a failed write
            raise OSError(str(error)) from error
        (temporary / FACTS).write_text(json.dumps(asdict(position), indent=2) + "\n", encoding="utf-8")


def random_key() -> mx.array:
    """MLX's global random key, uint32 [2]."""
    key: mx.array = next(iter(mx.random.state))  # type: ignore[call-overload]
    return key


def set_random_key(key: mx.array) -> None:
    """Restore it: ``mx.random.seed`` splits a 64-bit seed into exactly these two words, high word first."""
    high, low = (int(word) for word in np.array(key))
    mx.random.seed((high << 32) | low)


def peek(folder: Path) -> Position:
    """The position of a checkpoint, without its arrays.

    Raises:
        UserError: no checkpoint there, or a damaged one.
    """
    try:
        return Position(**json.loads((folder / FACTS).read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise UserError("no checkpoint to resume from", where=str(folder), hint="run without --resume") from error
    except (json.JSONDecodeError, TypeError) as error:
        raise UserError(f"the checkpoint is damaged: {error}", where=str(folder / FACTS)) from error


def restore(folder: Path, model: nn.Module, optimizer: Optimizer | None = None) -> Position:
    """Put a checkpoint into a model (and optimiser, and the random state) of the same structure."""
    position = peek(folder)
    flat: Any = mx.load(str(folder / ARRAYS))

    def part(prefix: str) -> Any:
        return tree_unflatten([(k.removeprefix(prefix), v) for k, v in flat.items() if k.startswith(prefix)])

    model.update(part("model."))
    if optimizer is not None:
        optimizer.init(model.trainable_parameters())
        optimizer.state = part("optimizer.")
        set_random_key(flat["random"])
    mx.eval(model.parameters())
    return position


def load_extra(folder: Path, part: str) -> dict[str, mx.array]:
    """The ``extra`` arrays of a checkpoint whose names begin with ``part.``, without it."""
    flat: Any = mx.load(str(folder / ARRAYS))
    prefix = f"extra.{part}."
    return {k.removeprefix(prefix): v for k, v in flat.items() if k.startswith(prefix)}


def check_same(position: Position, recipe: str, data: str, folder: Path) -> None:
    """Refuse to continue a run with another recipe or other data."""
    if position.recipe != recipe:
        raise UserError(
            "this checkpoint was made by another recipe", where=str(folder), hint="resume with the recipe it left"
        )
    if position.data != data:
        raise UserError(
            "the training data has changed since this checkpoint", where=str(folder), hint="run without --resume"
        )
