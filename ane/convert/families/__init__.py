"""Model families that convert, one module per mlx-lm ``model_type``.

A family is one function, ``architecture(config) -> Architecture``. The blocks it names are shared.
To add a family, add its module here and its row to FAMILIES in tests/convert/toy_models.py.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from ane.convert.architecture import Architecture, longest_context
from mlxkd import registry
from mlxkd.errors import UserError

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def names() -> tuple[str, ...]:
    """Every ``model_type`` that converts."""
    return registry.listing(sys.modules[__name__])


def architecture(config: dict[str, Any]) -> Architecture:
    """The architecture of a config.json, read by its family.

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
    for key in SIZES:
        value = config.get(key, 1)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{key} is {value!r}, not a positive whole number", where=f"config.json: {key}")
    try:
        found: Architecture = registry.member(sys.modules[__name__], family).architecture(config)
    except KeyError as error:
        raise UserError(f"config.json lacks {error.args[0]!r}", where=f"family {family}") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"config.json holds a value that does not fit: {error}", where=f"family {family}") from error
    if found.heads % found.kv_heads:
        raise UserError(
            f"{found.heads} heads cannot share {found.kv_heads} key-value heads",
            where="config.json: num_key_value_heads",
        )
    return replace(found, max_positions=longest_context(config))
