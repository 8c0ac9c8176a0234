"""SmolLM 3: Llama in which every fourth layer has no positions (NoPE)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ane.convert.architecture import Architecture
from ane.convert.families import llama
from mlxkd.errors import UserError


def architecture(config: dict[str, Any]) -> Architecture:
    found = llama.architecture(config)
    interval = config.get("no_rope_layer_interval", 4)
    uses = config.get("no_rope_layers") or [(i + 1) % interval != 0 for i in range(len(found.layers))]
    if len(uses) != len(found.layers):
        raise UserError(
            f"no_rope_layers has {len(uses)} entries for {len(found.layers)} layers",
            where="config.json: no_rope_layers",
        )
    layers = (replace(layer, rotary=0 if use else None) for layer, use in zip(found.layers, uses, strict=True))
    return replace(found, layers=tuple(layers))
