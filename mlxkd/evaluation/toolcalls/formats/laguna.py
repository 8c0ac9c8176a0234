"""Poolside Laguna writes calls as GLM 4.7 does."""

from __future__ import annotations

from mlxkd.evaluation.toolcalls.formats.glm47 import GRAMMAR

__all__ = ["GRAMMAR"]
