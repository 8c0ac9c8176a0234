"""Mistral: Llama under another name, as in mlx-lm (which ignores ``sliding_window`` without ``layer_types``)."""

from __future__ import annotations

from ane.convert.families.llama import architecture

__all__ = ["architecture"]
