"""Qwen 3: Llama with RMSNorm on each head's queries and keys; the head size is given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ane.convert.architecture import Architecture
from ane.convert.families import llama


def architecture(config: dict[str, Any]) -> Architecture:
    nested = config.get("rope_parameters") or {}  # where transformers 5 writes theta and scaling
    theta = config.get("rope_theta") or nested["rope_theta"]
    scaling = config.get("rope_scaling") or nested or None
    plain = {**config, "rope_theta": theta, "rope_scaling": scaling, "layer_types": None, "rope_traditional": False}
    return replace(llama.architecture(plain), qk_norm=True)
