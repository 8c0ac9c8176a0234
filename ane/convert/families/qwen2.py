"""Qwen 2 and 2.5: Llama with biases on queries, keys and values (read from the weights)."""

from __future__ import annotations

from typing import Any

from ane.convert.architecture import Architecture
from ane.convert.families import llama


def architecture(config: dict[str, Any]) -> Architecture:
    # mlx-lm reads no layer_types here (use_sliding_window is off in every released model) and another base.
    return llama.architecture({"rope_theta": 1000000.0, **config, "head_dim": None, "layer_types": None})
