"""Model families that convert, one module per mlx-lm ``model_type``.

A family is one function, ``architecture(config, tied) -> Architecture``. The blocks it names are shared.
To add a family, add its module here and its row to FAMILIES in tests/convert/toy_models.py.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from ane.convert.architecture import Architecture, longest_context
from mlxkd import registry
from mlxkd.errors import UserError


def names() -> tuple[str, ...]:
    """Every ``model_type`` that converts."""
    return registry.listing(sys.modules[__name__])


def architecture(config: dict[str, Any], *, tied: bool) -> Architecture:
    """The architecture of a config.json, read by its family.

    Args:
        config: the model's config.json.
        tied: whether the weights hold no separate head.

    Raises:
        UserError: a family or a config value that does not convert.
    """
    family = str(config.get("model_type"))
    if family not in names():
        raise UserError(
            f"model_type {family!r} does not convert to Core ML",
            where="config.json: model_type",
            hint=f"supported: {', '.join(names())}; a family is one module in ane/convert/families",
        )
    try:
        found: Architecture = registry.member(sys.modules[__name__], family).architecture(config, tied)
    except KeyError as error:
        raise UserError(f"config.json lacks {error.args[0]!r}", where=f"family {family}") from error
    if found.heads % found.kv_heads:
        raise UserError(
            f"{found.heads} heads cannot share {found.kv_heads} key-value heads",
            where="config.json: num_key_value_heads",
        )
    return replace(found, max_positions=longest_context(config))
