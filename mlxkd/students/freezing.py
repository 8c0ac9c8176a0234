"""Weights that stay as they are while others train."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import mlx.core as mx
import mlx.nn as nn

from mlxkd.errors import UserError
from mlxkd.trees import leaves


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze the weights whose path matches one of the patterns (``*`` and ``?``, case counts), in place.

    Raises:
        UserError: a pattern that matches no weight, or nothing left to train.
    """
    weights = [
        (f"{path}.{name}" if path else name, module, name)
        for path, module in model.named_modules()
        for name, value in module.items()
        if isinstance(value, mx.array)
    ]
    for pattern in patterns:
        matched = [(module, name) for path, module, name in weights if fnmatchcase(path, pattern)]
        if not matched:
            raise UserError(
                f"no weight matches {pattern!r}", where="student.frozen", hint=f"a name is {weights[0][0]!r}, say"
            )
        for module, name in matched:
            module.freeze(recurse=False, keys=[name])
    if patterns and not leaves(model.trainable_parameters()):
        raise UserError("nothing is left to train", where="student.frozen")
